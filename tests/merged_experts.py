"""Mixtures of experts for tests: stacks of packed weights, a small module as transformers has them, and routings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers import random_quantized
from lowbit import QuantSpec
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.cpu import DISK
from lowbit.experts import Experts, separate
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.ops import from_disk
from lowbit.packing import pack_codes

COUNTS = [0, 5, 0, 1, 40, 0]
"""Rows per expert: starved ones first, last and between; few and many, which cpu.py multiplies differently."""
W4 = QuantSpec(4, -1)


def stack(
    spec: QuantSpec, count: int, n: int, k: int, dtype: torch.dtype, layout: str = DISK
) -> tuple[list[QuantizedWeight], tuple[Tensor, Tensor, Tensor | None]]:
    """Unpacked weights of ``count`` experts, and weight, scales and zeros in ``layout``, stacked."""
    weights, parts = [random_quantized(n, k, spec, dtype) for _ in range(count)], []
    for qw in weights:
        zeros = None if qw.zeros is None else pack_codes(qw.zeros, spec.bits, dim=0)
        parts.append(from_disk(pack_codes(qw.codes, spec.bits), qw.scales, zeros, bits=spec.bits, k=k, layout=layout))
    weight, scales, zero = zip(*parts, strict=True)
    return weights, (torch.stack(weight), torch.stack(scales), None if zero[0] is None else torch.stack(zero))


def ends_of(counts: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(dtype)


def float64(x: Tensor, counts: list[int], weights: list[QuantizedWeight], bias: Tensor | None) -> Tensor:
    out, begin = torch.zeros(len(x), len(weights[0].codes), dtype=torch.float64), 0
    for e, rows in enumerate(counts):
        mine = slice(begin, begin + rows)
        out[mine] = x[mine].double() @ dequantize(weights[e], torch.float64).t()
        out[mine] += 0 if bias is None else bias[e].double()
        begin += rows
    return out


class Merged(nn.Module):
    """Merged experts as transformers describes them, with every choice it offers."""

    def __init__(self, *, gate: bool = True, bias: bool = False, concatenated: bool = True, inner: int = 48) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_concatenated, self.is_transposed = gate, bias, concatenated, False
        self.num_experts, self.act_fn = 5, nn.SiLU()
        first, rows = ("gate_up_proj", 2 * inner) if gate else ("up_proj", inner)
        self.register_parameter(first, nn.Parameter(torch.randn(5, rows, 64) / 8))
        self.down_proj = nn.Parameter(torch.randn(5, 64, inner) / 8)
        if bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.randn(5, rows) / 8))
            self.down_proj_bias = nn.Parameter(torch.randn(5, 64) / 8)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate.clamp(max=7)) * (up + 1)


def packed_linear_of(linear: nn.Linear, spec: QuantSpec, dtype: torch.dtype) -> QuantLinear | Int8Linear:
    """A random packed weight in the place of a dense one, ready to run; static activations with a random scale."""
    n, k = linear.weight.shape
    qw = random_quantized(n, k, spec)
    if spec.activations is None:
        return QuantLinear.from_quantized(qw, linear.bias, dtype=dtype).repack()
    scale = None if spec.activations.dynamic else 0.02 + 0.02 * torch.rand(1)
    return Int8Linear.from_quantized(qw, linear.bias, input_scale=scale, dtype=dtype).repack()


def packed_experts(
    spec: QuantSpec | list[QuantSpec | None] = W4, dtype: torch.dtype = torch.float32, **choices: bool | int
) -> Experts:
    """Five experts of one spec, or of as many as are given in turn; None leaves an expert dense. Not stacked yet."""
    experts = separate(Merged(**choices))
    specs = spec if isinstance(spec, list) else [spec]
    for e, expert in enumerate(experts):
        own = specs[e % len(specs)]
        for name, linear in list(expert.named_children()):
            setattr(expert, name, linear.to(dtype) if own is None else packed_linear_of(linear, own, dtype))
        if (
            own is not None
            and own.activations is not None
            and not own.activations.dynamic
            and hasattr(expert, "gate_proj")
        ):
            with torch.no_grad():  # as calibration finds them: both have the same input
                expert.up_proj.input_scale.copy_(expert.gate_proj.input_scale)
    return experts


def routing(count: int = 9, k: int = 2, experts: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and their weights; experts 0 and 3 get nothing, and one choice is nobody's."""
    chosen = torch.tensor([1, 2, 4])[torch.rand(count, 3).argsort(1)[:, :k]]
    chosen[-1:, -1] = experts
    return torch.randn(count, 64), chosen, torch.rand(count, k)

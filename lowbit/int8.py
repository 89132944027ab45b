"""W8A8: a linear whose weight and input are both int8, so that its sums are exact integers.

    lowbit::int8_linear(x, weight, weight_scale, weight_zero?, input_scale?, bias?) -> x @ W.T + bias

    x ~ x_q * x_scale      W = (weight - weight_zero) * weight_scale
    out = (x_q @ (weight - weight_zero).T) * x_scale * weight_scale + bias

| tensor       | shape  | dtype                    |                                                               |
|--------------|--------|--------------------------|---------------------------------------------------------------|
| x            | (..., K) | fp32, fp16, bf16       | any strides; M tokens                                         |
| weight       | (N, K) | int8                     | as in a compressed-tensors ``int-quantized`` file             |
| weight_scale | (N, 1) | fp32, fp16, bf16         | one per output channel                                        |
| weight_zero  | (N, 1) | int8 or None             | None: symmetric                                               |
| input_scale  | (1,) or () | fp32, fp16, bf16 or None | one scale for all of x (static); None: one per token      |
| bias         | (N,)   | fp32, fp16, bf16 or None |                                                               |

Activations, in fp32 and one IEEE operation at a time, so that every device finds the same integers:

    per token   x_q = rint(x * (127 / top)), x_scale = top / 127, with top = max(absmax(x[m]), 2**-100)
    static      x_q = rint(clamp(x * (1 / input_scale), -128, 127)), x_scale = input_scale

A token with a NaN, and where scales are per token one with an infinity, comes out as NaN; no other token changes. A
static scale saturates; one that is not finite and positive makes everything NaN.

CPU: torch, below. CUDA: two Triton kernels, lowbit_kernels/int8.py. The gradient with respect to x is the
straight-through one (Bengio et al. 2013), which takes rounding for the identity: ``grad @ W``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import aligned_rows, int8_kernel
from .registration import FLOATS, check_activations, check_tensor, register, register_gradient

__all__ = [
    "check_int8",
    "int8_input_gradient",
    "int8_linear",
    "int_matmul",
    "largest_k",
    "multiply_codes",
    "quantize_activations",
]

_SMALLEST_MAXIMUM = 2.0**-100
_EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2**24: fp32 adds so many products of int8 numbers without rounding
_CHUNK = 2**20  # weights dequantized at a time


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x (..., K) @ W.T + bias`` with x quantized to int8 on the way; shapes and dtypes in int8.py's table.

    Returns:
        ``(..., N)`` in x's dtype, on x's device. Its gradient with respect to x is the straight-through one.

    Raises:
        ValueError: a shape, dtype or device is not the table's, or K is so long that int32 sums could overflow.
    """
    out: Tensor = torch.ops.lowbit.int8_linear.default(x, weight, weight_scale, weight_zero, input_scale, bias)
    return out


def largest_k(asymmetric: bool) -> int:
    """The longest row whose sum of products always fits int32."""
    most = 255 if asymmetric else 128
    return (2**31 - 1) // (128 * most)


def check_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Compare with the module's table, x being (..., K). ValueError names the first contradiction."""
    check_activations(x)
    if weight.ndim != 2 or weight.dtype != torch.int8:
        raise ValueError(f"weight must be (N, K) int8, got {tuple(weight.shape)} {weight.dtype}")
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}) for weight {(n, k)}, got {tuple(x.shape)}")
    limit = largest_k(weight_zero is not None)
    if n < 1 or not 1 <= k <= limit:
        raise ValueError(f"N must be at least 1 and K from 1 to {limit} (sums are int32), got weight {(n, k)}")
    check_tensor("weight", weight, (n, k), (torch.int8,), x)
    check_tensor("weight_scale", weight_scale, (n, 1), FLOATS, x)
    if weight_zero is not None:
        check_tensor("weight_zero", weight_zero, (n, 1), (torch.int8,), x)
    if input_scale is not None:
        check_tensor("input_scale", input_scale, (1,) if input_scale.ndim else (), FLOATS, x)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, x)


def quantize_activations(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x_q (M, K)`` int8 and ``x_scale (M,)`` fp32 of x (M, K); input_scale one scale for all tokens, or (M,)."""
    wide = x.float()
    if input_scale is None:
        top = wide.abs().amax(1)
        valid = top.isfinite()
        top = torch.where(valid, top, 1.0).clamp_(min=_SMALLEST_MAXIMUM)
        most = torch.full_like(top, 127.0)  # 127.0 / top would be a reciprocal and a product: two roundings
        codes = wide * (most / top).unsqueeze(1)
        codes = codes if bool(valid.all()) else torch.where(valid.unsqueeze(1), codes, 0.0)
        return codes.round_().to(torch.int8), torch.where(valid, top / most, torch.nan)
    given = input_scale.float().reshape(-1)
    usable = (given > 0) & given.isfinite()
    nan = wide.isnan()
    scale = torch.where(usable & ~nan.any(1), given, torch.nan)
    codes = torch.where(nan, 0.0, wide) * torch.where(usable, given.reciprocal(), 0.0).unsqueeze(1)
    codes = codes.nan_to_num_(0.0, torch.inf, -torch.inf)  # infinity times the 0 of an unusable scale
    return codes.clamp_(-128, 127).round_().to(torch.int8), scale


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a (M, K) @ b (N, K).T``, both int8, exactly: ``(M, N)`` int32. On the CPU."""
    if _int_mm_is_exact():
        out: Tensor = torch._int_mm(a, b.t())
        return out
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    for begin in range(0, a.shape[1], _EXACT_COLUMNS):
        part = slice(begin, begin + _EXACT_COLUMNS)
        total += F.linear(a[:, part].float(), b[:, part].float()).to(torch.int32)
    return total


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether torch's integer matmul adds without saturating 16-bit pairs, which is what x86 without VNNI does."""
    values = torch.tensor([-128, -127, 127, 1, -128, 127, 127, -1], dtype=torch.int8, device="cpu").repeat(32)
    a = torch.stack([values, values.flip(0), torch.full_like(values, -128), torch.full_like(values, 127)])
    b = torch.cat([a, a.roll(1, 1)]).repeat(8, 1)
    try:
        return torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())
    except (RuntimeError, NotImplementedError):
        return False


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``(M, N)`` in x's dtype, on the CPU; arguments are taken as checked."""
    x_q, x_scale = quantize_activations(x, input_scale)
    return multiply_codes(x_q, x_scale, weight, weight_scale, weight_zero, bias).to(x.dtype)


def multiply_codes(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """What quantize_activations returned times a weight: ``(M, N)`` fp32, on the CPU."""
    total = int_matmul(x_q, weight.contiguous())
    if weight_zero is not None:
        total -= weight_zero.t().to(torch.int32) * x_q.sum(1, dtype=torch.int32).unsqueeze(1)
    out = total.float().mul_(x_scale.unsqueeze(1)).mul_(weight_scale.t().float())
    return out if bias is None else out.add_(bias.float())


def int8_input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None) -> Tensor:
    """``grad (M, N) @ W``, with W dequantized in fp32 a chunk of rows at a time: ``(M, K)`` in grad's dtype."""
    (n, k), wide = weight.shape, grad.float()
    out = torch.zeros(grad.shape[0], k, dtype=torch.float32, device=grad.device)
    rows = max(1, (_CHUNK if grad.device.type == "cpu" else 16 * _CHUNK) // k)
    for a in range(0, n, rows):
        w = weight[a : a + rows].float()
        if weight_zero is not None:
            w -= weight_zero[a : a + rows].float()
        out.addmm_(wide[:, a : a + rows], w.mul_(weight_scale[a : a + rows].float()))
    return out.to(grad.dtype)


def _forward_cpu(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_int8(x, weight, *rest)
    out = _linear(x.reshape(-1, x.shape[-1]), weight, *rest)
    return out.view(*x.shape[:-1], weight.shape[0])


def _forward_cuda(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    check_int8(x, weight, weight_scale, weight_zero, input_scale, bias)
    zero = None if weight_zero is None else weight_zero.reshape(-1)
    out = int8_kernel()(aligned_rows(x), weight.contiguous(), weight_scale.reshape(-1), zero, input_scale, bias)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_int8(x, weight, *rest)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.lowbit.int8_linear_backward(grad, *ctx.saved_tensors), *[None] * 5


def _input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None) -> Tensor:
    flat = int8_input_gradient(grad.reshape(-1, grad.shape[-1]), weight, weight_scale, weight_zero)
    return flat.view(*grad.shape[:-1], weight.shape[1])


register(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero, Tensor? input_scale, Tensor? bias) "
    "-> Tensor",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
    save=_save,
    backward=_backward,
)
register_gradient(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor weight_scale, Tensor? weight_zero) -> Tensor",
    anywhere=_input_gradient,
    fake=lambda grad, weight, *_: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)

"""The torch.library operator behind W8A8 experts: grouped.py's matmul for weights and inputs in int8.

    lowbit::grouped_int8_linear(x, ends, slots?, weight, weight_scale, weight_zero?, input_scale?, bias?) -> out

x is (T, K) fp32, fp16 or bf16. It, ends and slots are in routing.py's table; weight (S, N, K), weight_scale (S, N, 1),
weight_zero (S, N, 1), input_scale (S, 1) and bias (S, N) are S of what int8.py's table says of one weight.

Numerics are int8.py's, so every row has the bits that int8_linear gives it for its expert's weight alone. With static
scales it is quantized with its expert's, which is why x comes unquantized.

CPU: rows are quantized together and multiplied expert by expert. CUDA: lowbit_kernels/grouped_int8.py, two launches
(with static scales a few small ones more) that read ``ends`` on the device, as grouped.py's.

The gradient with respect to x is the straight-through one, as int8.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .int8 import check_int8, int8_input_gradient, multiply_codes, quantize_activations
from .ops import aligned_rows, grouped_int8_kernel
from .registration import register, register_gradient
from .routing import assemble, check_rows, of, ranges, row_experts

__all__ = ["grouped_int8_linear"]


def grouped_int8_linear(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
) -> Tensor:
    """Rows of x, quantized on the way, times the int8 weight of the expert they are sorted to; tables as above.

    Returns:
        ``(T, N)`` in x's dtype, on x's device. Its gradient with respect to x is the straight-through one.

    Raises:
        ValueError: a shape, dtype or device is not the tables', or K is so long that int32 sums could overflow; on the
            CPU also ends that decrease or lie outside of 0 .. T, and slots that are no weight.
    """
    out: Tensor = torch.ops.lowbit.grouped_int8_linear.default(
        x, ends, slots, weight, weight_scale, weight_zero, input_scale, bias
    )
    return out


def _check(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    stacks = {"weight": weight, "weight_scale": weight_scale, "weight_zero": weight_zero}
    check_rows(x, ends, slots, {**stacks, "input_scale": input_scale, "bias": bias})
    check_int8(x, weight[0], weight_scale[0], of(weight_zero, 0), of(input_scale, 0), of(bias, 0))


def _forward_cpu(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    _check(x, ends, slots, weight, weight_scale, weight_zero, input_scale, bias)
    found = ranges(ends, slots, x.shape[0], len(weight))
    static = None if input_scale is None else _scale_of_rows(input_scale, ends, slots, x.shape[0])
    codes, scales = quantize_activations(x, static)

    def product(w: int, rows: slice) -> Tensor:
        return multiply_codes(codes[rows], scales[rows], weight[w], weight_scale[w], of(weight_zero, w), of(bias, w))

    return assemble(found, x, weight.shape[1], product)


def _scale_of_rows(input_scale: Tensor, ends: Tensor, slots: Tensor | None, rows: int) -> Tensor:
    """``(T,)``; any scale for a row that no weight here is for."""
    experts = row_experts(ends, rows).clamp_(max=len(ends) - 1)
    return input_scale.reshape(-1)[experts if slots is None else slots[experts].long().clamp_(min=0)]


def _forward_cuda(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    _check(x, ends, slots, weight, weight_scale, weight_zero, input_scale, bias)
    scale, zero, given = (None if t is None else t.flatten(1) for t in (weight_scale, weight_zero, input_scale))
    static = None if given is None else given.squeeze(1)
    packed = (weight.contiguous(), scale, zero, static, bias)
    return grouped_int8_kernel()(aligned_rows(x), ends.to(torch.int32), slots, *packed)


def _fake(x: Tensor, ends: Tensor, slots: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    _check(x, ends, slots, weight, *rest)
    return x.new_empty(x.shape[0], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.lowbit.grouped_int8_linear_backward(grad, *ctx.saved_tensors), *[None] * 7


def _input_gradient(
    grad: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
) -> Tensor:
    """``grad (T, N)`` times W of each row's expert, ``(T, K)`` in grad's dtype; zeros for rows without a weight."""

    def product(w: int, rows: slice) -> Tensor:
        return int8_input_gradient(grad[rows], weight[w], weight_scale[w], of(weight_zero, w))

    return assemble(ranges(ends, slots, grad.shape[0], len(weight)), grad, weight.shape[2], product)


register(
    "grouped_int8_linear(Tensor x, Tensor ends, Tensor? slots, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero, Tensor? input_scale, Tensor? bias) -> Tensor",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
    save=_save,
    backward=_backward,
)
register_gradient(
    "grouped_int8_linear_backward(Tensor grad, Tensor ends, Tensor? slots, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero) -> Tensor",
    anywhere=_input_gradient,
    fake=lambda grad, ends, slots, weight, *_: grad.new_empty(grad.shape[0], weight.shape[2]),
)

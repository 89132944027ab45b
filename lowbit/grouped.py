"""The torch.library operator behind packed experts: one matmul over the rows of all of them.

    lowbit::grouped_packed_linear(x, ends, slots?, weight, scales, zeros?, bias?, bits, group_size, layout) -> out

    out[i] = x[i] @ W[e].T + bias[e]   for ends[e - 1] <= i < ends[e]

x is (T, K) fp32, fp16 or bf16. It, ends and slots are in routing.py's table; weight, scales, zeros and bias are S of
what ops.py's table says of one weight, along a new first axis.

CPU: every expert's rows go through cpu.py's matmul. CUDA: "cuda_tiles" with fp16 or bf16 rows is one launch of
lowbit_kernels/grouped.py, which reads ``ends`` on the device: no copy to the host, so CUDA graphs can hold it, and
``ends`` out of order is not noticed (no memory outside of the tensors is touched). fp32 rows and the disk layout go
expert by expert, for which ``ends`` is copied to the host.

The weight is frozen: gradients reach x (``lowbit::grouped_packed_linear_backward``, expert by expert) and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .cpu import DISK
from .ops import CUDA_TILES, HALVES
from .registration import register, register_gradient
from .routing import assemble, check_rows, of, ranges, row_experts

__all__ = ["grouped_packed_linear"]


def grouped_packed_linear(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    layout: str = DISK,
    slots: Tensor | None = None,
) -> Tensor:
    """Rows of x times the packed weight of the expert they are sorted to; shapes and dtypes in the module's table.

    Returns:
        ``(T, N)`` in x's dtype, on x's device.

    Raises:
        ValueError: a shape, dtype, device, width, group size or layout is not one of the table's; on the CPU also ends
            that decrease or lie outside of 0 .. T, and slots that are no weight.
    """
    out: Tensor = torch.ops.lowbit.grouped_packed_linear.default(
        x, ends, slots, weight, scales, zeros, bias, bits, group_size, layout
    )
    return out


def _check(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> None:
    check_rows(x, ends, slots, {"weight": weight, "scales": scales, "zeros": zeros, "bias": bias})
    ops.check_packed(x, weight[0], scales[0], of(zeros, 0), of(bias, 0), bits, group_size, layout)


def _per_expert(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """On any device and from any layout; copies ``ends`` to the host."""
    _check(x, ends, slots, weight, scales, zeros, bias, bits, group_size, layout)

    def product(w: int, rows: slice) -> Tensor:
        return ops.unpacked_linear(x[rows], weight[w], scales[w], of(zeros, w), of(bias, w), bits, group_size, layout)

    found = ranges(ends, slots, x.shape[0], len(weight))
    return assemble(found, x, ops.rows_of(scales[0], layout), product)


def _forward_cuda(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    if layout != CUDA_TILES or x.dtype not in HALVES:
        return _per_expert(x, ends, slots, weight, scales, zeros, bias, bits, group_size, layout)
    _check(x, ends, slots, weight, scales, zeros, bias, bits, group_size, layout)
    how: dict[str, Any] = {"bits": bits, "group_size": group_size, "n": scales.shape[-1], "slots": slots}
    how["batch_invariant"] = ops.batch_invariant()
    return ops.grouped_kernel()(ops.aligned_rows(x), ends.to(torch.int32), weight, scales, zeros, bias, **how)


def _fake(x: Tensor, ends: Tensor, slots: Tensor | None, weight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    _check(x, ends, slots, weight, scales, *rest)
    return x.new_empty(x.shape[0], ops.rows_of(scales[0], layout=rest[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, slots, weight, scales, zeros, bias, ctx.bits, ctx.group_size, ctx.layout = inputs
    ctx.k, ctx.bias = x.shape[-1], None if bias is None else (bias.shape[0], bias.dtype)
    ctx.save_for_backward(ends, slots, weight, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[4]:
        raise RuntimeError("lowbit::grouped_packed_linear has no gradient for scales: a packed weight is frozen")
    ends, slots, *packed = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        how = (ctx.bits, ctx.group_size, ctx.layout, ctx.k)
        of_x = torch.ops.lowbit.grouped_packed_linear_backward(grad, ends, slots, *packed, *how)
    if ctx.needs_input_grad[6]:
        weights, dtype = ctx.bias
        whose = row_experts(ends, grad.shape[0])
        if slots is not None:  # an expert's number becomes its weight's, or one that no weight has
            whose = torch.cat((slots, slots.new_full((1,), -1)))[whose]
        mine = whose == torch.arange(weights, device=grad.device)[:, None]
        of_bias = (mine.float() @ grad.float()).to(dtype)  # a product adds in the same order every time
    return of_x, None, None, None, None, None, of_bias, None, None, None


def _input_gradient(
    grad: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    k: int,
) -> Tensor:
    """``grad (T, N)`` times W of each row's expert, ``(T, K)`` in grad's dtype; zeros for rows without a weight."""

    def product(w: int, rows: slice) -> Tensor:
        return ops.input_gradient(grad[rows], weight[w], scales[w], of(zeros, w), bits, group_size, layout, k)

    return assemble(ranges(ends, slots, grad.shape[0], len(weight)), grad, k, product)


register(
    "grouped_packed_linear(Tensor x, Tensor ends, Tensor? slots, Tensor weight, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int bits, int group_size, str layout) -> Tensor",
    cpu=_per_expert,
    cuda=_forward_cuda,
    fake=_fake,
    save=_save,
    backward=_backward,
)
register_gradient(
    "grouped_packed_linear_backward(Tensor grad, Tensor ends, Tensor? slots, Tensor weight, Tensor scales, "
    "Tensor? zeros, int bits, int group_size, str layout, SymInt k) -> Tensor",
    anywhere=_input_gradient,
    fake=lambda grad, *rest: grad.new_empty(grad.shape[0], rest[-1]),
)

"""The torch.library operator behind packed experts: one matmul over the rows of all of them.

    lowbit::grouped_packed_linear(x, ends, weight, scales, zeros?, bias?, bits, group_size, layout) -> out

    out[i] = x[i] @ W[e].T + bias[e]   for ends[e - 1] <= i < ends[e]        out[i] = 0 for i from ends[E - 1] on

| argument | shape and dtype                                                                                     |
|----------|-----------------------------------------------------------------------------------------------------|
| x        | (T, K) fp32, fp16 or bf16: rows sorted by expert                                                    |
| ends     | (E,) int32 or int64, not decreasing, 0 .. T: as ``offs`` of ``torch.nn.functional.grouped_mm``      |
| weight, scales, zeros, bias | E of what ops.py's table says of one weight, along a new first axis              |

T may be 0, and any expert may have no rows.

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
from .ops import CUDA_TILES

__all__ = ["grouped_packed_linear"]

_HALVES = (torch.float16, torch.bfloat16)


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
) -> Tensor:
    """Rows of x times the packed weight of the expert they are sorted to; shapes and dtypes in the module's table.

    Returns:
        ``(T, N)`` in x's dtype, on x's device.

    Raises:
        ValueError: a shape, dtype, device, width, group size or layout is not one of the table's; on the CPU also ends
            that decrease or lie outside of 0 .. T.
    """
    out: Tensor = torch.ops.lowbit.grouped_packed_linear.default(
        x, ends, weight, scales, zeros, bias, bits, group_size, layout
    )
    return out


def _check(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be (T, K), rows sorted by expert, got {tuple(x.shape)}")
    if ends.ndim != 1 or not len(ends) or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ends must be (E,) int32 or int64 with E at least 1, got {tuple(ends.shape)} {ends.dtype}")
    if ends.device != x.device:
        raise ValueError(f"ends is on {ends.device}, but x is on {x.device}; move one of them")
    stacked = {"weight": weight, "scales": scales, "zeros": zeros, "bias": bias}
    for name, tensor in stacked.items():
        if tensor is not None and (tensor.ndim == 0 or tensor.shape[0] != ends.shape[0]):
            raise ValueError(f"{name} must hold the {ends.shape[0]} experts of ends, got {tuple(tensor.shape)}")
    ops._check(x, weight[0], scales[0], _of(zeros, 0), _of(bias, 0), bits, group_size, layout)


def _of(tensor: Tensor | None, expert: int) -> Tensor | None:
    return None if tensor is None else tensor[expert]


def _per_expert(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """On any device and from any layout; copies ``ends`` to the host."""
    _check(x, ends, weight, scales, zeros, bias, bits, group_size, layout)
    out = x.new_empty(x.shape[0], ops._rows(scales[0], layout))
    end = 0
    for e, begin, end in _ranges(ends, x.shape[0]):
        out[begin:end] = ops._unpacked(
            x[begin:end], weight[e], scales[e], _of(zeros, e), _of(bias, e), bits, group_size, layout
        )
    out[end:] = 0
    return out


def _ranges(ends: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of the experts that have rows."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    if any(a > b for a, b in zip(starts, stops, strict=True)) or stops[-1] > rows:
        raise ValueError(f"ends must not decrease and lie in 0 .. {rows}, the rows of x, got {stops[:16]}")
    return [(e, a, b) for e, (a, b) in enumerate(zip(starts, stops, strict=True)) if a < b]


def _forward_cuda(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    if layout != CUDA_TILES or x.dtype not in _HALVES:
        return _per_expert(x, ends, weight, scales, zeros, bias, bits, group_size, layout)
    _check(x, ends, weight, scales, zeros, bias, bits, group_size, layout)
    invariant = ops._batch_invariant
    how: dict[str, Any] = {"bits": bits, "group_size": group_size, "n": scales.shape[-1], "batch_invariant": invariant}
    return ops.grouped_kernel()(ops.aligned_rows(x), ends.to(torch.int32), weight, scales, zeros, bias, **how)


def _fake(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, ends, weight, scales, zeros, bias, bits, group_size, layout)
    return x.new_empty(x.shape[0], ops._rows(scales[0], layout))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, weight, scales, zeros, bias, ctx.bits, ctx.group_size, ctx.layout = inputs
    ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(ends, weight, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[3]:
        raise RuntimeError("lowbit::grouped_packed_linear has no gradient for scales: a packed weight is frozen")
    ends, *packed = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        # An operator of its own, so that torch.compile does not trace what it does expert by expert.
        how = (ctx.bits, ctx.group_size, ctx.layout, ctx.k)
        of_x = torch.ops.lowbit.grouped_packed_linear_backward(grad, ends, *packed, *how)
    if ctx.needs_input_grad[5]:
        rows = torch.arange(grad.shape[0], device=grad.device)
        begins = torch.cat((ends.new_zeros(1), ends[:-1]))
        mine = (rows >= begins[:, None]) & (rows < ends[:, None])  # a product with it adds in the same order every time
        of_bias = (mine.float() @ grad.float()).to(ctx.bias_dtype)
    return of_x, None, None, None, None, of_bias, None, None, None


def _input_gradient(
    grad: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    k: int,
) -> Tensor:
    """``grad (T, N)`` times W of each row's expert, ``(T, K)`` in grad's dtype; zeros past the last expert's rows."""
    out = grad.new_empty(grad.shape[0], k)
    end = 0
    for e, begin, end in _ranges(ends, grad.shape[0]):
        out[begin:end] = ops._input_gradient(
            grad[begin:end], weight[e], scales[e], _of(zeros, e), bits, group_size, layout, k
        )
    out[end:] = 0
    return out


def _fake_input_gradient(
    grad: Tensor,
    ends: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    k: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], k)


def _refuse_double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "lowbit::grouped_packed_linear has no second derivative; call backward() or grad() without create_graph=True"
    )


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(
    "grouped_packed_linear(Tensor x, Tensor ends, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
    "int group_size, str layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("grouped_packed_linear", _per_expert, "CPU")
_LIBRARY.impl("grouped_packed_linear", _forward_cuda, "CUDA")
torch.library.register_fake("lowbit::grouped_packed_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("lowbit::grouped_packed_linear", _backward, setup_context=_save_weight, lib=_LIBRARY)
_LIBRARY.define(
    "grouped_packed_linear_backward(Tensor grad, Tensor ends, Tensor weight, Tensor scales, Tensor? zeros, int bits, "
    "int group_size, str layout, SymInt k) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("grouped_packed_linear_backward", _input_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::grouped_packed_linear_backward", _fake_input_gradient, lib=_LIBRARY)
torch.library.register_autograd("lowbit::grouped_packed_linear_backward", _refuse_double_backward, lib=_LIBRARY)

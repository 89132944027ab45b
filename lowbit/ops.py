"""The torch.library operator behind QuantLinear; the only importer of lowbit_kernels.

int8.py, grouped.py and grouped_int8.py have the other operators.

    lowbit::packed_linear(x, weight, scales, zeros?, bias?, bits, group_size, layout) -> x @ W.T + bias

| argument | shape and dtype                                                                    |
|----------|------------------------------------------------------------------------------------|
| x        | (..., K) fp32, fp16 or bf16, any strides                                           |
| weight   | (N, ceil(K*bits/32)) int32 in the "disk" layout, else see the tables below          |
| scales   | (N, G) fp32, fp16 or bf16, any strides; G = K / group_size, or 1 for group_size -1  |
| zeros    | None for a symmetric grid; (ceil(N*bits/32), G) int32 on disk                       |
| bias     | (N,) fp32, fp16 or bf16, or None                                                   |

The layouts "cpu_int4" and "cpu_int8" are in cpu.py. The GPU's, lowbit_kernels/layout.py:

| "cuda_tiles" | weight (ceil(N/16), U, 16, 16) int32 | scales (G, N) contiguous | zeros (G, N) uint8 contiguous |

CPU: cpu.py. CUDA: "cuda_tiles" is multiplied by the Triton kernels for fp16 and bf16. fp32 activations, for which
tensor cores have no exact product, and the disk layout, which no kernel reads, unpack a chunk of rows at a time and
call a dense matmul. Everything accumulates in fp32.

The weight is frozen: gradients reach x (``lowbit::packed_linear_backward``, a chunk of columns at a time) and bias.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .cpu import CPU_INT4, CPU_INT8, DISK
from .registration import FLOATS, check_activations, check_tensor, register, register_gradient
from .spec import GROUP_SIZES, PACKED_BITS

__all__ = [
    "CUDA_TILES",
    "HALVES",
    "LAYOUTS",
    "aligned_rows",
    "batch_invariant",
    "best_layout",
    "check_packed",
    "from_disk",
    "grouped_int8_kernel",
    "grouped_kernel",
    "has_grouped_kernel",
    "input_gradient",
    "int8_kernel",
    "packed_linear",
    "prepare",
    "rows_of",
    "set_batch_invariant",
    "to_disk",
    "unpacked_linear",
]

CUDA_TILES = "cuda_tiles"
LAYOUTS = (DISK, CPU_INT4, CPU_INT8, CUDA_TILES)
_CHUNK = 2**24  # weights of the GPU layout unpacked at a time
HALVES = (torch.float16, torch.bfloat16)
"""Activations that the kernels multiply with."""

_batch_invariant = False


def set_batch_invariant(enabled: bool) -> None:
    """Make row i of every packed layer's result depend on row i of its input alone, bit for bit, whatever the batch.

    For this process, until it is set again. The GPU kernels then run one tile for every number of tokens, never cuBLAS
    and never split_k: slower for a single token and for long prompts. Results of a whole model are as independent of
    the batch as its other layers are (attention, norms, the dense head). W8A8 layers always are: integers sum exactly.

    Only fp16 and bf16 layers on a CUDA device can do it. Others raise a RuntimeError while it is set.
    """
    global _batch_invariant
    _batch_invariant = bool(enabled)


def batch_invariant() -> bool:
    """Whether :func:`set_batch_invariant` asks for it."""
    return _batch_invariant


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    layout: str = DISK,
) -> Tensor:
    """``x (..., K) @ W.T + bias`` for a packed ``W (N, K)``; shapes and dtypes in the module's table.

    Returns:
        ``(..., N)`` in x's dtype, on x's device.

    Raises:
        ValueError: a shape, dtype, device, width, group size or layout is not one of the table's.
    """
    out: Tensor = torch.ops.lowbit.packed_linear.default(x, weight, scales, zeros, bias, bits, group_size, layout)
    return out


def best_layout(n: int, k: int, *, bits: int, symmetric: bool, dtype: torch.dtype, device: torch.device) -> str:
    """The layout that is fastest to multiply with on ``device``, for scales of ``dtype``.

    On CUDA that is "cuda_tiles" for a 16-bit model wherever the kernels run; a model in fp32 keeps the disk layout.
    """
    if device.type == "cuda" and dtype in HALVES:
        try:
            from lowbit_kernels.tiles import MIN_ARCH
            from lowbit_kernels.weight_only import device_arch
        except ImportError as error:  # no triton: not on Linux
            warnings.warn(f"the GPU kernels cannot be imported, layers run unpacked: {error}", stacklevel=2)
            return DISK
        if device_arch(device) >= (80 if dtype == torch.bfloat16 else MIN_ARCH):
            return CUDA_TILES
    return cpu.best_layout(n, k, bits=bits, symmetric=symmetric, dtype=dtype, device=device)


def from_disk(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, k: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, scales and zeros of the disk layout in ``layout``, on the same device."""
    if layout == CUDA_TILES:
        from lowbit_kernels.layout import to_tiles

        return to_tiles(weight, scales, zeros, bits, k)
    return cpu.from_disk(weight, scales, zeros, bits=bits, k=k, layout=layout)


def to_disk(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, k: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of :func:`from_disk`, bit for bit."""
    if layout == CUDA_TILES:
        from lowbit_kernels.layout import from_tiles

        return from_tiles(weight, scales, zeros, bits, k)
    return cpu.to_disk(weight, scales, zeros, bits=bits, k=k, layout=layout)


def prepare(device: torch.device, *, reset: bool = False) -> None:
    """Allocate what the kernels share between calls, before a CUDA graph is captured. Does nothing but on CUDA.

    Args:
        reset: begin anew with what is there, whose memory may have been away meanwhile. No kernel may be running.
    """
    if device.type == "cuda":
        from lowbit_kernels import epilogue

        epilogue.prepare(device, reset=reset)


def check_packed(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> None:
    """Compare with the module's table, x being (..., K). ValueError names the first contradiction."""
    if bits not in PACKED_BITS:
        raise ValueError(f"packed widths are {PACKED_BITS} bits, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    if layout not in LAYOUTS or (layout == CPU_INT4 and bits != 4) or (layout == CPU_INT8 and bits != 8):
        raise ValueError(f"layout must be one of {LAYOUTS} and of the weight's width, got {layout!r} for {bits} bits")
    if layout in (CPU_INT4, CPU_INT8) and x.device.type not in ("cpu", "meta"):
        raise ValueError(f"layout {layout!r} is for the CPU, got x on {x.device}")
    check_activations(x)
    if scales.ndim != 2:
        form = "(G, N)" if layout == CUDA_TILES else "(N, G)"
        raise ValueError(f"scales must be {form}, got {tuple(scales.shape)}")
    k, n = x.shape[-1], rows_of(scales, layout)
    if k == 0 or (group_size != -1 and k % group_size):
        raise ValueError(f"x is (..., {k}), but group_size {group_size} does not divide that K")
    groups = 1 if group_size == -1 else k // group_size
    of_weight: tuple[tuple[int, ...], torch.dtype]
    of_zeros: tuple[tuple[int, ...], torch.dtype] | None
    if layout == CPU_INT4:
        of_weight, of_zeros = ((n, k // 2), torch.uint8), ((n, groups), torch.uint8)
    elif layout == CPU_INT8:
        of_weight, of_zeros = ((groups, n, k // groups), torch.int8), None
    elif layout == CUDA_TILES:
        from lowbit_kernels.layout import tiles_shape

        of_weight, of_zeros = (tiles_shape(n, k, bits), torch.int32), ((groups, n), torch.uint8)
    else:
        of_weight, of_zeros = ((n, -(-k * bits // 32)), torch.int32), ((-(-n * bits // 32), groups), torch.int32)
    check_tensor("weight", weight, of_weight[0], of_weight[1:], x)
    check_tensor("scales", scales, (groups, n) if layout == CUDA_TILES else (n, groups), FLOATS, x)
    if zeros is not None and of_zeros is None:
        raise ValueError(f"layout {layout!r} holds symmetric weights, got zeros {tuple(zeros.shape)}")
    if zeros is not None and of_zeros is not None:
        check_tensor("zeros", zeros, of_zeros[0], of_zeros[1:], x)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, x)


def rows_of(scales: Tensor, layout: str) -> int:
    """N of a weight with these scales."""
    return scales.shape[1] if layout == CUDA_TILES else scales.shape[0]


def _forward_unpacked(x: Tensor, *packed: Any) -> Tensor:
    check_packed(x, *packed)
    out = unpacked_linear(x.reshape(-1, x.shape[-1]), *packed)
    return out.view(*x.shape[:-1], out.shape[1])


def unpacked_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """x (M, K) times a weight that is unpacked a chunk of rows at a time, on any device and from any layout."""
    if _batch_invariant:
        raise RuntimeError(
            f"batch-invariant results are asked for (lowbit.set_batch_invariant), which only float16 and bfloat16 "
            f"layers on a CUDA device have, not {x.dtype} on {x.device} in the layout {layout!r}"
        )
    if layout != CUDA_TILES:
        return cpu.linear(x, weight, scales, zeros, bias, bits=bits, group_size=group_size, layout=layout)
    (m, k), n = x.shape, scales.shape[1]
    out = x.new_empty(m, n)
    units = max(1, _CHUNK // (16 * k))
    for a in range(0, weight.shape[0], units):
        rows = slice(16 * a, 16 * (a + units))
        scale, zero = scales[:, rows].contiguous(), None if zeros is None else zeros[:, rows].contiguous()
        disk = to_disk(weight[a : a + units], scale, zero, bits=bits, k=k, layout=CUDA_TILES)
        of_rows = None if bias is None else bias[rows]
        out[:, rows] = cpu.linear(x, *disk, of_rows, bits=bits, group_size=group_size, layout=DISK)
    return out


@functools.cache
def _weight_only_matmul() -> Callable[..., Tensor]:
    from lowbit_kernels.weight_only import weight_only_matmul  # needs triton, which some machines do not have

    return weight_only_matmul


@functools.cache
def int8_kernel() -> Callable[..., Tensor]:
    """``lowbit_kernels.int8.int8_linear``, imported when it is first needed."""
    from lowbit_kernels.int8 import int8_linear

    return int8_linear


@functools.cache
def grouped_kernel() -> Callable[..., Tensor]:
    """``lowbit_kernels.grouped.grouped_matmul``, imported when it is first needed."""
    from lowbit_kernels.grouped import grouped_matmul

    return grouped_matmul


@functools.cache
def grouped_int8_kernel() -> Callable[..., Tensor]:
    """``lowbit_kernels.grouped_int8.grouped_int8_linear``, imported when it is first needed."""
    from lowbit_kernels.grouped_int8 import grouped_int8_linear

    return grouped_int8_linear


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether lowbit_kernels/grouped.py and grouped_int8.py run on a CUDA device."""
    from lowbit_kernels.grouped_tiles import MIN_ARCH
    from lowbit_kernels.weight_only import device_arch

    return device_arch(device) >= MIN_ARCH


@functools.cache
def _warn_of_the_disk_layout() -> None:
    warnings.warn(
        "a packed weight in the disk layout is unpacked for every call on CUDA; QuantLinear.repack() (or lowbit.load) "
        "puts it into the layout that the kernels read",
        stacklevel=2,
    )


def aligned_rows(x: Tensor) -> Tensor:
    """x as ``(M, K)``, contiguous and aligned as the kernels read it; x itself where it is so already."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    flat = flat.contiguous()
    return flat.clone() if flat.data_ptr() % 16 else flat


def _forward_cuda(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    if layout == CUDA_TILES and x.dtype in HALVES and x.ndim and scales.ndim == 2:  # the kernels check the rest
        flat, n = aligned_rows(x), scales.shape[1]
        how: dict[str, Any] = {"bits": bits, "group_size": group_size, "n": n, "batch_invariant": _batch_invariant}
        out = _weight_only_matmul()(flat, weight, scales, zeros, bias, **how)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], n)
    out = _forward_unpacked(x, weight, scales, zeros, bias, bits, group_size, layout)
    if layout == DISK and x.dtype in HALVES:
        _warn_of_the_disk_layout()
    return out


def _fake(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    check_packed(x, weight, scales, *rest)
    return x.new_empty(*x.shape[:-1], rows_of(scales, layout=rest[-1]))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, zeros, bias, ctx.bits, ctx.group_size, ctx.layout = inputs
    ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(weight, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[2]:
        raise RuntimeError("lowbit::packed_linear has no gradient for scales: a packed weight is frozen")
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        how = (ctx.bits, ctx.group_size, ctx.layout, ctx.k)
        of_x = torch.ops.lowbit.packed_linear_backward(grad, *ctx.saved_tensors, *how)
    if ctx.needs_input_grad[4]:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, None, None, of_bias, None, None, None


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    k: int,
) -> Tensor:
    """``grad (..., N) @ W``, ``(..., K)`` in grad's dtype, with the numerics of cpu.linear, on any device.

    Needs memory for one more copy of the packed weight where it is not in the disk layout.
    """
    words, scales, zeros = to_disk(weight, scales, zeros, bits=bits, k=k, layout=layout)
    flat = grad.reshape(-1, grad.shape[-1])
    out = cpu.input_gradient(flat, words, scales, zeros, bits=bits, group_size=group_size, k=k)
    return out.view(*grad.shape[:-1], k)


register(
    "packed_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
    "str layout) -> Tensor",
    cpu=_forward_unpacked,
    cuda=_forward_cuda,
    fake=_fake,
    save=_save_weight,
    backward=_backward,
)
register_gradient(
    "packed_linear_backward(Tensor grad, Tensor weight, Tensor scales, Tensor? zeros, int bits, int group_size, "
    "str layout, SymInt k) -> Tensor",
    anywhere=input_gradient,
    fake=lambda grad, *rest: grad.new_empty(*grad.shape[:-1], rest[-1]),
)

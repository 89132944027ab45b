"""Activations to int8: one scale per token (dynamic), or one for all (static).

| tensor   | shape  | dtype            | order                                                     |
|----------|--------|------------------|-----------------------------------------------------------|
| x        | (M, K) | fp16, bf16, fp32 | contiguous                                                |
| static   | 1 element or (M,) | fp16, bf16, fp32 or None | one scale for all tokens, or one given for each |
| x_q      | (M, K) | int8             | contiguous                                                |
| x_scale  | (M,)   | fp32             | contiguous                                                |
| row_sums | (M,)   | int32, or None   | sum of x_q over k, for weights with a zero                |

    dynamic    x_scale[m] = max(absmax(x[m]), 2**-100) / 127     x_q = rint(x * (127 / max(absmax, 2**-100)))
    static     x_scale[m] = static                               x_q = rint(clamp(x * (1 / static), -128, 127))

rint rounds ties to even. Every operation is one IEEE fp32 operation (no contraction to fused multiply-add), so a
CPU gets the same integers. A row of zeros has codes 0 and the tiny positive scale that the floor gives.

Not a number: a token with a NaN, and with dynamic scales one with an infinity, gets x_scale NaN and codes 0, so its
row of a matmul is NaN and no other row changes. A static scale saturates infinities; a static scale that is not finite
and positive makes every x_scale NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase
from .checks import FLOATS, check_device
from .overlap import launch_options, let_next_begin, wait_for_previous
from .tiles import PDL_ARCH
from .weight_only import device_arch

__all__ = ["compile_cases", "quantize_activations", "quantize_activations_reference"]

LARGEST_BLOCK = 16384
"""Columns of a token that one program holds in registers; longer tokens are read twice."""
SMALLEST_MAXIMUM = 2.0**-100
"""127 / this is finite in fp32, and no activation that matters is as small."""


@triton.jit
def _to_int8(values):
    """fp32 in (-128.5, 127.5) -> the nearest integer, ties to even.

    Adding 1.5 * 2**23 moves the number to where fp32 is spaced by one; the low byte of the sum is the integer.
    """
    return (values + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _load_row(x_ptr, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    if K % BLOCK == 0:
        return tl.load(x_ptr + columns).to(tl.float32)
    return tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit
def _quantize_kernel(
    x_ptr,  # (M, K)
    static_ptr,  # one element, or (M,) with PER_TOKEN; unused unless STATIC
    q_ptr,  # (M, K)
    scale_ptr,  # (M,)
    sums_ptr,  # (M,), unused unless HAS_SUMS
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STATIC: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token per program."""
    if PDL:
        wait_for_previous()
        let_next_begin()
    INFINITY: tl.constexpr = float("inf")
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    q_ptr += row * K
    lanes = tl.arange(0, BLOCK)
    kept = _load_row(x_ptr, lanes, K, BLOCK)
    if STATIC:
        if PER_TOKEN:
            static_ptr += row
        given = tl.load(static_ptr).to(tl.float32)
        valid = (given > 0.0) & (given < INFINITY)
        inverse = tl.where(valid, tl.div_rn(1.0, tl.where(valid, given, 1.0)), 0.0)
        scale = tl.where(valid, given, float("nan"))
    else:
        tops = tl.abs(kept)
        tops = tl.where(tops < INFINITY, tops, INFINITY)  # a NaN compares false
        for start in tl.static_range(BLOCK, K, BLOCK):
            more = tl.abs(_load_row(x_ptr, start + lanes, K, BLOCK))
            tops = tl.maximum(tops, tl.where(more < INFINITY, more, INFINITY))
        top = tl.maximum(tl.max(tops, axis=0), 2.0**-100)
        valid = top < INFINITY
        inverse = tl.where(valid, tl.div_rn(127.0, top), 0.0)
        scale = tl.where(valid, tl.div_rn(top, 127.0), float("nan"))
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    wrong = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in tl.static_range(0, K, BLOCK):
        columns = start + lanes
        x = kept
        if start > 0:
            x = _load_row(x_ptr, columns, K, BLOCK)
        if STATIC:
            wrong += (x != x).to(tl.int32)
            bounded = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0) * inverse, -128.0), 127.0)
            q = _to_int8(bounded)
        else:
            q = _to_int8(tl.where(tl.abs(x) < INFINITY, x, 0.0) * inverse)
        tl.store(q_ptr + columns, q, mask=columns < K)
        if HAS_SUMS:
            total += q.to(tl.int32)  # columns past K are zeros
    if STATIC:
        scale = tl.where(tl.max(wrong, axis=0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    if HAS_SUMS:
        tl.store(sums_ptr + row, tl.sum(total, axis=0))


def quantize_activations_reference(x: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas in plain torch: ``(x_q, x_scale, row_sums)``, equal to the kernel's, bit for bit."""
    wide = x.float()
    finite = wide.isfinite()
    if static is None:
        top = torch.where(finite, wide.abs(), torch.inf).amax(1).clamp(min=SMALLEST_MAXIMUM)
        valid = top.isfinite()
        most = torch.full_like(top, 127.0)  # 127.0 / top would be a reciprocal and a product, two roundings
        inverse = torch.where(valid, most / top, 0.0)
        scale = torch.where(valid, top / most, torch.nan)
        scaled = torch.where(finite, wide, 0.0) * inverse[:, None]
    else:
        given = static.float().reshape(-1)
        valid = (given > 0) & given.isfinite()
        inverse = torch.where(valid, given.reciprocal(), 0.0)[:, None]
        numbers = ~wide.isnan().any(1) & valid
        scale = torch.where(numbers, given, torch.nan)
        scaled = (torch.where(wide.isnan(), 0.0, wide) * inverse).nan_to_num(0.0, torch.inf, -torch.inf)
    codes = scaled.clamp(-128, 127).round().to(torch.int8)
    return codes, scale, codes.sum(1, dtype=torch.int32)


def quantize_activations(
    x: Tensor, static: Tensor | None = None, *, sums: bool = False, pdl: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(x_q, x_scale, row_sums or None)`` for activations x (M, K); see the module's table.

    Args:
        static: the per-tensor scale, one element on x's device (it is read on the device: nothing waits), or (M,) given
            scales, where tokens go to different layers; None: one scale per token, of its own numbers.
        sums: whether to compute row_sums.
        pdl: launched to begin while the kernel before it on the stream ends (overlap.py); sm_90 and newer.

    Raises:
        ValueError: x is not a contiguous (M, K) of at least one column on a CUDA device (or on the CPU under
            ``TRITON_INTERPRET=1``), static is neither one element nor (M,) beside it, or pdl on a GPU without it.
    """
    if x.ndim != 2 or x.shape[1] < 1 or x.dtype not in FLOATS or not x.is_contiguous():
        raise ValueError(
            f"x must be a contiguous (M, K) in one of {FLOATS}, got {tuple(x.shape)} {x.dtype}, strides {x.stride()}"
        )
    check_device("x", x)
    fits = static is None or static.numel() == 1 or static.shape == x.shape[:1]
    if static is not None and (not fits or static.dtype not in FLOATS or static.device != x.device):
        raise ValueError(
            f"static must be one element or (M,) in one of {FLOATS} on {x.device}, "
            f"got {tuple(static.shape)} {static.dtype} on {static.device}"
        )
    if pdl and device_arch(x.device) < PDL_ARCH:
        raise ValueError(f"programmatic dependent launch needs sm_{PDL_ARCH}, got sm_{device_arch(x.device)}")
    m, k = x.shape
    x_q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    row_sums = torch.empty(m, dtype=torch.int32, device=x.device) if sums else None
    if m == 0:
        return x_q, x_scale, row_sums
    with torch.cuda.device_of(x):
        _quantize_kernel[(m,)](
            x,
            x if static is None else static.contiguous(),
            x_q,
            x_scale,
            x_scale if row_sums is None else row_sums,
            **_constants(k, static is not None, sums, per_token=static is not None and static.numel() > 1),
            PDL=pdl,
            num_warps=_warps(k),
            **launch_options(pdl, fuse=False),
        )
    return x_q, x_scale, row_sums


def _constants(k: int, static: bool, sums: bool, *, per_token: bool = False) -> dict[str, int | bool]:
    return {"K": k, "BLOCK": _block(k), "STATIC": static, "PER_TOKEN": per_token, "HAS_SUMS": sums}


def _block(k: int) -> int:
    return min(LARGEST_BLOCK, max(32, 1 << (k - 1).bit_length()))


def _warps(k: int) -> int:
    """Sixteen columns per thread: two loads of 16 bytes."""
    return max(1, min(16, _block(k) // 512))


def compile_cases() -> list[CompileCase]:
    """Short and long tokens; dynamic, static, and static with a scale given for each token."""
    cases = []
    for k, static, sums, dtype, per_token in (
        (4096, False, False, "bf16", False),
        (28672, False, True, "fp16", False),
        (14336, True, True, "bf16", False),
        (2048, True, False, "bf16", True),
    ):
        constexprs = {**_constants(k, static, sums, per_token=per_token), "PDL": False}
        pointers = {"x_ptr": dtype, "static_ptr": dtype, "q_ptr": "i8", "scale_ptr": "fp32", "sums_ptr": "i32"}
        cases.append(
            CompileCase(
                name=f"{dtype} k{k} {'static' if static else 'dynamic'}{' per token' if per_token else ''}",
                kernel=_quantize_kernel,
                signature={name: f"*{kind}" for name, kind in pointers.items()}
                | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                divisible=tuple(pointers),
                options={"num_warps": _warps(k), **launch_options(fuse=False)},
                kind="quantize",
                wide_copies=False,
            )
        )
    return cases

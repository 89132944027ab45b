"""out[i] = x[i] @ W[e].T + bias[e] for rows sorted by expert, everything in int8: E weights of one shape, one launch.

| tensor   | shape     | dtype            | order                                                          |
|----------|-----------|------------------|----------------------------------------------------------------|
| x_q      | (M, K)    | int8             | contiguous; int8_quantize.py makes it                          |
| x_scale  | (M,)      | fp32             | contiguous, one per row                                        |
| ends, slots | (E,)   | int32, slots or None | contiguous; grouped_routing.py                             |
| w_q      | (S, N, K) | int8             | contiguous                                                     |
| w_scale  | (S, N)    | fp16, bf16, fp32 | contiguous, one per output channel                             |
| w_zero   | (S, N)    | int8, or None    | contiguous; None: symmetric                                    |
| row_sums | (M,)      | int32            | sum of x_q over k; only with w_zero                            |
| bias     | (S, N)    | fp16, bf16, fp32, or None | contiguous                                            |
| out      | (M, N)    | fp16, bf16, fp32 | contiguous; zeros where no weight is an expert's               |

Sums are exact in int32 and become numbers as in int8.py, by the same code (int8_product.py): row i of the result has
the bits that int8.py gives it for row i of x and the expert's weight alone, whatever the tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase
from .epilogue import store_tile, tile_origin
from .grouped_routing import (
    check_routing,
    routed_case,
    routing_constants,
    rows_by_weight,
    tile_of_rows,
    token_tiles,
    weight_of_rows,
)
from .grouped_tiles import MIN_ARCH, grouped_int8_tile
from .int8 import check_int8, compile_case, int8_constants, int8_matmul_reference
from .int8_product import int8_product, scaled
from .int8_quantize import quantize_activations
from .int8_tiles import TILES, Int8Tile, why_not
from .overlap import launch_options, let_next_begin, wait_for_previous
from .table import uses_pdl
from .tiles import cdiv
from .weight_only import device_arch, gpu_name

__all__ = [
    "compile_cases",
    "grouped_int8_linear",
    "grouped_int8_matmul",
    "grouped_int8_reference",
]


@triton.jit(do_not_specialize=["TOKEN_TILES"])  # it differs from call to call
def grouped_int8_kernel(
    x_ptr,  # (M, K)
    ends_ptr,  # (EXPERTS,) int32
    slots_ptr,  # (EXPERTS,) int32, unused unless HAS_SLOTS
    w_ptr,  # (WEIGHTS, N, K)
    x_scale_ptr,  # (M,)
    w_scale_ptr,  # (WEIGHTS, N)
    zero_ptr,  # (WEIGHTS, N), unused unless HAS_ZEROS
    sums_ptr,  # (M,), likewise
    bias_ptr,  # (WEIGHTS, N), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    M,
    N,
    TOKEN_TILES,  # the grid has so many times ceil(N / BLOCK_N) programs
    EXPERTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,  # 1
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of out, of one expert, per program."""
    if PDL:  # which weight to prefetch is not known before the routing has ended
        wait_for_previous()
        let_next_begin()
    place, row = tile_origin(tl.program_id(0), TOKEN_TILES * BLOCK_M, N, BLOCK_M, BLOCK_N)
    index = (place // BLOCK_M).to(tl.int32)
    weight, token, end = tile_of_rows(
        ends_ptr, slots_ptr, index, M, EXPERTS, WEIGHTS, BLOCK_E, HAS_SLOTS, BLOCK_M
    )  # fmt: skip
    if weight >= 0:
        rows = weight.to(tl.int64) * N
        total = int8_product(
            x_ptr, w_ptr + rows * K, token, row, end, tl.program_id(1), N, K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
            STAGES,
        )  # fmt: skip
        out = scaled(total, x_scale_ptr, w_scale_ptr + rows, zero_ptr + rows, sums_ptr, token, row, end, N, HAS_ZEROS)
        store_tile(out, bias_ptr + rows, out_ptr, token, row, end, N, HAS_BIAS)
    elif weight == -1:
        nothing = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        store_tile(nothing, bias_ptr, out_ptr, token, row, end, N, False)


def grouped_int8_reference(
    x_q: Tensor,
    x_scale: Tensor,
    ends: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    w_zero: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch, exact sums in int64, scales in float64: ``out (M, N)`` float64."""
    out = torch.zeros(x_q.shape[0], w_q.shape[1], dtype=torch.float64, device=x_q.device)
    for e, rows in rows_by_weight(ends, slots):
        offset, zero = (None if tensor is None else tensor[e] for tensor in (bias, w_zero))
        out[rows] = int8_matmul_reference(x_q[rows], x_scale[rows], w_q[e], w_scale[e], offset, w_zero=zero)
    return out


def _tile(asked: Int8Tile | None, experts: int, m: int, n: int, k: int, arch: int, name: str | None) -> Int8Tile:
    """The tile that was asked for, if it fits, or the one to run with."""
    chosen = grouped_int8_tile(m, experts, arch, gpu_name=name)  # which refuses what is too old
    if asked is None:
        return chosen
    reason = why_not(asked, m, n, k, arch)
    if reason is None and (asked.family != "triton" or asked.split_k != 1):
        reason = "experts share the grid: family triton and split_k 1"
    if reason is not None:
        raise ValueError(f"{asked} cannot multiply ({m}, {k}) by {experts} x ({n}, {k}) on sm_{arch}: {reason}")
    return asked


def grouped_int8_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ends: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    w_zero: Tensor | None = None,
    row_sums: Tensor | None = None,
    slots: Tensor | None = None,
    tile: Int8Tile | None = None,
) -> Tensor:
    """``out (M, N)`` in ``out_dtype``; see the module's table for shapes and dtypes.

    Args:
        tile: without split_k; None takes :func:`~lowbit_kernels.grouped_tiles.grouped_int8_tile`'s.

    Raises:
        ValueError: as :func:`~lowbit_kernels.int8.int8_matmul`, for any tensor of the table, or split_k. The values in
            ``ends`` and ``slots`` are not looked at.
    """
    stacks = {"w_q": w_q, "w_scale": w_scale, "w_zero": w_zero, "bias": bias}
    check_routing(x_q, ends, slots, stacks)
    offset, zero = (None if tensor is None else tensor[0] for tensor in (bias, w_zero))
    check_int8(x_q, x_scale, w_q[0], w_scale[0], offset, zero, row_sums, out_dtype)
    (m, k), n, arch = x_q.shape, w_q.shape[1], device_arch(x_q.device)
    tile = _tile(tile, len(ends), m, n, k, arch, gpu_name(x_q.device))
    out = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if m == 0:
        return out
    rows = token_tiles(m, len(ends), tile.block_m)
    with torch.cuda.device_of(x_q):  # Triton launches on the current device, which need not be x's
        grouped_int8_kernel[(rows * cdiv(n, tile.block_n), 1)](
            x_q,
            ends,
            ends if slots is None else slots,  # here and below: an argument that the kernel does not read
            w_q,
            x_scale,
            w_scale,
            x_q if w_zero is None else w_zero,
            x_q if row_sums is None else row_sums,
            x_scale if bias is None else bias,
            out,
            M=m,
            N=n,
            TOKEN_TILES=rows,
            **routing_constants(len(ends), len(w_q), slots is not None),
            **int8_constants(k, tile, w_zero is not None, bias is not None),
            PDL=tile.pdl,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch_options(tile.pdl),
        )
    return out


def grouped_int8_linear(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Quantize x (M, K) fp16, bf16 or fp32 and multiply: two launches, and a few small ones for static scales.

    Args:
        input_scale: ``(S,)``, the static scale that each weight's inputs are quantized with, or None for one per row.

    Returns:
        ``(M, N)`` in x's dtype.

    Raises:
        ValueError: as for the two functions, or input_scale does not hold one scale per weight.
    """
    static = input_scale
    if input_scale is not None:
        check_routing(x, ends, slots, {"w_q": w_q, "input_scale": input_scale})
        static = input_scale[weight_of_rows(ends, slots, x.shape[0])]
    pdl = uses_pdl(device_arch(x.device), gpu_name(x.device))
    x_q, x_scale, row_sums = quantize_activations(x, static, sums=w_zero is not None, pdl=pdl)
    how: dict[str, Any] = {"out_dtype": x.dtype, "w_zero": w_zero, "row_sums": row_sums, "slots": slots}
    return grouped_int8_matmul(x_q, x_scale, ends, w_q, w_scale, bias, **how)


def compile_cases() -> list[CompileCase]:
    """A narrow and a wide tile on every architecture, and weights with zeros and slots."""
    few, many = TILES[0], Int8Tile(128, 128, 128, 1, 8, 3)
    return [_case(few, "bf16", False), _case(few, "fp16", True), _case(many, "bf16", False)]


def _case(tile: Int8Tile, name: str, asymmetric: bool) -> CompileCase:
    """With zeros not all of the experts have a weight."""
    case = compile_case(tile, name, 1, asymmetric)
    case = replace(case, archs=tuple(arch for arch in case.archs if arch >= MIN_ARCH))
    return routed_case(case, grouped_int8_kernel, "grouped int8", has_slots=asymmetric)

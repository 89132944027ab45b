"""out = x @ W.T + bias with both operands in int8: ``x = x_q * x_scale``, ``W = (w_q - w_zero) * w_scale``.

| tensor   | shape  | dtype            | order                                                          |
|----------|--------|------------------|----------------------------------------------------------------|
| x_q      | (M, K) | int8             | contiguous; int8_quantize.py makes it                          |
| x_scale  | (M,)   | fp32             | contiguous, one per token                                      |
| w_q      | (N, K) | int8             | contiguous: as in a compressed-tensors int-quantized file      |
| w_scale  | (N,)   | fp16, bf16, fp32 | contiguous, one per output channel                             |
| w_zero   | (N,)   | int8, or None    | contiguous; None: symmetric                                    |
| row_sums | (M,)   | int32            | sum of x_q over k; only with w_zero                            |
| bias     | (N,)   | fp16, bf16, fp32, or None | contiguous                                            |
| out      | (M, N) | fp16, bf16, fp32 | contiguous                                                     |

M may be 0, N and K are any (largest_k says where int32 could overflow). Rows of a K that is no multiple of 16 do not
start at 16 bytes, so they are read in narrower pieces: right, and slower.

Numerics. ``sum_k x_q * w_q - w_zero * row_sums`` is exact in int32, whatever the order: programs that share the columns
of a tile (split_k) publish int32 sums, and the last to arrive adds them. No float atomics, the same bits on every run,
and row i of the result depends on no other row. Then, in fp32, ``sum * x_scale * w_scale + bias``, and one rounding.

The weight is the left operand (``out.T = W @ x.T``), as in weight_only.py: a program reads it once for all its tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import ARCHITECTURES, CompileCase
from .checks import FLOATS, check_device, check_tensor
from .epilogue import last_to_arrive, store_tile, tile_origin, workspace
from .int8_product import int8_product, scaled
from .int8_quantize import quantize_activations
from .int8_tiles import TILES, Int8Tile, largest_k, pick_tile, shared_bytes, why_not
from .overlap import launch_options, let_next_begin, prefetch, wait_for_previous
from .releases import gluon_missing
from .table import uses_pdl
from .tiles import cdiv
from .weight_only import device_arch, gpu_name

__all__ = ["Int8Tile", "compile_cases", "int8_linear", "int8_matmul", "int8_matmul_reference", "quantize_activations"]


@triton.jit
def _sum_of_partials(
    partials_ptr, counters_ptr, tile, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """All int32 partial sums of a tile; its counter is 0 again for the next launch."""
    place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    base = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for split in tl.range(0, SPLIT_K):
        # past the first-level cache, which may hold what was here before
        total += tl.load(base + split * (BLOCK_N * BLOCK_M) + place, cache_modifier=".cg")
    tl.store(counters_ptr + tile, 0)
    return total


@triton.jit
def _int8_matmul_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    x_scale_ptr,  # (M,)
    w_scale_ptr,  # (N,)
    zero_ptr,  # (N,), unused unless HAS_ZEROS
    sums_ptr,  # (M,), likewise
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    partials_ptr,  # (output tiles, SPLIT_K, BLOCK_N, BLOCK_M) int32, unused unless SPLIT_K > 1
    counters_ptr,  # (output tiles,) int32 zeros, likewise; zeros again afterwards
    M,
    N,
    K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns [split] of one (BLOCK_M, BLOCK_N) tile of out per program."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token, row = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
    if PDL:
        begin = split * ((K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)) * BLOCK_K
        prefetch(w_ptr, row, N - 1, K, begin, K - 1, BLOCK_N, 512)
        wait_for_previous()
        let_next_begin()
    acc = int8_product(x_ptr, w_ptr, token, row, M, split, N, K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, STAGES)
    if SPLIT_K == 1:
        out = scaled(acc, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, token, row, M, N, HAS_ZEROS)
        store_tile(out, bias_ptr, out_ptr, token, row, M, N, HAS_BIAS)
    elif last_to_arrive(acc, partials_ptr, counters_ptr, tile, split, SPLIT_K):
        total = _sum_of_partials(partials_ptr, counters_ptr, tile, SPLIT_K, BLOCK_N, BLOCK_M)
        out = scaled(total, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, token, row, M, N, HAS_ZEROS)
        store_tile(out, bias_ptr, out_ptr, token, row, M, N, HAS_BIAS)


def int8_matmul_reference(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    w_zero: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch, exact sums in int64, scales in float64: ``out (M, N)`` float64."""
    weight = w_q.long() - (0 if w_zero is None else w_zero.long()[:, None])
    total = (x_q.long() @ weight.t()).double()
    out = total * x_scale.double()[:, None] * w_scale.double()
    return out if bias is None else out + bias.double()


def int8_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    w_zero: Tensor | None = None,
    row_sums: Tensor | None = None,
    tile: Int8Tile | None = None,
) -> Tensor:
    """``out (M, N)`` in ``out_dtype``; see the module's table for shapes and dtypes.

    Args:
        tile: the tile to run with; None takes :func:`~lowbit_kernels.int8_tiles.pick_tile`'s.

    Raises:
        ValueError: a tensor is not on one CUDA device (or on the CPU under ``TRITON_INTERPRET=1``), a shape, dtype or
            stride contradicts the table, K is so long that int32 could overflow, the GPU is too old, or the requested
            tile does not fit.
    """
    check_int8(x_q, x_scale, w_q, w_scale, bias, w_zero, row_sums, out_dtype)
    (m, k), n, arch = x_q.shape, w_q.shape[0], device_arch(x_q.device)
    if tile is None:
        aligned = x_q.data_ptr() % 16 == w_q.data_ptr() % 16 == 0
        tile = pick_tile(m, n, k, arch, gpu_name(x_q.device), aligned and gluon_missing() is None)
    elif (reason := why_not(tile, m, n, k, arch)) is not None:
        raise ValueError(f"{tile} cannot multiply ({m}, {k}) by ({n}, {k}) on sm_{arch}: {reason}")
    out = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if m:
        with torch.cuda.device_of(x_q):  # Triton launches on the current device, which need not be x's
            _launch(x_q, x_scale, w_q, w_scale, bias, w_zero, row_sums, out, tile)
    return out


def _launch(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_zero: Tensor | None,
    row_sums: Tensor | None,
    out: Tensor,
    tile: Int8Tile,
) -> None:
    if tile.family == "gluon":
        from .int8_hopper import launch

        launch(x_q, x_scale, w_q, w_scale, bias, w_zero, row_sums, out, tile)
        return
    (m, k), n = x_q.shape, w_q.shape[0]
    count = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    partials = counters = x_q  # an argument that the kernel does not read
    if tile.split_k > 1:
        floats, counters = workspace(count, tile.split_k, tile.block_m * tile.block_n, x_q.device)
        partials = floats.view(torch.int32)
    _int8_matmul_kernel[(count, tile.split_k)](
        x_q,
        w_q,
        x_scale,
        w_scale,
        x_q if w_zero is None else w_zero,
        x_q if row_sums is None else row_sums,
        x_scale if bias is None else bias,
        out,
        partials,
        counters,
        M=m,
        N=n,
        **int8_constants(k, tile, w_zero is not None, bias is not None),
        PDL=tile.pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(tile.pdl),
    )


def int8_linear(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    *,
    tile: Int8Tile | None = None,
) -> Tensor:
    """Quantize x (M, K) fp16, bf16 or fp32 and multiply: two launches. ``(M, N)`` in x's dtype.

    Args:
        input_scale: the static per-tensor scale (one element), or None for one scale per token.
        tile: the matmul's; None takes :func:`~lowbit_kernels.int8_tiles.pick_tile`'s.

    Raises:
        ValueError: as for the two functions.
    """
    pdl = uses_pdl(device_arch(x.device), gpu_name(x.device)) if tile is None else tile.pdl
    x_q, x_scale, row_sums = quantize_activations(x, input_scale, sums=w_zero is not None, pdl=pdl)
    return int8_matmul(x_q, x_scale, w_q, w_scale, bias, out_dtype=x.dtype, w_zero=w_zero, row_sums=row_sums, tile=tile)


def int8_constants(k: int, tile: Int8Tile, has_zeros: bool, has_bias: bool) -> dict[str, Any]:
    """Constexpr arguments of the kernel: the same for a launch and for compiling ahead of one."""
    return {
        "K": k,
        "HAS_ZEROS": has_zeros,
        "HAS_BIAS": has_bias,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SPLIT_K": tile.split_k,
        "STAGES": tile.num_stages,
    }


def check_int8(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_zero: Tensor | None,
    row_sums: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Compare with the module's table. ValueError names the first contradiction."""
    if x_q.ndim != 2 or w_q.ndim != 2:
        raise ValueError(f"x_q must be (M, K) and w_q (N, K), got {tuple(x_q.shape)} and {tuple(w_q.shape)}")
    (m, k), n = x_q.shape, w_q.shape[0]
    limit = largest_k(w_zero is not None)
    if n < 1 or not 1 <= k <= limit:
        raise ValueError(f"N must be at least 1 and K from 1 to {limit} (int32 sums), got N = {n}, K = {k}")
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be one of {FLOATS}, got {out_dtype}")
    if (w_zero is None) != (row_sums is None):
        raise ValueError("row_sums must be given with w_zero, and only then")
    check_device("x_q", x_q)
    device = x_q.device
    check_tensor("x_q", x_q, (m, k), (torch.int8,), device)
    check_tensor("x_scale", x_scale, (m,), (torch.float32,), device)
    check_tensor("w_q", w_q, (n, k), (torch.int8,), device)
    check_tensor("w_scale", w_scale, (n,), FLOATS, device)
    if w_zero is not None and row_sums is not None:
        check_tensor("w_zero", w_zero, (n,), (torch.int8,), device)
        check_tensor("row_sums", row_sums, (m,), (torch.int32,), device)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, device)


def compile_cases() -> list[CompileCase]:
    """Every tile once, alone and shared, and for one of them each kind of weight and result."""
    few, many = TILES[0], TILES[-1]
    cases = [compile_case(tile, "bf16", 1, False) for tile in TILES]
    cases += [compile_case(few, "bf16", 4, False), compile_case(replace(few, pdl=True), "fp16", 4, True)]
    cases += [compile_case(many, "fp16", 1, True)]
    return cases


def compile_case(tile: Int8Tile, name: str, split_k: int, asymmetric: bool) -> CompileCase:
    """A compilation of this file's kernel, for all that may run it; grouped_int8.py changes what is different there."""
    tile = replace(tile, split_k=split_k)
    constexprs = {**int8_constants(4096, tile, asymmetric, True), "PDL": tile.pdl}
    pointers = {
        "x_ptr": "i8",
        "w_ptr": "i8",
        "x_scale_ptr": "fp32",
        "w_scale_ptr": name,
        "zero_ptr": "i8",
        "sums_ptr": "i32",
        "bias_ptr": name,
        "out_ptr": name,
        "partials_ptr": "i32",
        "counters_ptr": "i32",
    }
    signature = {key: f"*{kind}" for key, kind in pointers.items()} | {"M": "i32", "N": "i32"}
    archs = tuple(a for a in ARCHITECTURES if why_not(tile, 4 * tile.block_m, 4096, 4096, a) is None)
    return CompileCase(
        name=f"{name} {'asym' if asymmetric else 'sym'} {tile}",
        kernel=_int8_matmul_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, "N"),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        kind="int8",
        archs=archs,
        tokens=tile.block_m,
        wgmma="shared",
        extra={"shared_bound": shared_bytes(tile)},
    )

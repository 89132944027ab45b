"""out = x @ W.T + bias for a weight in the GPU layout: ``W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n]``.

| tensor | shape                      | dtype               | order                                             |
|--------|----------------------------|---------------------|---------------------------------------------------|
| x      | (M, K)                     | fp16, bf16          | contiguous, 16-byte aligned                       |
| tiles  | (ceil(N / 16), U, 16, 16)  | int32               | contiguous, 16-byte aligned; layout.py            |
| scales | (G, N)                     | fp16, bf16, fp32    | contiguous; g = k / group_size                    |
| zeros  | (G, N)                     | uint8 or None       | contiguous; None: symmetric, zero = 2**(bits - 1) |
| bias   | (N,)                       | fp16, bf16, fp32 or None | contiguous                                   |
| out    | (M, N)                     | as x                | contiguous                                        |

M may be 0; N and K need not be multiples of anything. group_size is 32, 64, 128 (and divides K) or -1 (G = 1).

Numerics. The tensor cores multiply the exact integers ``raw = code + RAW`` (unpack.py) with x, a fresh dot product for
each run of columns that shares a scale (at most 128), and with S the sum of x over them

    out[m, n] = sum_runs scale[n] * (sum_k raw[n, k] * x[m, k]  -  (RAW + zero[n]) * S[m]) + bias[n]

in fp32, one rounding at the end. No weight is rounded, and a zero costs one multiplication per run, not per weight.

Order of sums. One program adds its runs in the order of k. With ``split_k`` several programs share the columns: each
stores its fp32 tile, and the one that arrives last adds all of them in the order of k. An integer counter says who is
last; there are no float atomics, so the same input gives the same bits on every run. Rows of x never mix, so with one
and the same tile row i of the result does not depend on M either: that is all that ``batch_invariant`` fixes.

The weight is the left operand (``out.T = W @ x.T``): a program reads each word once, and tokens, few in decoding, are
the operand that the tensor cores allow to be narrow.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_arguments
from .epilogue import last_to_arrive, store_tile, sum_of_partials, tile_origin, workspace
from .layout import from_tiles, tiles_shape
from .operands import NO_SUMS, SUMS_BY_ADDS, SUMS_BY_DOT, SUMS_LOADED
from .overlap import launch_options, let_next_begin, prefetch_weight, wait_for_previous
from .product import tile_product
from .releases import LEAST_WGMMA, gluon_missing, wide_enough
from .run_sums import loaded_sums
from .tiles import Problem, Tile, cdiv, run_columns, step_columns, why_not
from .unpack import conversion, raw_offset

__all__ = [
    "constants",
    "device_arch",
    "gpu_name",
    "options",
    "weight_only_kernel",
    "weight_only_matmul",
    "weight_only_reference",
]


_REGISTERS = {
    (8, 1, 32): 128,
    (8, 2, 32): 168,
    (8, 4, 16): 168,
    (8, 4, 32): 168,
    (16, 2, 32): 208,
    (16, 4, 16): 208,
    (32, 1, 32): 240,
}
"""Registers per thread at most, by tokens, runs in a step and rows per warp. Left alone, ptxas spills up to 50 words in
these where more programs would then find room on a multiprocessor: it does not know that shared memory has none for
them. A limit, even one that is not reached, keeps it from that (README.md, the log of 2026-11-23)."""


@triton.jit
def weight_only_kernel(
    x_ptr,  # (M, K)
    tiles_ptr,  # (ceil(N / 16), UNITS, 16, 16)
    scales_ptr,  # (G, N)
    zeros_ptr,  # (G, N), unused unless HAS_ZEROS
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    sums_ptr,  # (steps * RUNS, M) fp32, unused unless SUMS is SUMS_LOADED
    partials_ptr,  # (output tiles, SPLIT_K, BLOCK_N, BLOCK_M) fp32, unused unless SPLIT_K > 1
    counters_ptr,  # (output tiles,) int32 zeros, likewise; zeros again afterwards
    M,
    N,
    K: tl.constexpr,  # a model has few distinct K, and constant trip counts cost no division
    UNITS: tl.constexpr,  # units along K
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns, or -1
    RUN: tl.constexpr,  # columns per dot product: they share a scale
    PART: tl.constexpr,  # columns of x per load: _columns_at_once
    RAW: tl.constexpr,
    PTX: tl.constexpr,  # conversion(...), or "" in the interpreter
    SUMS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FOR_MMA: tl.constexpr,  # mma.sync, not wgmma or tcgen05
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns [split] of one (BLOCK_M, BLOCK_N) tile of out per program; one unit of every weight row per step."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token, row = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
    if PDL:
        begin = split * ((UNITS + SPLIT_K - 1) // SPLIT_K)
        prefetch_weight(
            tiles_ptr, scales_ptr, zeros_ptr, row, begin, N, K, UNITS, BITS, GROUP, HAS_ZEROS, BLOCK_N
        )  # fmt: skip
        wait_for_previous()
        let_next_begin()
    tokens_left = tl.minimum(M - token, BLOCK_M).to(tl.int32)
    acc = tile_product(
        x_ptr, tiles_ptr, scales_ptr, zeros_ptr, sums_ptr, token, row, tokens_left, split, M, N, K, UNITS, BITS, GROUP,
        RUN, PART, RAW, PTX, SUMS, HAS_ZEROS, BLOCK_M, BLOCK_N, SPLIT_K, FOR_MMA, STAGES,
    )  # fmt: skip
    if SPLIT_K == 1:
        store_tile(acc, bias_ptr, out_ptr, token, row, M, N, HAS_BIAS)
    elif last_to_arrive(acc, partials_ptr, counters_ptr, tile, split, SPLIT_K):
        total = sum_of_partials(partials_ptr, counters_ptr, tile, SPLIT_K, BLOCK_N, BLOCK_M)
        store_tile(total, bias_ptr, out_ptr, token, row, M, N, HAS_BIAS)


def weight_only_reference(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """The formula in plain torch, in float64, from the same tensors: ``out (M, N)`` float64."""
    k, n = x.shape[1], scales.shape[1]
    words, scale, _ = from_tiles(tiles, scales, None, bits, k)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :k].double()
    size = k if group_size == -1 else group_size
    zero = 2 ** (bits - 1) if zeros is None else zeros.t().double().repeat_interleave(size, 1)
    weight = (codes - zero) * scale.double().repeat_interleave(size, 1)
    out: Tensor = x.double() @ weight.view(n, k).t()
    return out if bias is None else out + bias.double()


@cache
def device_arch(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 80 for any other, which only Triton's interpreter runs on."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def gpu_name(device: torch.device) -> str | None:
    """The driver's name of a CUDA device; None for any other, which only Triton's interpreter runs on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _columns_at_once(problem: Problem, tile: Tile, wgmma: bool) -> int:
    """Columns of x that one load brings: a run's, wherever those are 16 bytes for each thread.

    Where they are fewer, mma.sync takes all columns of the step and splits them in registers, where wgmma, which reads
    x from shared memory, cannot. With more tokens the whole step does not fit into the registers: at 4 bits and 64
    tokens it is 128 of them, and up to 840 bytes were spilled.
    """
    run = run_columns(problem.bits, problem.group_size)
    enough = tile.block_m * run * 2 >= 16 * 32 * tile.num_warps
    return run if wgmma or enough else step_columns(problem.bits)


@lru_cache(maxsize=8192)  # a launch asks every time; nobody changes the answer
def constants(problem: Problem, tile: Tile, arch: int, *, has_bias: bool, interpreted: bool = False) -> dict[str, Any]:
    """Constexpr arguments of the kernel: the same for a launch and for compiling ahead of one.

    Sums of x are cheapest as a dot with ones where mma.sync has few tokens. With wgmma (and from 32 tokens on with
    mma.sync) a symmetric weight is cheaper to centre, and an asymmetric one gets sums from elsewhere: additions in the
    loop at up to 32 tokens of wgmma, which reads x from shared memory anyway.
    """
    bits, dtype = problem.bits, problem.dtype
    wgmma = arch // 10 == 9 and tile.block_m >= LEAST_WGMMA and tile.block_n >= 64 and tile.num_warps >= 4
    by_dot = tile.block_m <= 16 and not wgmma
    raw = raw_offset(bits, dtype, centred=False)
    if not problem.asymmetric and (not by_dot or raw < 0):
        sums, raw = NO_SUMS, raw_offset(bits, dtype, centred=True)
    elif by_dot:
        sums = SUMS_BY_DOT
    else:
        sums = SUMS_BY_ADDS if wgmma and tile.block_m <= 32 else SUMS_LOADED
    return {
        "K": problem.k,
        "UNITS": tiles_shape(problem.n, problem.k, bits)[1],
        "BITS": bits,
        "GROUP": problem.group_size,
        "RUN": run_columns(bits, problem.group_size),
        "PART": _columns_at_once(problem, tile, wgmma),
        "RAW": raw,
        "PTX": "" if interpreted else conversion(bits, dtype, centred=raw < 0),
        "SUMS": sums,
        "HAS_ZEROS": problem.asymmetric,
        "HAS_BIAS": has_bias,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT_K": tile.split_k,
        "FOR_MMA": not wgmma,
        "STAGES": tile.num_stages,
    }


def options(problem: Problem, tile: Tile) -> dict[str, int]:
    """Keywords of a launch with ``tile``, and of compiling ahead of one, beside :func:`launch_options`."""
    runs = step_columns(problem.bits) // run_columns(problem.bits, problem.group_size)
    limit = _REGISTERS.get((tile.block_m, runs, tile.block_n // tile.num_warps))
    limited = {"maxnreg": limit} if limit is not None else {}
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **limited}


def weight_only_matmul(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    tile: Tile | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x (M, K) @ W.T + bias`` for a packed ``W (n, K)``; see the module's table for shapes and dtypes.

    Args:
        bits: 2, 4 or 8.
        group_size: 32, 64, 128, or -1 for the whole row.
        n: rows of the weight: those of ``tiles`` are padded.
        tile: the tile to run with; None takes :func:`~lowbit_kernels.dispatch.choose`'s.
        batch_invariant: have the tile chosen without regard to M, so that row i of the result depends on row i of x
            alone, bit for bit. Ignored when ``tile`` is given.

    Returns:
        ``(M, n)`` in x's dtype, on x's device.

    Raises:
        ValueError: a tensor is not on one CUDA device (or on the CPU under ``TRITON_INTERPRET=1``), a shape, dtype,
            stride or address contradicts the table, the GPU is too old, or the requested tile does not fit.
    """
    problem = Problem(x.shape[0], n, x.shape[-1], bits, group_size, x.dtype, zeros is not None)
    arch = device_arch(x.device)
    check_arguments(x, tiles, scales, zeros, bias, problem, arch)
    if tile is None:
        from .dispatch import choose

        aligned = scales.data_ptr() % 16 == 0 and (zeros is None or zeros.data_ptr() % 16 == 0)
        hopper = aligned and gluon_missing() is None
        name = gpu_name(x.device)
        tile = choose(problem, arch, gpu_name=name, batch_invariant=batch_invariant, hopper=hopper)
    tile = wide_enough(tile) if tile.family == "triton" else tile
    reason = why_not(tile, problem, arch)
    if reason is not None:
        raise ValueError(f"{tile} cannot run {problem} on sm_{arch}: {reason}")
    if tile.family == "gluon":
        from .hopper import hopper_matmul

        return hopper_matmul(x, tiles, scales, zeros, bias, bits=bits, group_size=group_size, n=n, tile=tile)
    if tile.family == "scaled":
        from .scaled import scaled_matmul

        return scaled_matmul(x, tiles, scales, zeros, bias, bits=bits, group_size=group_size, n=n, tile=tile)
    if tile.family == "dequant":
        from .prefill import dequantized_matmul

        return dequantized_matmul(x, tiles, scales, zeros, bias, bits=bits, group_size=group_size, n=n)
    return _launch(x, tiles, scales, zeros, bias, problem, tile, arch)


def _launch(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    tile: Tile,
    arch: int,
) -> Tensor:
    m, n = problem.m, problem.n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    interpreted = bool(triton.knobs.runtime.interpret)
    constexprs = constants(problem, tile, arch, has_bias=bias is not None, interpreted=interpreted)
    count = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    partials = counters = sums = scales  # an argument that the kernel does not read
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        if tile.split_k > 1:
            partials, counters = workspace(count, tile.split_k, tile.block_m * tile.block_n, x.device)
        if constexprs["SUMS"] == SUMS_LOADED:
            sums = loaded_sums(x, problem.bits, constexprs["RUN"])
        weight_only_kernel[(count, tile.split_k)](
            x,
            tiles,
            scales,
            scales if zeros is None else zeros,
            scales if bias is None else bias,
            out,
            sums,
            partials,
            counters,
            M=m,
            N=n,
            **constexprs,
            PDL=tile.pdl,
            **options(problem, tile),
            **launch_options(tile.pdl),
        )
    return out

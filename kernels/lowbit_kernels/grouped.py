"""out[i] = x[i] @ W[e].T + bias[e] for rows sorted by expert: E weights of one shape, one launch.

| tensor | shape                         | dtype               | order                                              |
|--------|-------------------------------|---------------------|----------------------------------------------------|
| x      | (M, K)                        | fp16, bf16          | contiguous, 16-byte aligned                        |
| ends   | (E,)                          | int32               | contiguous; grouped_routing.py                     |
| tiles  | (E, ceil(N / 16), U, 16, 16)  | int32               | contiguous, 16-byte aligned; layout.py             |
| scales | (E, G, N)                     | fp16, bf16, fp32    | contiguous                                         |
| zeros  | (E, G, N)                     | uint8 or None       | contiguous                                         |
| bias   | (E, N)                        | fp16, bf16, fp32 or None | contiguous                                    |
| out    | (M, N)                        | as x                | contiguous; zeros where no weight is an expert's   |

M may be 0 and an expert may have no rows. ``ends`` and ``slots`` (E,), by which experts of several kinds share the
rows, are grouped_routing.py's; with slots the first axis of the weights is not E but their number S.

Numerics and order of sums are weight_only.py's without ``split_k``, by the same code (product.py): exact integers, a
fresh dot product per run of columns, fp32, one rounding, no atomics. Row i of the result depends on row i of x and its
expert alone, bit for bit, as long as the tile is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import ARCHITECTURES, CompileCase
from .checks import check_arguments
from .epilogue import store_tile, tile_origin
from .grouped_routing import check_routing, routed_case, routing_constants, rows_by_weight, tile_of_rows, token_tiles
from .grouped_tiles import MIN_ARCH, grouped_tile
from .operands import SUMS_LOADED
from .overlap import launch_options, let_next_begin, wait_for_previous
from .product import tile_product
from .releases import wide_enough
from .run_sums import loaded_sums
from .tiles import Problem, Tile, cdiv, why_not
from .weight_only import constants, device_arch, gpu_name, options, weight_only_reference
from .weight_only_cases import compile_case

__all__ = ["compile_cases", "grouped_kernel", "grouped_matmul", "grouped_reference"]


@triton.jit(do_not_specialize=["TOKEN_TILES"])  # it differs from call to call
def grouped_kernel(
    x_ptr,  # (M, K)
    ends_ptr,  # (EXPERTS,) int32
    slots_ptr,  # (EXPERTS,) int32, unused unless HAS_SLOTS
    tiles_ptr,  # (WEIGHTS, ceil(N / 16), UNITS, 16, 16)
    scales_ptr,  # (WEIGHTS, G, N)
    zeros_ptr,  # (WEIGHTS, G, N), unused unless HAS_ZEROS
    bias_ptr,  # (WEIGHTS, N), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    sums_ptr,  # (steps * RUNS, M) fp32, unused unless SUMS is SUMS_LOADED
    M,
    N,
    TOKEN_TILES,  # the grid has so many times ceil(N / BLOCK_N) programs
    EXPERTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PART: tl.constexpr,
    RAW: tl.constexpr,
    PTX: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,  # 1
    FOR_MMA: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of out, of one expert, per program."""
    if PDL:  # which weight to prefetch is not known before the routing has ended
        wait_for_previous()
        let_next_begin()
    GROUPS: tl.constexpr = 1 if GROUP == -1 else K // GROUP
    place, row = tile_origin(tl.program_id(0), TOKEN_TILES * BLOCK_M, N, BLOCK_M, BLOCK_N)
    index = (place // BLOCK_M).to(tl.int32)
    weight, token, end = tile_of_rows(
        ends_ptr, slots_ptr, index, M, EXPERTS, WEIGHTS, BLOCK_E, HAS_SLOTS, BLOCK_M
    )  # fmt: skip
    if weight >= 0:
        e = weight.to(tl.int64)
        words = tiles_ptr + e * (tl.cdiv(N, 16) * (UNITS * 256)).to(tl.int64)
        scales, zeros = scales_ptr + e * N * GROUPS, zeros_ptr + e * N * GROUPS
        tokens_left = tl.minimum(end - token, BLOCK_M).to(tl.int32)
        acc = tile_product(
            x_ptr, words, scales, zeros, sums_ptr, token, row, tokens_left, tl.program_id(1), M, N, K, UNITS, BITS,
            GROUP, RUN, PART, RAW, PTX, SUMS, HAS_ZEROS, BLOCK_M, BLOCK_N, SPLIT_K, FOR_MMA, STAGES,
        )  # fmt: skip
        store_tile(acc, bias_ptr + e * N, out_ptr, token, row, end, N, HAS_BIAS)
    elif weight == -1:
        nothing = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        store_tile(nothing, bias_ptr, out_ptr, token, row, end, N, False)


def grouped_reference(
    x: Tensor,
    ends: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    slots: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch, in float64, from the same tensors: ``out (M, N)`` float64."""
    out = torch.zeros(x.shape[0], scales.shape[2], dtype=torch.float64, device=x.device)
    for e, rows in rows_by_weight(ends, slots):
        one = [None if tensor is None else tensor[e] for tensor in (zeros, bias)]
        out[rows] = weight_only_reference(x[rows], tiles[e], scales[e], *one, bits=bits, group_size=group_size)
    return out


def grouped_matmul(
    x: Tensor,
    ends: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    slots: Tensor | None = None,
    tile: Tile | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``x (M, K)`` times each row's expert's packed ``W (n, K)``; see the module's table for shapes and dtypes.

    Args:
        bits: 2, 4 or 8.
        group_size: 32, 64, 128, or -1 for the whole row.
        n: rows of each weight: those of ``tiles`` are padded.
        slots: ``(E,)`` int32, where not every expert has a weight here.
        tile: of the ``triton`` family, without split_k; None takes grouped_tiles.py's.
        batch_invariant: choose the tile without regard to M.

    Returns:
        ``(M, n)`` in x's dtype, on x's device.

    Raises:
        ValueError: as :func:`~lowbit_kernels.weight_only.weight_only_matmul`, for any tensor of the table. The values
            in ``ends`` are not looked at.
    """
    problem = Problem(x.shape[0], n, x.shape[-1], bits, group_size, x.dtype, zeros is not None)
    arch = device_arch(x.device)
    _check(x, ends, slots, tiles, scales, zeros, bias, problem, arch)
    if tile is None:
        name = gpu_name(x.device)
        tile = grouped_tile(problem, ends.shape[0], arch, gpu_name=name, batch_invariant=batch_invariant)
    tile = wide_enough(tile)
    reason = why_not(tile, problem, arch)
    if reason is None and (tile.family != "triton" or tile.split_k != 1):
        reason = "experts share the grid: family triton and split_k 1"
    if reason is not None:
        raise ValueError(f"{tile} cannot run {problem} on sm_{arch}: {reason}")
    out = torch.empty(problem.m, n, dtype=x.dtype, device=x.device)
    if problem.m:
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
            _launch(x, ends, slots, tiles, scales, zeros, bias, out, problem, tile, arch)
    return out


def _launch(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    problem: Problem,
    tile: Tile,
    arch: int,
) -> None:
    interpreted = bool(triton.knobs.runtime.interpret)
    constexprs = constants(problem, tile, arch, has_bias=bias is not None, interpreted=interpreted)
    rows = token_tiles(problem.m, len(ends), tile.block_m)
    sums = loaded_sums(x, problem.bits, constexprs["RUN"]) if constexprs["SUMS"] == SUMS_LOADED else scales
    grouped_kernel[(rows * cdiv(problem.n, tile.block_n), 1)](
        x,
        ends,
        ends if slots is None else slots,  # here and below: an argument that the kernel does not read
        tiles,
        scales,
        scales if zeros is None else zeros,
        scales if bias is None else bias,
        out,
        sums,
        M=problem.m,
        N=problem.n,
        TOKEN_TILES=rows,
        **routing_constants(len(ends), len(tiles), slots is not None),
        **constexprs,
        PDL=tile.pdl,
        **options(problem, tile),
        **launch_options(tile.pdl),
    )


def _check(
    x: Tensor,
    ends: Tensor,
    slots: Tensor | None,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    arch: int,
) -> None:
    if arch < MIN_ARCH:
        raise ValueError(f"the grouped kernel needs sm_{MIN_ARCH} or newer, got sm_{arch}")
    check_routing(x, ends, slots, {"tiles": tiles, "scales": scales, "zeros": zeros, "bias": bias})
    zero, offset = (None if tensor is None else tensor[0] for tensor in (zeros, bias))
    check_arguments(x, tiles[0], scales[0], zero, offset, problem, arch)


def compile_cases() -> list[CompileCase]:
    """A tile on every architecture, and those whose operands come another way; the loop itself is product.py's."""
    fp16, bf16 = torch.float16, torch.bfloat16
    shapes = (
        (Tile("triton", 8, 64, 1, 2, 4), (4, 128, bf16, False), ARCHITECTURES),
        (Tile("triton", 64, 128, 1, 8, 3, pdl=True), (4, 128, bf16, False), (90,)),
        (Tile("triton", 64, 128, 1, 8, 3), (4, 128, fp16, True), (80, 86, 89, 120)),
    )
    cases = []
    for tile, (bits, group, dtype, asymmetric), archs in shapes:
        case = compile_case(tile, Problem(4 * tile.block_m, 4096, 8192, bits, group, dtype, asymmetric), archs)
        cases.append(routed_case(case, grouped_kernel, "grouped", has_slots=asymmetric))
    return cases

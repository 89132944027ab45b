"""The split-K kernel as it would be with float atomics: what the same bits on every run are compared with.

The same main loop and tile; but instead of storing fp32 partial sums that the last program adds up in a fixed order,
every program adds its own to an fp32 result by atomics. It is measured without what it would need besides, zeros to
add to, the rounding to the output's dtype and the bias, so a ratio to it says the most that determinism can cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from check_layers import Packed
from torch import Tensor

from lowbit_kernels.epilogue import tile_origin
from lowbit_kernels.operands import SUMS_LOADED
from lowbit_kernels.overlap import launch_options
from lowbit_kernels.product import tile_product
from lowbit_kernels.tiles import Tile, cdiv
from lowbit_kernels.weight_only import constants, device_arch, options

__all__ = ["atomic_matmul", "has_atomic_form"]


@triton.jit
def _atomic_kernel(
    x_ptr, tiles_ptr, scales_ptr, zeros_ptr, out_ptr, M, N, K: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, PART: tl.constexpr, RAW: tl.constexpr, PTX: tl.constexpr,
    SUMS: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    FOR_MMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight_only_kernel, except that every program adds its (BLOCK_M, BLOCK_N) sums to the fp32 zeros of out_ptr."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token, row = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
    tokens_left = tl.minimum(M - token, BLOCK_M).to(tl.int32)
    acc = tile_product(
        x_ptr, tiles_ptr, scales_ptr, zeros_ptr, x_ptr, token, row, tokens_left, split, M, N, K, UNITS, BITS, GROUP,
        RUN, PART, RAW, PTX, SUMS, HAS_ZEROS, BLOCK_M, BLOCK_N, SPLIT_K, FOR_MMA, STAGES,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_N)
    tokens = token + tl.arange(0, BLOCK_M)
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.atomic_add(out_ptr + tokens[:, None] * N + rows[None, :], tl.trans(acc), mask=inside, sem="relaxed")


def has_atomic_form(packed: Packed, m: int, tile: Tile) -> bool:
    """Whether ``tile`` splits K, in Triton, with no kernel of its own for the sums of x."""
    if tile.family != "triton" or tile.split_k == 1:
        return False
    arch = device_arch(packed.tiles.device)
    return bool(constants(packed.problem(m), tile, arch, has_bias=False)["SUMS"] != SUMS_LOADED)


def atomic_matmul(packed: Packed, x: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
    """``x @ W.T`` in fp32, ``(M, n)``; the sums' order, and so the last bits, differ from run to run.

    Args:
        out: ``(M, n)`` fp32 to add to; zeros if not given.
    """
    problem = packed.problem(x.shape[0])
    interpreted = bool(triton.knobs.runtime.interpret)
    constexprs = constants(problem, tile, device_arch(x.device), has_bias=False, interpreted=interpreted)
    constexprs = {name: value for name, value in constexprs.items() if name != "HAS_BIAS"}
    if out is None:
        out = torch.zeros(problem.m, packed.n, dtype=torch.float32, device=x.device)
    zeros = packed.scales_gn if packed.zeros_gn is None else packed.zeros_gn
    count = cdiv(problem.m, tile.block_m) * cdiv(packed.n, tile.block_n)
    _atomic_kernel[(count, tile.split_k)](
        x, packed.tiles, packed.scales_gn, zeros, out, M=problem.m, N=packed.n, **constexprs,
        **options(problem, tile), **launch_options(),
    )  # fmt: skip
    return out

"""Which tile a matmul runs with: a frozen dataclass, one predicate that says what is allowed, one pure choice.

No measurement stands behind the table yet: it holds tiles that compile without spills and fit the smallest shared
memory of the supported GPUs (kernels/README.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHARED_LIMIT", "Tile", "fits", "pick_tile", "shared_bytes"]

SHARED_LIMIT = 101_376
"""Bytes of shared memory that one program may use on sm_86, 89 and 120; sm_80 has 166912, sm_90 and 100 have 232448."""


@dataclass(frozen=True)
class Tile:
    """One program's share of ``out (M, N)`` and how it walks along K.

    Attributes:
        block_m: tokens, a power of two of at least 16.
        block_n: weight rows, a power of two of at least 16.
        block_k: columns per step, a power of two of at least 32 that divides the group.
        num_warps: 4 or 8.
        num_stages: steps whose loads are in flight, at least 1.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def shared_bytes(tile: Tile, bits: int) -> int:
    """Upper bound on shared memory: x and words once per stage, the unpacked tile and the transposed result once."""
    x = tile.block_m * tile.block_k * 2
    words = tile.block_n * tile.block_k * bits // 8
    unpacked = tile.block_n * tile.block_k * 2
    result = tile.block_m * tile.block_n * 4
    return max(tile.num_stages * (x + words) + unpacked, result)


def fits(tile: Tile, bits: int, group_size: int) -> bool:
    """Whether ``tile`` can run a weight of ``bits`` bits in groups of ``group_size`` (-1: whole row) on every GPU."""
    powers = all(v > 0 and v & (v - 1) == 0 for v in (tile.block_m, tile.block_n, tile.block_k))
    return (
        powers
        and min(tile.block_m, tile.block_n) >= 16
        and tile.block_k >= 32
        and (group_size == -1 or group_size % tile.block_k == 0)
        and tile.num_warps in (4, 8)
        and tile.num_stages >= 1
        and shared_bytes(tile, bits) <= SHARED_LIMIT
    )


def pick_tile(m: int, n: int, k: int, bits: int, group_size: int) -> Tile:
    """Tile for ``out (m, n) = x (m, k) @ W.T``; the same arguments always give the same tile.

    Few tokens take narrow token tiles and few weight rows per program, so that more programs read weights at once.
    """
    block_k = min(128, 2 ** max(5, (k - 1).bit_length())) if group_size == -1 else min(128, group_size)
    if m <= 16:
        tile = Tile(16, 32 if n <= 8192 else 64, block_k, 4, 4)
    elif m <= 32:
        tile = Tile(32, 64, block_k, 4, 3)
    elif m <= 128:
        tile = Tile(64, 64, block_k, 4, 3)
    else:
        tile = Tile(64, 128, min(block_k, 64), 8, 3)
    assert fits(tile, bits, group_size), f"{tile} does not fit {bits} bits in groups of {group_size}"
    return tile

"""From times of tiles to a table for lowbit_kernels.dispatch: which is picked, and why it may be.

The rule, on measured and on predicted times alike: among everything that computes the same layer from the packed
weight (each fused tile, and the floor: dequantise in chunks, then cuBLAS) the fastest is picked, so nothing slower than
the floor ever is. A fused tile must beat the floor by NOISE to replace it. The dense layer cannot be picked (its weight
is gone), so where the pick is slower than it, the table says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit_kernels.cases import shipped_cases
from lowbit_kernels.tiles import Problem, Tile

__all__ = ["M_BUCKETS", "NOISE", "Pick", "pick", "rows_of", "shipped_tiles", "table"]

M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of tokens that are measured. A row of the table is for up to its bucket, the last one for any more."""
NOISE = 0.02
"""Share by which a fused tile must be faster than the floor: below it the measurement cannot tell."""
FLOOR = Tile("dequant", 1, 16)


@dataclass(frozen=True)
class Pick:
    """The tile for one bucket, its time, and its speed over the dense layer and over the floor (above 1: faster)."""

    m: int
    tile: Tile
    seconds: float
    over_dense: float
    over_floor: float


def pick(m: int, times: Mapping[Tile, float], dense: float) -> Pick:
    """The rule of the module's docstring for one problem.

    Args:
        times: seconds of each tile, FLOOR among them.
        dense: seconds of the dense layer.

    Raises:
        ValueError: the floor was not timed, or a time is not a positive number.
    """
    if FLOOR not in times:
        raise ValueError(f"M = {m}: the floor {FLOOR} must be among the timed tiles")
    wrong = {tile: time for tile, time in times.items() if not 0 < time < float("inf")}
    if wrong or not 0 < dense < float("inf"):
        raise ValueError(f"M = {m}: times must be positive numbers of seconds, got {wrong or dense}")
    best = min(times, key=lambda tile: (times[tile], repr(tile)))
    if times[best] > (1 - NOISE) * times[FLOOR]:
        best = FLOOR
    return Pick(m, best, times[best], dense / times[best], times[FLOOR] / times[best])


def rows_of(
    picks: Iterable[Pick], *, bits: int, group: int | None = None, n: int | None = None, k: int | None = None
) -> list[dict[str, Any]]:
    """One series of table rows; buckets in a row that take the same tile become one, the last one is for any m."""
    rows: list[dict[str, Any]] = []
    for chosen in sorted(picks, key=lambda chosen: chosen.m):
        tile = chosen.tile
        split = 0 if n is None or tile.family == "dequant" else tile.split_k
        line = [
            tile.family,
            tile.block_m,
            tile.block_n,
            split or int(tile.family == "dequant"),
            tile.num_warps,
            tile.num_stages,
        ]
        if rows and rows[-1]["tile"] == line:
            rows[-1]["m"] = chosen.m
        else:
            rows.append({"bits": bits, "group": group, "n": n, "k": k, "m": chosen.m, "tile": line})
    rows[-1]["m"] = None
    return rows


def table(
    *, gpu: str, arch: int, source: str, about: Mapping[str, Any], chip: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON content of a table file."""
    return {
        "version": 1,
        "gpu": gpu,
        "arch": arch,
        "source": source,
        "about": dict(about),
        "chip": dict(chip),
        "rows": rows,
    }


def shipped_tiles(
    arch: int, families: Iterable[str], problem: Problem | None = None, fits: Callable[..., bool] | None = None
) -> list[Tile]:
    """The tiles of these families that the kernels' compile_cases() list for ``arch``, with split_k 1.

    Args:
        problem, fits: when given, only the tiles that fit the problem.
    """
    found: dict[Tile, None] = {}
    for _, case in shipped_cases():
        tile = case.extra.get("tile")
        if isinstance(tile, Tile) and tile.family in families and arch in case.archs:
            found[Tile(tile.family, tile.block_m, tile.block_n, 1, tile.num_warps, tile.num_stages)] = None
    return [tile for tile in found if problem is None or fits is None or fits(tile, problem, arch)]

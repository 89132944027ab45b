"""Which tile runs a matmul: a pure function over the tables that are shipped with the package (table.py).

Nothing is measured or compiled here, and no GPU is asked. A problem takes the series of the nearest shape in its GPU's
table and in it the first row with enough tokens. A split_k of 0, and that of a series measured at another shape,
becomes :func:`fill_split`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from .scaled_plan import steps_taken
from .table import table_for, uses_pdl
from .tiles import HOPPER, Problem, Tile, cdiv, fits, narrowed, shared_bytes, shared_limit, step_columns, why_not

__all__ = [
    "INVARIANT_TOKENS",
    "choose",
    "fill_shares",
    "fill_split",
    "shape_distance",
]

INVARIANT_TOKENS = 16
"""The M whose tile runs every M in the batch-invariant mode: decoding is what the mode is for."""
MOST_SPLITS = 16
FEWEST_STEPS = 4
"""Steps along K that a program should have at least, to fill its pipeline."""
SHARE_STEPS = 2.5
"""Steps of 128 columns in which a program could also have stored, or read, the sums of a tile: 42 GB/s from the L2."""
ANY_SHAPE = 2.0
"""Distance, in powers of two of n and k together, at which a series for any shape is nearer than a measured one."""


def choose(
    problem: Problem,
    arch: int,
    *,
    gpu_name: str | None = None,
    batch_invariant: bool = False,
    hopper: bool = True,
) -> Tile:
    """The tile to run ``problem`` with; the same arguments always give the same tile, and it always fits.

    Args:
        arch: 10 * major + minor of the compute capability, 90 for sm_90.
        gpu_name: the driver's name of the GPU; None, or one without a table, takes the nearest architecture's.
        batch_invariant: choose without looking at ``problem.m``, never cuBLAS and never split_k (whose workspace limits
            M), so that a row of the result does not depend on how many rows there are.
        hopper: whether the families of HOPPER may be chosen: Triton has their Gluon (releases.gluon_missing), and
            scales and zeros start at multiples of 16 bytes.

    Raises:
        ValueError: nothing can run the problem on this architecture.
    """
    if batch_invariant:
        problem = replace(problem, m=INVARIANT_TOKENS)
    return _choose(problem, arch, gpu_name, batch_invariant, hopper)


def fill_split(tile: Tile, problem: Problem, arch: int, multiprocessors: int) -> int:
    """Programs per output tile, 1 to 16, that finish soonest when every program takes one step per unit of time.

    More programs fill the GPU's last wave; each costs the filling of its pipeline and its partial sums' way to memory.
    """
    steps = cdiv(problem.k, step_columns(problem.bits))
    programs = max(1, cdiv(problem.m, tile.block_m) * cdiv(problem.n, tile.block_n))
    if tile.family == "scaled":
        return fill_shares(programs, cdiv(problem.k, 128), multiprocessors)
    resident = max(1, min(shared_limit(arch) // max(1, shared_bytes(tile, problem)), 16 // tile.num_warps))
    slots = multiprocessors * resident
    best, least = 1, math.inf
    for split in range(1, min(MOST_SPLITS, max(1, steps // FEWEST_STEPS)) + 1):
        waves = cdiv(programs * split, slots)
        cost = waves * (cdiv(steps, split) + tile.num_stages) + (2.0 + 0.25 * split if split > 1 else 0.0)
        if cost < least - 1e-9:
            best, least = split, cost
    return best


def fill_shares(tiles: int, steps: int, multiprocessors: int) -> int:
    """How many programs share a tile of the last round, 1 to 16, to finish soonest where they stay (scaled_plan.py).

    Args:
        tiles: output tiles.
        steps: of 128 columns, along K. Storing and reading a tile's sums take as long as SHARE_STEPS each.
    """
    costs = []
    for split in range(1, min(MOST_SPLITS, max(1, steps // FEWEST_STEPS)) + 1):
        taken, share = steps_taken(tiles, steps, split, multiprocessors)
        costs.append((taken + (SHARE_STEPS * (1 + share) if share > 1 else 0.0), split))
    return min(costs)[1]


@lru_cache(maxsize=8192)
def _choose(problem: Problem, arch: int, gpu_name: str | None, fused_only: bool, hopper: bool) -> Tile:
    reason = why_not(Tile("dequant", 1, 16), problem, arch)
    if reason is not None:  # the family that needs least cannot run: nothing can
        raise ValueError(f"no kernel runs {problem} on sm_{arch}: {reason}")
    table = table_for(arch, gpu_name)
    key = min(
        (key for key in table.series if key[0] == problem.bits), key=lambda key: (_distance(key, problem), repr(key))
    )
    rows = table.series[key]
    for row in rows:
        if row.m is None or problem.m <= row.m:
            break
    tile = row.tile
    if fused_only and tile.family == "dequant":
        tile = next(row.tile for row in reversed(rows) if row.tile.family != "dequant")
    if tile.family in HOPPER and (arch != 90 or not hopper):
        tile = replace(tile, family="triton") if tile.family == "gluon" or fused_only else Tile("dequant", 1, 16)
    same_shape = key[2:] == (problem.n, problem.k)
    found = _fitted(tile, same_shape, problem, arch, table.multiprocessors, fused_only)
    return replace(found, pdl=found.family != "dequant" and uses_pdl(arch, gpu_name))


def _distance(key: tuple[int, int | None, int | None, int | None], problem: Problem) -> float:
    """How far a series is from a problem: powers of two in n and k, and a little for another group size."""
    _, group, n, k = key
    other_group = 0.5 if group is None else 1.0 if group != problem.group_size else 0.0
    return shape_distance(n, k, problem.n, problem.k) + other_group


def shape_distance(n: int | None, k: int | None, problem_n: int, problem_k: int) -> float:
    """Powers of two in n and k between a series' shape and a problem's; ANY_SHAPE for one that is for any."""
    if n is None or k is None:
        return ANY_SHAPE
    return abs(math.log2(n / max(1, problem_n))) + abs(math.log2(k / max(1, problem_k)))


def _fitted(tile: Tile, same_shape: bool, problem: Problem, arch: int, multiprocessors: int, fused_only: bool) -> Tile:
    """``tile`` with split_k resolved; where it does not fit, with fewer stages, then smaller, then cuBLAS."""
    if tile.family == "dequant":
        return replace(tile, split_k=1)
    while True:
        tile = narrowed(tile, problem, arch)
        asked = tile.split_k if same_shape and tile.split_k else None
        split = 1 if fused_only else asked or fill_split(replace(tile, split_k=1), problem, arch, multiprocessors)
        resolved = replace(tile, split_k=split)
        for candidate in (resolved, replace(resolved, split_k=1)):
            if fits(candidate, problem, arch):
                return candidate
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.family == "scaled":
            tile = Tile("triton", 64, 128, 0, 8, 3)
        elif tile.block_m * 2 > tile.block_n and tile.block_m > 16:
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2, num_warps=max(1, min(tile.num_warps, tile.block_n // 32)))
        elif tile.family == "gluon":
            tile = Tile("triton", 16, 64, 0, 4, 4)
        elif not fused_only:
            return Tile("dequant", 1, 16)
        else:
            raise ValueError(f"no fused tile runs {problem} on sm_{arch}: {why_not(tile, problem, arch)}")

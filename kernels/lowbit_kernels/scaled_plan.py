"""Plan of the ``scaled`` family: which tiles it runs, and which part of the work each of its programs has.

The functions from segments_of on take integers or scalars of the kernel: scaled_kernel.py compiles the very same lines.

P programs stay on the GPU and share all output tiles of one call, each of S steps of 128 columns. Whole rounds come
first: program p has the tiles p, P + p, 2 P + p, ... What is left, fewer than P tiles, is laid out in one line of
``left * S`` steps and cut into ``sharers`` equal parts (Osama et al., "Stream-K", PPoPP 2023, section 5.2), so that the
last round ends at about the same time everywhere. A part is at most S steps long, as sharers >= left, and so touches at
most two tiles. With sharers == left the cuts are those between tiles, and no tile is shared.

    left tiles      |--------- t = 0 ---------|--------- t = 1 ---------|--------- t = 2 ---------|
    parts           |---- p = 0 ----|---- p = 1 ----|---- p = 2 ----|---- p = 3 ----|---- p = 4 --|
    segments          0: all           1: end of 0, begin of 1         ...

Whoever shares a tile writes fp32 sums to a place of its own (its first or its second left tile) and counts itself; the
last to arrive adds the others' in the order of k. Nobody waits, and the bits depend on P and sharers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hopper_plan import SHARED_LIMIT, STEP, runs_of_step

if TYPE_CHECKING:
    from .tiles import Problem, Tile

__all__ = [
    "banded_tile",
    "first_sharer",
    "scaled_blocks",
    "scaled_shared_bytes",
    "scaled_why_not",
    "schedule",
    "segment_of",
    "segments_of",
    "share_of",
    "steps_taken",
]

MOST_STEPS = 1 << 13
"""Steps along K; with at most 512 programs the products below stay within int32."""


def scaled_blocks(tile: Tile) -> int:
    """Blocks of 64 weight rows that each of the two consumer warpgroups of ``tile`` has."""
    return tile.block_n // 128


def scaled_shared_bytes(tile: Tile, problem: Problem) -> int:
    """Upper bound on the shared memory of one program: the ring, barriers and what worker warps are passed, the result.

    Scales count as fp32. A warpgroup turns its result 2 KiB at a time.
    """
    per_step = tile.block_m * STEP * 2 + tile.block_n * STEP * problem.bits // 8
    per_run = tile.block_n * (5 if problem.asymmetric else 4)
    ring = tile.num_stages * (per_step + runs_of_step(problem.group_size) * per_run)
    return ring + 512 + 2 * 2048


def scaled_why_not(tile: Tile, problem: Problem) -> str | None:
    """Why the kernel cannot run ``problem`` with ``tile`` on sm_90, or None when it can."""
    if problem.bits not in (4, 8):
        return f"the scaled family has 4 and 8 bits, not {problem.bits}"
    if problem.k % 8:
        return f"the copy engine needs rows of x at multiples of 16 bytes: K must be a multiple of 8, got {problem.k}"
    if tile.block_m not in (64, 128) or tile.block_n not in (128, 256) or tile.num_warps != 8:
        return (
            "block_m must be 64 or 128, block_n 128 or 256 and num_warps 8, "
            f"got {tile.block_m}, {tile.block_n} and {tile.num_warps}"
        )
    if not 2 <= tile.num_stages <= 8:
        return f"num_stages must be 2 to 8, got {tile.num_stages}: one is multiplied while the next is read"
    if not 1 <= tile.split_k <= 16:
        return f"split_k, sharers per left tile, must be 1 to 16, got {tile.split_k}"
    if -(-problem.k // STEP) > MOST_STEPS:
        return f"K must be at most {MOST_STEPS * STEP}, got {problem.k}"
    groups = 1 if problem.group_size == -1 else problem.k // problem.group_size
    if groups * problem.n + 256 >= 1 << 31:
        return f"{groups} groups of {problem.n} rows are more scales than the copy engine's 32-bit coordinates"
    needed = scaled_shared_bytes(tile, problem)
    return f"{needed} bytes of shared memory, sm_90 has {SHARED_LIMIT}" if needed > SHARED_LIMIT else None


def schedule(count: int, steps: int, split_k: int, multiprocessors: int) -> tuple[int, int, int]:
    """(programs, left tiles, sharers) for ``count`` tiles of out, of which split_k programs may share a left one."""
    split = min(split_k, steps)
    programs = min(multiprocessors, count * split)
    left = count % programs
    return programs, left, max(1, min(programs, left * split))


def steps_taken(count: int, steps: int, split_k: int, multiprocessors: int) -> tuple[int, float]:
    """Steps of the busiest program of a :func:`schedule`, and how many share a left tile in the mean."""
    programs, left, sharers = schedule(count, steps, split_k, multiprocessors)
    return count // programs * steps + -(-left * steps // sharers), sharers / max(1, left)


def share_of(p: int, left_steps: int, sharers: int) -> int:
    """First of the left steps that program ``p`` has; that of ``p + 1`` ends its part."""
    return min(p, sharers) * left_steps // sharers


def segments_of(p: int, programs: int, tiles: int, steps: int, sharers: int) -> int:
    """Number of segments (a tile and a range of its steps) that program ``p`` works on, one after the other."""
    full = tiles // programs
    left_steps = (tiles - full * programs) * steps
    begin, end = min(p, sharers) * left_steps // sharers, min(p + 1, sharers) * left_steps // sharers  # share_of
    return full + (begin < end) * ((end + steps - 1) // steps - begin // steps)


def segment_of(p: int, s: int, programs: int, tiles: int, steps: int, sharers: int) -> tuple[int, int, int]:
    """(tile, first step, number of steps) of program ``p``'s segment ``s``."""
    full = tiles // programs
    left_steps = (tiles - full * programs) * steps
    begin, end = min(p, sharers) * left_steps // sharers, min(p + 1, sharers) * left_steps // sharers  # share_of
    left = begin // steps + s - full
    first = max(left * steps, begin) - left * steps
    count = min(left * steps + steps, end) - left * steps - first
    whole = s < full  # a round in which every program has one tile
    tile = full * programs + left
    return tile + whole * (s * programs + p - tile), first - whole * first, count + whole * (steps - count)


def first_sharer(unit: int, left_steps: int, sharers: int) -> int:
    """The program whose part has left step ``unit``: the largest p with ``share_of(p) <= unit``."""
    return ((unit + 1) * sharers - 1) // left_steps


def banded_tile(tile: int, tiles_m: int, tiles_n: int) -> tuple[int, int]:
    """(token tile, row tile) of an output tile: 16 token tiles of the same rows are neighbours, and share them."""
    band = tile // (16 * tiles_n)
    height = min(tiles_m - band * 16, 16)
    within = tile - band * 16 * tiles_n
    return band * 16 + within % height, within // height

"""Which tile runs the experts of a mixture: by the rows that an expert has in the mean, all that is known on the host.

What the GPU's table (table.py) has for that many rows, where ``scripts/tune --bits experts`` has measured it, else a
rule, a guess. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from .dispatch import INVARIANT_TOKENS
from .int8_tiles import Int8Tile, fitting
from .int8_tiles import why_not as int8_why_not
from .table import ExpertRow, table_for, uses_pdl
from .tiles import Problem, Tile, narrowed, why_not

__all__ = ["MIN_ARCH", "grouped_int8_tile", "grouped_tile"]

MIN_ARCH = 80
"""Triton has no tensor cores for sm_75, where the other matmuls go through cuBLAS; that needs ``ends`` on the host."""


@lru_cache(maxsize=4096)  # a launch asks every time
def grouped_tile(
    problem: Problem, experts: int, arch: int, *, gpu_name: str | None = None, batch_invariant: bool = False
) -> Tile:
    """The tile of the packed experts' matmul; ``problem.m`` are all rows.

    Where the wanted tile does not fit, it gets fewer stages, and then half of its tokens. One that does not fit at all
    is refused by the launch.

    Args:
        gpu_name: the driver's name of the GPU; None, or one without a table, takes the nearest architecture's.
        batch_invariant: the same tile for every number of rows.
    """
    mean = INVARIANT_TOKENS if batch_invariant else problem.m / experts
    row = _row(table_for(arch, gpu_name).experts.get(problem.bits, ()), mean)
    wanted = row.tile if row is not None and isinstance(row.tile, Tile) else _by_rule(mean, arch)
    wanted = narrowed(wanted, problem, arch)
    half = replace(wanted, block_m=max(8, wanted.block_m // 2))  # one stage would mean no asynchronous copies
    candidates = [replace(tile, num_stages=s) for tile in (wanted, half) for s in range(tile.num_stages, 1, -1)]
    candidates.append(replace(wanted, num_stages=1))
    found = next((tile for tile in candidates if why_not(tile, problem, arch) is None), wanted)
    return replace(found, pdl=uses_pdl(arch, gpu_name))


def _by_rule(mean: float, arch: int) -> Tile:
    """Every choice is one of weight_only_cases.py's shapes, so that the compile gate has it."""
    few, some = Tile("triton", 8, 64, 1, 2, 4), Tile("triton", 16, 64, 1, 2, 4)
    if arch // 10 == 9:
        some = Tile("triton", 16, 128, 1, 4, 4)
    many = some if arch // 10 in (10, 11) else Tile("triton", 64, 128, 1, 8, 3)  # sm_100 wants weights in shared memory
    return few if mean <= 8 else some if mean <= 32 else many


@lru_cache(maxsize=4096)  # a launch asks every time
def grouped_int8_tile(m: int, experts: int, arch: int, *, gpu_name: str | None = None) -> Int8Tile:
    """The tile of the W8A8 experts' matmul, for ``m`` rows in all. The rule: the narrowest that holds an expert's mean
    share of rows, so that most weights are read once, and 128 rows at most.

    Raises:
        ValueError: the architecture is older than the grouped kernels'.
    """
    if arch < MIN_ARCH:
        raise ValueError(f"the grouped kernel needs sm_{MIN_ARCH} or newer, got sm_{arch}")
    allowed = [tile for tile in fitting(arch) if tile.block_m <= 128]
    found = next((tile for tile in allowed if tile.block_m >= m / experts), allowed[-1])
    row = _row(table_for(arch, gpu_name).experts.get("w8a8", ()), m / experts)
    if row is not None and isinstance(row.tile, tuple):
        block_m, block_n, block_k, _, num_warps, num_stages = row.tile
        measured = Int8Tile(block_m, block_n, block_k, 1, num_warps, num_stages)
        found = measured if int8_why_not(measured, 1, 1, 1, arch) is None else found
    return replace(found, pdl=uses_pdl(arch, gpu_name))


def _row(rows: Sequence[ExpertRow], mean: float) -> ExpertRow | None:
    """The first row with enough rows per expert; None where there is none."""
    return next((row for row in rows if row.m is None or mean <= row.m), None)

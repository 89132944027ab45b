"""Which tile runs a matmul: a pure function over tables that are shipped with the package, one JSON file per GPU.

Nothing is measured or compiled here, and no GPU is asked. A table names what it stands on: ``"source": "measured"`` by
scripts/tune on that GPU, or ``"predicted"`` by a model (eval/gpu_check/tune_model.py) where nobody has measured yet.

    {"version": 1, "gpu": "NVIDIA H200", "arch": 90, "source": "predicted", "about": {...},
     "chip": {"multiprocessors": 132, "bandwidth_gbs": 4300, "tflops": 790},
     "rows": [{"bits": 4, "group": null, "n": null, "k": null, "m": 16, "tile": ["triton", 16, 64, 0, 4, 4]}, ...]}

``"pdl": true`` stands where fused kernels were measured to be faster when each begins while the one before ends
(overlap.py). W8A8 has ``"int8_rows": [{"n": 8192, "k": 8192, "m": 16, "tile": [16, 64, 256, 0, 4, 4]}, ...]`` in the
same order where it was measured: block_m, block_n, block_k, split_k, num_warps, num_stages, and "gluon" where it is of
that family (int8_tiles.py, which has a rule besides).

A row's null stands for any; ``m`` is the largest number of tokens that the row is for. Rows with the same bits, group,
n and k are a *series*, in rising order of m, the last one for any m. A problem takes the series of the nearest shape
and in it the first row with enough tokens. ``tile`` is family, block_m, block_n, split_k, num_warps, num_stages; a
split_k of 0, and that of a series measured at another shape, becomes :func:`fill_split`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .scaled_plan import steps_taken
from .tiles import (
    FAMILIES,
    HOPPER,
    PDL_ARCH,
    Problem,
    Tile,
    cdiv,
    fits,
    shared_bytes,
    shared_limit,
    step_columns,
    why_not,
)

__all__ = [
    "INVARIANT_TOKENS",
    "Int8Row",
    "Row",
    "Table",
    "choose",
    "fill_shares",
    "fill_split",
    "parse_table",
    "shape_distance",
    "table_for",
    "tables",
    "uses_pdl",
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
_KEYS = {"version", "gpu", "arch", "source", "about", "chip", "rows"}
_OPTIONAL = {"int8_rows", "pdl"}


@dataclass(frozen=True)
class Row:
    """One line of a table; None stands for any."""

    bits: int
    group: int | None
    n: int | None
    k: int | None
    m: int | None
    tile: Tile


@dataclass(frozen=True)
class Int8Row:
    """One line of a table's int8_rows; ``tile`` are the fields of an Int8Tile, split_k 0 where it is to be resolved."""

    n: int | None
    k: int | None
    m: int | None
    tile: tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """One GPU's choices. ``series`` maps (bits, group, n, k) to its rows in order of m, ``int8`` (n, k) to W8A8's."""

    gpu: str
    arch: int
    source: str
    multiprocessors: int
    series: Mapping[tuple[int, int | None, int | None, int | None], tuple[Row, ...]]
    int8: Mapping[tuple[int | None, int | None], tuple[Int8Row, ...]] = field(default_factory=dict)
    pdl: bool = False


def choose(
    problem: Problem,
    arch: int,
    *,
    gpu_name: str | None = None,
    batch_invariant: bool = False,
    aligned: bool = True,
) -> Tile:
    """The tile to run ``problem`` with; the same arguments always give the same tile, and it always fits.

    Args:
        arch: 10 * major + minor of the compute capability, 90 for sm_90.
        gpu_name: the driver's name of the GPU; None, or one without a table, takes the nearest architecture's.
        batch_invariant: choose without looking at ``problem.m``, never cuBLAS and never split_k (whose workspace limits
            M), so that a row of the result does not depend on how many rows there are.
        aligned: whether scales and zeros start at multiples of 16 bytes, as the HOPPER families need.

    Raises:
        ValueError: nothing can run the problem on this architecture.
    """
    if batch_invariant:
        problem = replace(problem, m=INVARIANT_TOKENS)
    return _choose(problem, arch, gpu_name, batch_invariant, aligned)


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


def table_for(arch: int, gpu_name: str | None = None) -> Table:
    """The table of that GPU, else of its architecture (``gpu`` is then ``"sm_90"``), else of the nearest older one."""
    known = tables()
    if gpu_name is not None and gpu_name in known:
        return known[gpu_name]
    general = {table.arch: table for name, table in known.items() if name == f"sm_{table.arch}"}
    older = [known_arch for known_arch in general if known_arch <= arch]
    return general[max(older) if older else min(general)]


@lru_cache(maxsize=64)  # a launch asks every time
def uses_pdl(arch: int, gpu_name: str | None = None) -> bool:
    """Whether fused kernels are launched to begin while the one before ends: its table says so, and the GPU can."""
    return arch >= PDL_ARCH and table_for(arch, gpu_name).pdl


@lru_cache(maxsize=1)
def tables() -> Mapping[str, Table]:
    """Every shipped table by its ``gpu``. ValueError when a file is not what the module's docstring says."""
    found = {}
    for path in sorted((Path(__file__).parent / "tables").glob("*.json")):
        table = parse_table(json.loads(path.read_text(encoding="utf-8")), path.name)
        if table.gpu in found:
            raise ValueError(f"{path.name}: there is another table for {table.gpu!r}")
        found[table.gpu] = table
    return found


def parse_table(content: Any, name: str) -> Table:
    """A table from its JSON content.

    Raises:
        ValueError: a key is missing or unknown, a value is not what it should be, or a series does not end with a row
            for any m. ``name`` is the file's, for the message.
    """
    if not isinstance(content, dict) or set(content) - _OPTIONAL != _KEYS or content["version"] != 1:
        raise ValueError(
            f"{name}: a table has exactly the keys {sorted(_KEYS)}, maybe {sorted(_OPTIONAL)}, and version 1"
        )
    if content["source"] not in ("measured", "predicted") or not content["about"]:
        raise ValueError(
            f"{name}: source must be 'measured' or 'predicted', with an 'about', got {content['source']!r}"
        )
    if not isinstance(content.get("pdl", False), bool):
        raise ValueError(f"{name}: pdl must be true or false, got {content['pdl']!r}")
    multiprocessors = content["chip"].get("multiprocessors")
    if not _natural(content["arch"]) or not _natural(multiprocessors):
        raise ValueError(f"{name}: arch and chip.multiprocessors must be positive integers")
    series: dict[tuple[int, int | None, int | None, int | None], tuple[Row, ...]] = {}
    for number, line in enumerate(content["rows"]):
        row = _parse_row(line, f"{name}, row {number}")
        _append(series, (row.bits, row.group, row.n, row.k), row, f"{name}, row {number}")
    int8: dict[tuple[int | None, int | None], tuple[Int8Row, ...]] = {}
    for number, line in enumerate(content.get("int8_rows", ())):
        int8_row = _parse_int8_row(line, f"{name}, int8 row {number}")
        _append(int8, (int8_row.n, int8_row.k), int8_row, f"{name}, int8 row {number}")
    ends: list[tuple[Any, int | None]] = [(key, rows[-1].m) for key, rows in series.items()]
    for key, end in [*ends, *((key, rows[-1].m) for key, rows in int8.items())]:
        if end is not None:
            raise ValueError(f"{name}: the series {key} ends at m = {end}; its last row must have m null")
    for bits in (2, 4, 8):
        if (bits, None, None, None) not in series:
            raise ValueError(f"{name}: no series for {bits} bits, any group and any shape")
    pdl = content.get("pdl", False)
    return Table(content["gpu"], content["arch"], content["source"], multiprocessors, series, int8, pdl)


def _append(series: dict[Any, tuple[Any, ...]], key: Any, row: Row | Int8Row, where: str) -> None:
    before = series.get(key, ())
    if before and (before[-1].m is None or (row.m is not None and row.m <= before[-1].m)):
        raise ValueError(f"{where}: m must rise within a series, got {row.m} after {before[-1].m}")
    series[key] = (*before, row)


def _parse_int8_row(line: Any, where: str) -> Int8Row:
    if not isinstance(line, dict) or set(line) != {"n", "k", "m", "tile"}:
        raise ValueError(f"{where}: a row has exactly the keys n, k, m and tile, got {line!r}")
    _check_sizes(line, where)
    tile = line["tile"]
    of_gluon = isinstance(tile, list) and len(tile) == 7 and tile[6] == "gluon"
    sizes = [*tile[:3], max(1, tile[3]), *tile[4:6]] if isinstance(tile, list) and len(tile) == 6 + of_gluon else [None]
    if not all(map(_natural, sizes)):
        raise ValueError(
            f"{where}: tile must be [block_m, block_n, block_k, split_k, num_warps, num_stages], positive integers "
            f'(split_k may be 0), and "gluon" behind them for that family, got {tile!r}'
        )
    return Int8Row(line["n"], line["k"], line["m"], tuple(tile))


def _check_sizes(line: Mapping[str, Any], where: str) -> None:
    if any(line[key] is not None and not _natural(line[key]) for key in ("n", "k", "m")):
        raise ValueError(f"{where}: n, k and m must be positive integers or null, got {line!r}")
    if (line["n"] is None) != (line["k"] is None):
        raise ValueError(f"{where}: n and k must be given together, got {line!r}")


def _parse_row(line: Any, where: str) -> Row:
    if not isinstance(line, dict) or set(line) != {"bits", "group", "n", "k", "m", "tile"}:
        raise ValueError(f"{where}: a row has exactly the keys bits, group, n, k, m and tile, got {line!r}")
    if line["bits"] not in (2, 4, 8) or line["group"] not in (None, 32, 64, 128, -1):
        raise ValueError(f"{where}: bits must be 2, 4 or 8 and group 32, 64, 128, -1 or null, got {line!r}")
    _check_sizes(line, where)
    tile = line["tile"]
    if not isinstance(tile, list) or len(tile) != 6 or tile[0] not in FAMILIES:
        raise ValueError(
            f"{where}: tile must be [family, block_m, block_n, split_k, num_warps, num_stages], got {tile!r}"
        )
    sizes = [*tile[1:3], max(1, tile[3]) if isinstance(tile[3], int) else None, *tile[4:]]
    if not all(map(_natural, sizes)):
        raise ValueError(f"{where}: a tile's sizes must be positive integers (split_k may be 0), got {tile!r}")
    return Row(line["bits"], line["group"], line["n"], line["k"], line["m"], Tile(*tile))


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@lru_cache(maxsize=8192)
def _choose(problem: Problem, arch: int, gpu_name: str | None, fused_only: bool, aligned: bool) -> Tile:
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
    if tile.family in HOPPER and (arch != 90 or not aligned):
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

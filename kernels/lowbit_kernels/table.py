"""Tables of tiles that are shipped with the package, one JSON file per GPU: what they hold, reading and checking them.

A table names what it stands on: ``"source": "measured"`` by scripts/tune on that GPU, or ``"predicted"`` by a model
(eval/gpu_check/tune_model.py) where nobody has measured yet.

    {"version": 1, "gpu": "NVIDIA H200", "arch": 90, "source": "predicted", "about": {...},
     "chip": {"multiprocessors": 132, "bandwidth_gbs": 4300, "tflops": 790},
     "rows": [{"bits": 4, "group": null, "n": null, "k": null, "m": 16, "tile": ["triton", 16, 64, 0, 4, 4]}, ...]}

A row's null stands for any; ``m`` is the largest number of tokens that the row is for. Rows with the same bits, group,
n and k are a *series*, in rising order of m, the last one for any m. ``tile`` is family, block_m, block_n, split_k (0:
to be resolved), num_warps, num_stages. What only a measured table has:

    "pdl": true             launches are faster when each begins while the one before ends (overlap.py)
    "int8_rows": [{"n": 8192, "k": 8192, "m": 16, "tile": [16, 64, 256, 0, 4, 4]}, ...]
                            W8A8: block_m, block_n, block_k, split_k, num_warps, num_stages, "gluon" if of that family
    "expert_rows": [{"bits": 4, "m": 16, "tile": ["triton", 16, 64, 1, 2, 4]},
                    {"bits": "w8a8", "m": null, "tile": [128, 128, 128, 1, 8, 3]}, ...]
                            the experts of a mixture: m is the largest number of rows that an expert has in the mean
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .tiles import FAMILIES, PDL_ARCH, Tile

__all__ = ["ExpertRow", "Int8Row", "Row", "Table", "parse_table", "table_for", "tables", "uses_pdl"]

_KEYS = {"version", "gpu", "arch", "source", "about", "chip", "rows"}
_OPTIONAL = {"int8_rows", "expert_rows", "pdl"}


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
class ExpertRow:
    """One line of a table's expert_rows; of W8A8 ``tile`` are the fields of an Int8Tile."""

    bits: int | str
    m: float | None
    tile: Tile | tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """One GPU's choices. ``series`` maps (bits, group, n, k) to its rows in order of m, ``int8`` (n, k) to W8A8's,
    ``experts`` bits (or "w8a8") to those of the experts.
    """

    gpu: str
    arch: int
    source: str
    multiprocessors: int
    series: Mapping[tuple[int, int | None, int | None, int | None], tuple[Row, ...]]
    int8: Mapping[tuple[int | None, int | None], tuple[Int8Row, ...]] = field(default_factory=dict)
    experts: Mapping[int | str, tuple[ExpertRow, ...]] = field(default_factory=dict)
    pdl: bool = False


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
    experts: dict[int | str, tuple[ExpertRow, ...]] = {}
    for number, line in enumerate(content.get("expert_rows", ())):
        expert_row = _parse_expert_row(line, f"{name}, expert row {number}")
        _append(experts, expert_row.bits, expert_row, f"{name}, expert row {number}")
    every: list[Mapping[Any, tuple[Row | Int8Row | ExpertRow, ...]]] = [series, int8, experts]
    for key, rows in (item for part in every for item in part.items()):
        if rows[-1].m is not None:
            raise ValueError(f"{name}: the series {key} ends at m = {rows[-1].m}; its last row must have m null")
    for bits in (2, 4, 8):
        if (bits, None, None, None) not in series:
            raise ValueError(f"{name}: no series for {bits} bits, any group and any shape")
    pdl = content.get("pdl", False)
    return Table(content["gpu"], content["arch"], content["source"], multiprocessors, series, int8, experts, pdl)


def _append(series: dict[Any, tuple[Any, ...]], key: Any, row: Row | Int8Row | ExpertRow, where: str) -> None:
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
    return Row(line["bits"], line["group"], line["n"], line["k"], line["m"], _parse_tile(line["tile"], where))


def _parse_tile(tile: Any, where: str) -> Tile:
    if not isinstance(tile, list) or len(tile) != 6 or tile[0] not in FAMILIES:
        raise ValueError(
            f"{where}: tile must be [family, block_m, block_n, split_k, num_warps, num_stages], got {tile!r}"
        )
    sizes = [*tile[1:3], max(1, tile[3]) if isinstance(tile[3], int) else None, *tile[4:]]
    if not all(map(_natural, sizes)):
        raise ValueError(f"{where}: a tile's sizes must be positive integers (split_k may be 0), got {tile!r}")
    return Tile(*tile)


def _parse_expert_row(line: Any, where: str) -> ExpertRow:
    if not isinstance(line, dict) or set(line) != {"bits", "m", "tile"} or line["bits"] not in (2, 4, 8, "w8a8"):
        raise ValueError(f'{where}: a row has the keys bits (2, 4, 8 or "w8a8"), m and tile, got {line!r}')
    m, tile = line["m"], line["tile"]
    if m is not None and (isinstance(m, bool) or not isinstance(m, (int, float)) or not m > 0):
        raise ValueError(f"{where}: m must be a positive number or null, got {m!r}")
    if line["bits"] == "w8a8":
        if not isinstance(tile, list) or len(tile) != 6 or not all(map(_natural, tile)) or tile[3] != 1:
            raise ValueError(
                f"{where}: tile must be [block_m, block_n, block_k, 1, num_warps, num_stages], positive integers, "
                f"got {tile!r}"
            )
        return ExpertRow("w8a8", m, tuple(tile))
    parsed = _parse_tile(tile, where)
    if parsed.family != "triton" or parsed.split_k != 1:
        raise ValueError(f"{where}: experts have tiles of the triton family with split_k 1, got {tile!r}")
    return ExpertRow(line["bits"], m, parsed)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

"""Makes lowbit_kernels' table for the GPU at hand by measuring every shipped tile that fits. scripts/tune runs this.

    scripts/tune --out FOLDER               measure, then write FOLDER/<gpu>.json (resumable: --resume)
    scripts/tune --out FOLDER --install     and copy it to kernels/lowbit_kernels/tables/
    scripts/tune --predict                  rewrite the predicted tables of GPUs that nobody has measured; needs no GPU
    scripts/tune --dry-run                  the plan; needs no GPU

Each case is one shape, bits and number of tokens: every tile, alone and with the split that fills the GPU, and the
floor (dequantise in chunks, then cuBLAS) and the dense layer beside them, all in CUDA graphs over cold weights and
interleaved, after the result of each tile has been compared with float64. tune_table.py has the rule of choice. W8A8
likewise: every shipped tile of its own, quantization apart, the fastest is chosen (--bits w8a8: these alone); and the
experts of a mixture on one shape, by rows per expert (tune_experts.py, --bits experts). On the shape that stands for
any, with few tokens, the fastest tile is also launched to begin while the launch before ends (overlap.py); if that is
faster in the mean, the table says so for all. What is to be measured is compiled ahead, in parallel. The shape that
stands for any comes first, in every width: from then on a run that stops at --minutes writes the table of what it has.
--without leaves out what scripts/gpu_check --without does.
With --bits the widths that are not named keep the rows of the table that is there. Exit status: 0 done; 1 a tile failed
(it is named and left out, the table is written of the rest); 2 no GPU, or bad arguments; 3 stopped at --minutes,
--resume goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from check_main import LEFT_OUT
from check_stats import geometric_mean
from check_store import Store
from check_warm import Job, jobs_of
from tune_experts import Attempt, ExpertCase, expert_cases, expert_rows
from tune_predict import TABLES, current_table, write_predicted
from tune_table import FLOOR, M_BUCKETS, NOISE, Pick, pick, rows_of, shipped_tiles, table

from lowbit_kernels import int8_tiles
from lowbit_kernels.dispatch import fill_split
from lowbit_kernels.int8_tiles import HOPPER_TILES, TILES, Int8Tile
from lowbit_kernels.table import parse_table
from lowbit_kernels.tiles import FAMILIES, PDL_ARCH, Problem, Tile, fits

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 3
SHAPES = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
)
"""Linears of Llama 3 8B and 70B, fused. The 8192 x 8192 one also stands for any shape."""
ANY = (8192, 8192)
BITS = (4, 8, 2)
KINDS = ("4", "8", "2", "w8a8", "experts")
GROUP = 128
ROUNDS = 5
INT8_FIELDS = ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
PDL_TOKENS = (1, 4, 16, 64)
"""Where launches that overlap are tried, on the shape that stands for any: the fewer tokens the more they may gain."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    parser = argparse.ArgumentParser(
        prog="scripts/tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records.jsonl and the table")
    parser.add_argument("--resume", action="store_true", help="keep finished cases of the same sources and machine")
    parser.add_argument("--install", action="store_true", help="copy the table into the package")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop before a case that begins later than this")
    parser.add_argument("--bits", default=",".join(KINDS), help=f"what to tune, comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--without", default="", help=f"what to leave out, comma-separated, of {', '.join(LEFT_OUT)}")
    parser.add_argument("--predict", action="store_true", help="rewrite the predicted tables and end")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    options = parser.parse_args(arguments)
    asked = options.bits.split(",")
    if set(asked) - set(KINDS):
        parser.error(f"--bits must be of {', '.join(KINDS)}, got {options.bits!r}")
    options.without = tuple(name for name in options.without.split(",") if name)
    if set(options.without) - set(LEFT_OUT):
        parser.error(f"--without must be of {', '.join(LEFT_OUT)}, got {','.join(options.without)!r}")
    options.bits = tuple(bits for bits in BITS if str(bits) in asked)
    options.int8, options.experts = "w8a8" in asked, "experts" in asked
    if options.out is None and not (options.predict or options.dry_run):
        parser.error("--out FOLDER is needed")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


def cases(bits: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(bits, n, k, m) in the order of measuring: the shape that stands for any first, in every width."""
    shapes = [(width, n, k) for width in bits for n, k in SHAPES if width != 2 or (n, k) == ANY]
    return [(*shape, m) for shape in sorted(shapes, key=lambda shape: shape[1:] != ANY) for m in M_BUCKETS]


def candidates(problem: Problem, arch: int, multiprocessors: int) -> list[Tile]:
    """Every shipped tile that fits and may win, with no split and with the one that fills the GPU; and the floor."""
    found = []
    for tile in shipped_tiles(arch, FAMILIES, problem, fits):
        if tile.block_m > max(16, 2 * problem.m) or tile.block_m < min(64, problem.m // 8):
            continue  # more than half of the tile would be padding, or every weight is unpacked more than 8 times
        filled = fill_split(tile, problem, arch, multiprocessors)
        if tile.family == "scaled" and problem.m <= tile.block_m // 4:
            continue  # three quarters of what the tensor cores do would be padding
        for split in sorted({1, filled}):
            split_tile = replace(tile, split_k=split)
            if fits(split_tile, problem, arch):
                found.append(split_tile)
    return [*found, FLOOR]


def int8_cases() -> list[tuple[int, int, int]]:
    """(n, k, m) in the order of measuring."""
    return [(n, k, m) for n, k in sorted(SHAPES, key=lambda shape: shape != ANY) for m in M_BUCKETS]


def int8_candidates(m: int, n: int, k: int, arch: int, multiprocessors: int) -> list[Int8Tile]:
    """Every shipped tile of W8A8 that fits, with no split and with the one that fills the GPU."""
    found = []
    for tile in (*TILES, *HOPPER_TILES):
        if tile.block_m > max(16, 2 * m):
            continue  # more than half of the tile would be padding
        filled = int8_tiles.fill_split(tile, m, n, k, multiprocessors)
        for split in sorted({1, filled}):
            split_tile = replace(tile, split_k=split)
            if int8_tiles.why_not(split_tile, m, n, k, arch) is None:
                found.append(split_tile)
    return found


def plan(options: argparse.Namespace, arch: int, multiprocessors: int, dtype: Any) -> str:
    """What would be measured, for an architecture."""
    todo = work(options, arch, multiprocessors, dtype)
    tiles = [len(case.tiles) for case in todo]
    kernels = len({job for case in todo for job in case.jobs(arch)})
    return (
        f"sm_{arch}: {len(todo)} cases, {sum(tiles)} tiles in all, at most {max(tiles)} per case, "
        f"{kernels} kernels to compile, "
        f"{ROUNDS} rounds each; stops before a case that would begin after {options.minutes:g} minutes"
    )


def make_table(
    store: Store, about: dict[str, Any], multiprocessors: int, copy_bytes: float, *, asked: Sequence[int] = BITS
) -> dict[str, Any]:
    """The table of what has been measured; of widths that were not ``asked`` for, the rows of the table that is there.

    Raises:
        ValueError: a width that was asked for lacks the shape that stands for any.
    """
    picks: dict[tuple[int, int, int], list[Pick]] = {}
    for record in store.records("tune"):
        times = {Tile(*tile): seconds for tile, seconds in record["times"]}
        chosen = pick(record["m"], times, record["dense"])
        picks.setdefault((record["bits"], record["n"], record["k"]), []).append(chosen)
    rows: list[dict[str, Any]] = []
    for (bits, n, k), of_shape in picks.items():
        if len(of_shape) == len(M_BUCKETS):
            rows += rows_of(of_shape, bits=bits, group=GROUP, n=n, k=k)
            if (n, k) == ANY:
                rows += rows_of(of_shape, bits=bits)
    kept = current_table(about["arch"], about["gpu"])
    others = [bits for bits in BITS if bits not in asked and (bits, *ANY) not in picks]
    rows += [row for row in kept["rows"] if row["bits"] in others]
    slower = [
        f"{bits} bits, {n} x {k}, M = {chosen.m}: {chosen.over_dense:.2f}x"
        for (bits, n, k), of_shape in picks.items()
        for chosen in of_shape
        if chosen.over_dense < 1
    ]
    pdl = [record["pdl"] for record in store.records("tune") if record.get("pdl")]
    int8 = int8_rows(store.records("tune int8"))
    made = table(
        gpu=about["gpu"],
        arch=about["arch"],
        source="measured",
        about={
            **{key: about[key] for key in ("driver", "torch", "triton", "date", "sources")},
            "below_dense": slower,
            "pdl_over_plain": [round(ratio, 3) for ratio in pdl],
            **({"rows_kept": {str(bits): f"{kept['gpu']}, {kept['source']}" for bits in others}} if others else {}),
        },
        chip={"multiprocessors": multiprocessors, "bandwidth_gbs": round(copy_bytes / 1e9)},
        rows=rows,
    )
    made |= {"int8_rows": int8} if int8 else {}
    experts = expert_rows(store.records("tune experts"))
    made |= {"expert_rows": experts} if experts else {}
    made |= {"pdl": geometric_mean(pdl) < 1 - NOISE} if pdl else {}
    parse_table(made, "the new table")
    return made


def int8_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's lines for W8A8: of every shape with all buckets the fastest tiles; ANY's stand for any shape, too."""
    picks: dict[tuple[int, int], dict[int, Int8Tile]] = {}
    for record in records:
        times = {Int8Tile(*tile): seconds for tile, seconds in record["times"]}
        best = min(times, key=lambda tile: (times[tile], repr(tile)))
        picks.setdefault((record["n"], record["k"]), {})[record["m"]] = best
    lines: list[dict[str, Any]] = []
    for (n, k), of_shape in picks.items():
        if len(of_shape) < len(M_BUCKETS):
            continue
        for place in ((n, k), (None, None)) if (n, k) == ANY else ((n, k),):
            first = len(lines)
            for m in sorted(of_shape):
                tile = of_shape[m] if place == (n, k) else replace(of_shape[m], split_k=0)
                fields = [vars(tile)[name] for name in INT8_FIELDS]
                fields += [tile.family] if tile.family != "triton" else []
                line = {"n": place[0], "k": place[1], "m": m, "tile": fields}
                if len(lines) > first and lines[-1]["tile"] == line["tile"]:
                    lines[-1]["m"] = m
                else:
                    lines.append(line)
            lines[-1]["m"] = None
    return lines


@dataclass(frozen=True)
class Case:
    """One shape and number of tokens, and the tiles to measure on it; W8A8's where they are Int8Tiles.

    ``pdl``: also what the fastest of them gains when launches overlap.
    """

    problem: Problem
    tiles: tuple[Any, ...]
    int8: bool
    pdl: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Its part and name in the records."""
        p = self.problem
        size = f"{p.n}x{p.k} M={p.m}"
        return ("tune int8", f"w8a8 {size}") if self.int8 else ("tune", f"{p.bits} bits {size}")

    def jobs(self, arch: int) -> list[Job]:
        """What it launches, to compile that ahead."""
        return jobs_of(((self.problem, tile, False) for tile in self.tiles), arch)

    def measure(self, store: Store, attempt: Attempt) -> str:
        """Measure and keep; a line about it.

        Args:
            attempt: of a case, a tile and what makes its timer, the timer; None where the tile is to be left out.
        """
        from tune_measure import measure_case, measure_int8_case

        p, attempted = self.problem, partial(attempt, self.key[1])
        size = {"n": p.n, "k": p.k, "m": p.m}
        if self.int8:
            seconds = measure_int8_case(p.m, p.n, p.k, p.dtype, self.tiles, ROUNDS, attempted)
            store.add(*self.key, {**size, "times": _listed(seconds)})
            best = min(seconds, key=lambda tile: seconds[tile])
            return f"{self.key[1]}: {best} {seconds[best] * 1e6:.1f} us"
        times, dense, pdl = measure_case(p, self.tiles, ROUNDS, attempted, pdl=self.pdl)
        chosen = pick(p.m, times, dense)
        store.add(*self.key, {"bits": p.bits, **size, "times": _listed(times), "dense": dense, "pdl": pdl})
        return f"{self.key[1]}: {chosen.tile} {chosen.seconds * 1e6:.1f} us, {chosen.over_dense:.2f}x dense"


def _listed(times: Mapping[Any, float]) -> list[list[Any]]:
    return [[list(vars(tile).values()), seconds] for tile, seconds in times.items()]


def work(options: argparse.Namespace, arch: int, multiprocessors: int, dtype: Any) -> list[Case | ExpertCase]:
    """Every case of a run, in order: the shape that stands for any in all widths and W8A8, the experts, the others."""
    found = []
    for bits, n, k, m in cases(options.bits):
        problem = Problem(m, n, k, bits, GROUP, dtype)
        tiles = (tile for tile in candidates(problem, arch, multiprocessors) if tile.family not in options.without)
        pdl = arch >= PDL_ARCH and "pdl" not in options.without and (n, k) == ANY and m in PDL_TOKENS
        found.append(Case(problem, tuple(tiles), False, pdl))
    for n, k, m in int8_cases() if options.int8 else ():
        problem = Problem(m, n, k, 8, -1, dtype)
        int8 = (t for t in int8_candidates(m, n, k, arch, multiprocessors) if t.family not in options.without)
        found.append(Case(problem, tuple(int8), True))
    first = [case for case in found if (case.problem.n, case.problem.k) == ANY]
    experts = expert_cases(arch, dtype) if options.experts else []
    return [*first, *experts, *(case for case in found if case not in first)]


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; the exit status."""
    options = parse(arguments)
    if options.predict:
        for path in write_predicted():
            print(path)
        return DONE
    if options.dry_run:
        import torch

        for path in sorted(TABLES.glob("*.json")):
            known = json.loads(path.read_text(encoding="utf-8"))
            print(plan(options, known["arch"], known["chip"]["multiprocessors"], torch.bfloat16))
        return DONE
    from tune_run import tune  # which uses this module

    return tune(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

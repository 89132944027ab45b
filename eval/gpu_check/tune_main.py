"""Makes lowbit_kernels' table for the GPU at hand by measuring every shipped tile that fits. scripts/tune runs this.

    scripts/tune --out FOLDER               measure, then write FOLDER/<gpu>.json (resumable: --resume)
    scripts/tune --out FOLDER --install     and copy it to kernels/lowbit_kernels/tables/
    scripts/tune --predict                  rewrite the predicted tables of GPUs that nobody has measured; needs no GPU
    scripts/tune --dry-run                  the plan; needs no GPU

Each case is one shape, bits and number of tokens: every tile with a few splits, and the floor (dequantise in chunks,
then cuBLAS) and the dense layer beside them, all in CUDA graphs over cold weights and interleaved, after the result of
each tile has been compared with float64. tune_table.py has the rule of choice. W8A8 comes after: every shipped tile of
its own with a few splits, quantization apart, the fastest is chosen (--bits w8a8: these alone).
Exit status: 0 done; 1 a tile gave a wrong result; 2 no GPU, or bad arguments; 3 stopped at --minutes, --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from check_store import Store
from tune_predict import TABLES, table_file, to_text, write_predicted
from tune_table import FLOOR, M_BUCKETS, Pick, pick, rows_of, shipped_tiles, table

from lowbit_kernels import int8_tiles
from lowbit_kernels.dispatch import fill_split, parse_table
from lowbit_kernels.int8_tiles import TILES, Int8Tile
from lowbit_kernels.tiles import FAMILIES, Problem, Tile, cdiv, fits, step_columns

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
GROUP = 128
ROUNDS = 5


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    parser = argparse.ArgumentParser(
        prog="scripts/tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records.jsonl and the table")
    parser.add_argument("--resume", action="store_true", help="keep finished cases of the same sources and machine")
    parser.add_argument("--install", action="store_true", help="copy the table into the package")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop before a case that begins later than this")
    parser.add_argument("--bits", default="4,8,2,w8a8", help="what to tune, comma-separated, of 4, 8, 2, w8a8")
    parser.add_argument("--predict", action="store_true", help="rewrite the predicted tables and end")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    options = parser.parse_args(arguments)
    asked = options.bits.split(",")
    if set(asked) - {"2", "4", "8", "w8a8"}:
        parser.error(f"--bits must be of 2, 4, 8 and w8a8, got {options.bits!r}")
    options.bits, options.int8 = tuple(bits for bits in BITS if str(bits) in asked), "w8a8" in asked
    if options.out is None and not (options.predict or options.dry_run):
        parser.error("--out FOLDER is needed")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


def cases(bits: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(bits, n, k, m) in the order of measuring: the shape that stands for any first."""
    shapes = sorted(SHAPES, key=lambda shape: shape != ANY)
    return [(width, n, k, m) for width in bits for n, k in shapes for m in M_BUCKETS if width != 2 or (n, k) == ANY]


def candidates(problem: Problem, arch: int, multiprocessors: int) -> list[Tile]:
    """Every shipped tile that fits, with no split, the split that fills the GPU, and its neighbours; and the floor."""
    found = []
    for tile in shipped_tiles(arch, FAMILIES, problem, fits):
        if tile.block_m > max(16, 2 * problem.m) or (problem.m > 64 and tile.block_m < 16):
            continue  # more than half of the tile would be padding, or every weight is read dozens of times
        filled = fill_split(tile, problem, arch, multiprocessors)
        if tile.family == "scaled" and problem.m <= tile.block_m // 4:
            continue  # three quarters of what the tensor cores do would be padding
        steps = cdiv(problem.k, step_columns(problem.bits))
        for split in sorted({1, filled, max(1, filled // 2), min(16, 2 * filled, steps)}):
            split_tile = replace(tile, split_k=split)
            if fits(split_tile, problem, arch):
                found.append(split_tile)
    return [*found, FLOOR]


def int8_cases() -> list[tuple[int, int, int]]:
    """(n, k, m) in the order of measuring."""
    return [(n, k, m) for n, k in sorted(SHAPES, key=lambda shape: shape != ANY) for m in M_BUCKETS]


def int8_candidates(m: int, n: int, k: int, arch: int, multiprocessors: int) -> list[Int8Tile]:
    """Every shipped tile of W8A8 that fits, with no split, the split that fills the GPU, and its neighbours."""
    found = []
    for tile in TILES:
        if tile.block_m > max(16, 2 * m):
            continue  # more than half of the tile would be padding
        filled = int8_tiles.fill_split(tile, m, n, k, multiprocessors)
        for split in sorted({1, filled, max(1, filled // 2), min(16, 2 * filled, cdiv(k, tile.block_k))}):
            split_tile = replace(tile, split_k=split)
            if int8_tiles.why_not(split_tile, m, n, k, arch) is None:
                found.append(split_tile)
    return found


def plan(options: argparse.Namespace, arch: int, multiprocessors: int, dtype: Any) -> str:
    """What would be measured, for an architecture."""
    work = [
        len(candidates(Problem(m, n, k, bits, GROUP, dtype), arch, multiprocessors))
        for bits, n, k, m in cases(options.bits)
    ]
    if options.int8:
        work += [len(int8_candidates(m, n, k, arch, multiprocessors)) for n, k, m in int8_cases()]
    return (
        f"sm_{arch}: {len(work)} cases (bits, shape, tokens), {sum(work)} tiles in all, at most {max(work)} per case, "
        f"{ROUNDS} rounds each; stops before a case that would begin after {options.minutes:g} minutes"
    )


def make_table(store: Store, about: dict[str, Any], multiprocessors: int, copy_bytes: float) -> dict[str, Any]:
    """The table of what has been measured. ValueError when a width lacks the shape that stands for any."""
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
    slower = [
        f"{bits} bits, {n} x {k}, M = {chosen.m}: {chosen.over_dense:.2f}x"
        for (bits, n, k), of_shape in picks.items()
        for chosen in of_shape
        if chosen.over_dense < 1
    ]
    int8 = int8_rows(store.records("tune int8"))
    made = table(
        gpu=about["gpu"],
        arch=about["arch"],
        source="measured",
        about={**{key: about[key] for key in ("driver", "torch", "triton", "date", "sources")}, "below_dense": slower},
        chip={"multiprocessors": multiprocessors, "bandwidth_gbs": round(copy_bytes / 1e9)},
        rows=rows,
    )
    made |= {"int8_rows": int8} if int8 else {}
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
                line = {"n": place[0], "k": place[1], "m": m, "tile": list(vars(tile).values())}
                if len(lines) > first and lines[-1]["tile"] == line["tile"]:
                    lines[-1]["m"] = m
                else:
                    lines.append(line)
            lines[-1]["m"] = None
    return lines


def tune(options: argparse.Namespace) -> int:
    """Measure what is missing, write the table; the exit status."""
    import torch
    from check_correct import CheckFailed
    from check_device import NoGpu, about, require_gpu
    from check_time import chip_limits
    from tune_measure import measure_case

    try:
        device = require_gpu()
        store = Store(options.out, about(device), resume=options.resume)
    except (NoGpu, FileExistsError, ValueError) as error:
        print(f"scripts/tune: {error}", file=sys.stderr)
        return USAGE
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    dtype = torch.bfloat16 if store.about["arch"] >= 80 else torch.float16
    print(plan(options, store.about["arch"], multiprocessors, dtype), file=sys.stderr)
    deadline = time.monotonic() + 60 * options.minutes
    for bits, n, k, m in cases(options.bits):
        case = f"{bits} bits {n}x{k} M={m}"
        if store.has("tune", case):
            continue
        if time.monotonic() > deadline:
            print(f"stopped after {options.minutes:g} minutes; --resume goes on", file=sys.stderr)
            return STOPPED
        problem = Problem(m, n, k, bits, GROUP, dtype)
        try:
            times, dense = measure_case(problem, candidates(problem, store.about["arch"], multiprocessors), ROUNDS)
        except CheckFailed as error:
            print(f"scripts/tune: {error}", file=sys.stderr)
            return FAILED
        listed = [[list(vars(tile).values()), seconds] for tile, seconds in times.items()]
        store.add("tune", case, {"bits": bits, "n": n, "k": k, "m": m, "times": listed, "dense": dense})
        best = pick(m, times, dense)
        print(f"{case}: {best.tile} {best.seconds * 1e6:.1f} us, {best.over_dense:.2f}x dense", file=sys.stderr)
    if options.int8:
        status = _tune_int8(store, multiprocessors, dtype, deadline, options.minutes)
        if status != DONE:
            return status
    made = make_table(store, store.about, multiprocessors, chip_limits()["copy_bytes_per_s"])
    path = options.out / table_file(store.about["gpu"])
    path.write_text(to_text(made), encoding="utf-8")
    print(f"{path}: {len(made['rows'])} rows; below the dense layer: {len(made['about']['below_dense'])} cases")
    if options.install:
        shutil.copyfile(path, TABLES / path.name)
        print(f"installed as {TABLES / path.name}")
    return DONE


def _tune_int8(store: Store, multiprocessors: int, dtype: Any, deadline: float, minutes: float) -> int:
    from check_correct import CheckFailed
    from tune_measure import measure_int8_case

    for n, k, m in int8_cases():
        case = f"w8a8 {n}x{k} M={m}"
        if store.has("tune int8", case):
            continue
        if time.monotonic() > deadline:
            print(f"stopped after {minutes:g} minutes; --resume goes on", file=sys.stderr)
            return STOPPED
        try:
            times = measure_int8_case(
                m, n, k, dtype, int8_candidates(m, n, k, store.about["arch"], multiprocessors), ROUNDS
            )
        except CheckFailed as error:
            print(f"scripts/tune: {error}", file=sys.stderr)
            return FAILED
        listed = [[list(vars(tile).values()), seconds] for tile, seconds in times.items()]
        store.add("tune int8", case, {"n": n, "k": k, "m": m, "times": listed})
        best = min(times, key=lambda tile: times[tile])
        print(f"{case}: {best} {times[best] * 1e6:.1f} us", file=sys.stderr)
    return DONE


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
    return tune(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

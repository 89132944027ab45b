"""What scripts/gpu_check and scripts/tune measure, on the interpreter; and from times to a table of tiles."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gpu_check_modules import ABOUT, ROOT

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import tune_experts
import tune_main
import tune_run
from check_store import Store

from lowbit_kernels import grouped_tiles, int8_tiles
from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.table import parse_table
from lowbit_kernels.tiles import FAMILIES, Problem, Tile

MEASURING = """
import functools, sys, time, types
import torch
import check_measure, check_peers, tune_experts, tune_measure
from check_layers import Linear
from check_report import layer_rows, short_table
from tune_main import candidates, int8_candidates
from tune_table import pick
from lowbit_kernels.tiles import FAMILIES, Problem, Tile

class Timer:
    def __init__(self, calls):
        self.calls = list(calls)
        for call in self.calls:
            call()
    def __call__(self):
        start = time.perf_counter()
        self.calls[0]()
        return time.perf_counter() - start

for module in (check_measure, tune_measure):
    module.DEVICE, module.GraphTimer = torch.device("cpu"), Timer
    module.copies_for, module.free_memory = (lambda *_: 2), (lambda: 1 << 30)
check_measure.DTYPE, check_measure.clocks = torch.float16, dict

def absent(problem, copies):
    raise check_peers.Unavailable("not here")

check_peers.PEERS["here"] = lambda problem, copies: [lambda x: torch.zeros(x.shape[0], problem.n)] * copies
check_peers.PEERS["absent"] = absent
check_peers.PEERS["broken"] = lambda problem, copies: [lambda x: x @ x]
said, records = [], []
for mode in ("w4a16", "w8a16", "w8a8"):
    for name in ("qkv", "o", "gate_up", "down"):
        point = check_measure.Point(mode, "8b", Linear(name, 32, 128), 17)
        records.append(check_measure.measure(point, 80, "a GPU", ("here", "absent", "broken"), (), said.append))
rows = layer_rows(records)
assert [row["mode"] for row in rows] == ["w4a16", "w8a16", "w8a8"], rows
assert {"lowbit", "cublas bf16", "here"} <= set(rows[0]["seconds"]), rows[0]
assert not {"absent", "broken"} & set(rows[0]["seconds"])
assert any("absent: not here" in line for line in said) and any("broken failed" in line for line in said)
assert {"lowbit", "lowbit int8 matmul alone", "torch._int_mm"} <= set(rows[2]["seconds"]), rows[2]
assert all(0 < record["errors"]["lowbit"] < 4e-4 for record in records)
print(short_table(records))
assert all(record["peers"]["absent"] == "not measured: not here" for record in records if record["mode"] != "w8a8")
problem = Problem(2, 32, 128, 4, 128, torch.float16)
attempt = lambda tile, make: make()
times, dense, pdl = tune_measure.measure_case(problem, candidates(problem, 80, 108), 5, attempt)
assert len(times) >= 2 and pick(2, times, dense).seconds > 0 and pdl is None
small = {"EXPERTS": 6, "TOP": 2, "N": 32, "K": 128, "ROUTINGS": 2, "DEVICE": torch.device("cpu"), "GraphTimer": Timer}
vars(tune_experts).update(small)
for case in tune_experts.expert_cases(80, torch.float16):
    if case.tokens == 16:
        kept = types.SimpleNamespace(add=lambda part, name, record: records.append(record))
        assert "us" in case.measure(kept, lambda case, tile, make: make())
        assert len(records[-1]["times"]) == len(case.tiles) >= 1
times = tune_measure.measure_int8_case(2, 32, 512, torch.float16, int8_candidates(2, 32, 512, 80, 108), 5, attempt)
assert len(times) >= 1 and all(time > 0 for time in times.values())
print("measured")
"""


def test_what_measures_runs_on_the_interpreter():
    """Everything around the clock: contestants, checks, peers that are missing or broken, records, the table."""
    folders = [ROOT, ROOT / "kernels", ROOT / "eval" / "gpu_check"]
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    done = subprocess.run([sys.executable, "-c", MEASURING], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "w8a8" in done.stdout and done.stdout.endswith("measured\n")


ATOMICS = """
import torch
from check_atomics import atomic_matmul, has_atomic_form
from check_layers import random_packed, reference, relative_rms
from lowbit_kernels.tiles import Tile
torch.manual_seed(0)
for asymmetric in (False, True):
    packed = random_packed(40, 512, 4, 128, torch.float16, torch.device("cpu"), asymmetric=asymmetric)
    x, tile = torch.randn(3, 512).half(), Tile("triton", 16, 32, 2, 4, 2)
    assert has_atomic_form(packed, 3, tile) and not has_atomic_form(packed, 3, Tile("triton", 16, 32, 1, 4, 2))
    # fp32 sums of (1024 + code) * x, some 224 times what is left when 1024 * sum(x) is taken off; no other rounding
    assert relative_rms(atomic_matmul(packed, x, tile), reference(x, packed)) < 8 * 224 * 2**-24
print("right")
"""


def test_what_determinism_is_compared_with_is_right():
    """A slower or wrong kernel would be an easy peer: same main loop, fp32 sums by atomics."""
    folders = [ROOT, ROOT / "kernels", ROOT / "eval" / "gpu_check"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, "-c", ATOMICS], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and done.stdout == "right\n", done.stdout[-2000:] + done.stderr[-3000:]


# --- the tuner


def test_the_tuner_tries_every_shipped_tile_that_can_win():
    problem = Problem(1, 8192, 8192, 4, 128, torch.bfloat16)
    tiles = tune_main.candidates(problem, 90, 132)
    assert tune_main.FLOOR in tiles and len({tile.split_k for tile in tiles if tile.family == "triton"}) > 1
    assert all(tile.block_m <= 16 for tile in tiles if tile.family != "dequant")
    assert len(tiles) == len(set(tiles))


def tuned(store, bits, n, k, fused, floor, dense, without=()):
    for m in tune_main.M_BUCKETS:
        if m not in without:
            times = [[["triton", 16, 64, 3, 4, 4], fused * m], [["dequant", 1, 16, 1, 4, 4], floor]]
            store.add(
                "tune", f"{bits} {n} {k} {m}", {"bits": bits, "n": n, "k": k, "m": m, "times": times, "dense": dense}
            )


def test_a_measured_table_from_records(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    for bits in (2, 4, 8):
        tuned(store, bits, 8192, 8192, 1e-6, 1e-4, 8e-5)
    tuned(store, 4, 4096, 4096, 1e-6, 1e-4, 8e-5)
    tuned(store, 4, 4096, 14336, 1e-6, 1e-4, 8e-5, without=(64,))
    made = tune_main.make_table(store, ABOUT, 132, 4.3e12)
    table = parse_table(json.loads(json.dumps(made)), "x")
    assert (4, 128, 4096, 4096) in table.series and (4, 128, 4096, 14336) not in table.series, "one bucket is missing"
    rows = table.series[4, 128, 4096, 4096]
    assert [(row.m, row.tile.family) for row in rows] == [(64, "triton"), (None, "dequant")]
    assert rows[0].tile.split_k == 3 and table.series[4, None, None, None][0].tile.split_k == 0
    assert any("M = 4096: 0.80x" in line for line in made["about"]["below_dense"])


def test_a_measured_table_chooses_the_tiles_of_w8a8(tmp_path, monkeypatch):
    """The fastest of each bucket; another shape takes the nearest, or any's with the split that fills the GPU."""
    store = Store(tmp_path, ABOUT, resume=False)
    for bits in (2, 4, 8):
        tuned(store, bits, 8192, 8192, 1e-6, 1e-4, 8e-5)
    few, many = [16, 64, 256, 3, 4, 4], [128, 128, 128, 1, 8, 6, "gluon"]
    for n, k in ((8192, 8192), (4096, 4096), (6144, 4096)):
        for m in tune_main.M_BUCKETS[: 3 if n == 6144 else None]:
            record = {"n": n, "k": k, "m": m, "times": [[few, 1e-6 * m], [many, 4e-5 if n == 8192 else 9e-6]]}
            store.add("tune int8", f"{n} {k} {m}", record)
    table = parse_table(json.loads(json.dumps(tune_main.make_table(store, ABOUT, 132, 4.3e12))), "x")
    assert set(table.int8) == {(8192, 8192), (None, None), (4096, 4096)}, "one shape lacks buckets"
    assert [(row.m, row.tile[3]) for row in table.int8[8192, 8192]] == [(32, 3), (None, 1)]
    assert [(row.m, row.tile[3]) for row in table.int8[None, None]] == [(32, 0), (None, 0)]
    monkeypatch.setattr(int8_tiles, "table_for", lambda *_: table)
    pick_tile = int8_tiles.pick_tile.__wrapped__
    assert pick_tile(20, 8192, 8192, 90) == Int8Tile(*few)
    assert pick_tile(20, 4096, 4096, 90) == Int8Tile(*many)
    other = pick_tile(8, 200, 9000, 90)
    assert (other.block_m, other.block_n) == (16, 64)
    assert other.split_k == int8_tiles.fill_split(other, 8, 200, 9000, 132)
    assert pick_tile(4000, 4096, 4096, 86) != Int8Tile(*many), "does not fit there: the rule chooses"
    assert pick_tile(4000, 4096, 4100, 90).family == "triton", "rows that the copy engine cannot take"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"n": 8, "k": 8, "m": None, "tile": [16, 64]}], "block_m, block_n, block_k"),
        ([{"n": 8, "k": 8, "m": None, "tile": [16, 64, 256, 0, 4, 4, "cuda"]}], '"gluon" behind them'),
        ([{"n": 8, "k": None, "m": None, "tile": [16, 64, 256, 0, 4, 4]}], "given together"),
        ([{"n": 8, "k": 8, "m": 4, "tile": [16, 64, 256, 0, 4, 4]}], "must have m null"),
        ([{"n": 8, "k": 8, "tile": [16, 64, 256, 0, 4, 4]}], "exactly the keys n, k, m and tile"),
    ],
)
def test_a_wrong_table_of_w8a8_is_refused(rows, message, tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    for bits in (2, 4, 8):
        tuned(store, bits, 8192, 8192, 1e-6, 1e-4, 8e-5)
    made = tune_main.make_table(store, ABOUT, 132, 4.3e12)
    with pytest.raises(ValueError, match=message):
        parse_table({**made, "int8_rows": rows}, "x")


def test_the_tuner_tries_every_int8_tile_that_can_win():
    for m in (1, 64, 4096):
        tiles = tune_main.int8_candidates(m, 8192, 8192, 90, 132)
        assert len(tiles) == len(set(tiles)) and all(tile.block_m <= max(16, 2 * m) for tile in tiles)
        triton = {(tile.block_m, tile.block_n) for tile in tiles if tile.family == "triton"}
        assert len(triton) == (1 if m == 1 else 5 if m == 64 else 6)
        gluon = {tile.block_m for tile in tiles if tile.family == "gluon"}
        assert gluon == {1: set(), 64: {64, 128}, 4096: {64, 128, 256}}[m]
        assert not any(tile.family == "gluon" for tile in tune_main.int8_candidates(m, 8192, 8192, 80, 108))


def test_what_stands_for_any_shape_is_measured_first():
    """So a run that stops early has a table for every width; and a family may be left out."""
    options = tune_main.parse(["--dry-run", "--without", "gluon,scaled"])
    todo = tune_main.work(options, 90, 132, torch.bfloat16)
    first, experts, others = tune_run.parts(todo)
    assert [*first, *experts, *others] == todo and len({case.key for case in todo}) == len(todo)
    assert {(case.problem.n, case.problem.k) for case in first} == {tune_main.ANY} and experts and others
    assert len(first) == 4 * len(tune_main.M_BUCKETS)
    assert {tile.family for case in (*first, *others) if not case.int8 for tile in case.tiles} == {"triton", "dequant"}
    everything = tune_main.work(tune_main.parse(["--dry-run", "--bits", "4,8,2"]), 90, 132, torch.bfloat16)
    assert {tile.family for case in everything for tile in case.tiles} == set(FAMILIES)
    with pytest.raises(SystemExit):
        tune_main.parse(["--dry-run", "--without", "triton"])


def test_a_measured_table_chooses_the_tiles_of_the_experts(tmp_path):
    """By rows per expert in the mean; a width, or an architecture, for which it has none that fits takes the rule."""
    store = Store(tmp_path, ABOUT, resume=False)
    for bits in (2, 4, 8):
        tuned(store, bits, 8192, 8192, 1e-6, 1e-4, 8e-5)
    few, many = ["triton", 16, 64, 1, 2, 4, False], ["triton", 64, 128, 1, 8, 3, False]
    few8, many8 = [16, 64, 256, 1, 4, 4, "triton", False], [128, 128, 128, 1, 8, 3, "triton", False]
    for tokens, _ in tune_experts.BUCKETS:
        for bits, a, b in ((4, few, many), ("w8a8", few8, many8), (8, few, many)):
            if bits != 8 or tokens < 100:  # of 8 bits not everything has been measured
                record = {"bits": bits, "tokens": tokens, "times": [[a, 1e-6 * tokens], [b, 1e-4]]}
                store.add("tune experts", f"{bits} {tokens}", record)
    made = tune_main.make_table(store, ABOUT, 132, 4.3e12)
    assert made["expert_rows"] == [
        {"bits": 4, "m": 4, "tile": few[:6]}, {"bits": 4, "m": None, "tile": many[:6]},
        {"bits": "w8a8", "m": 4, "tile": few8[:6]}, {"bits": "w8a8", "m": None, "tile": many8[:6]},
    ]  # fmt: skip
    known = parse_table(json.loads(json.dumps(made)), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_tiles, "table_for", lambda *_: known)
        tile, tile8 = grouped_tiles.grouped_tile.__wrapped__, grouped_tiles.grouped_int8_tile.__wrapped__
        problem = Problem(8, 1536, 2048, 4, 128, torch.bfloat16)
        assert tile(problem, 128, 90) == tile(replace(problem, m=512), 128, 90) == Tile(*few)
        assert tile(replace(problem, m=513), 128, 90) == Tile(*many)
        assert tile(replace(problem, m=5000), 128, 90, batch_invariant=True) == tile(
            problem, 1, 90, batch_invariant=True
        )
        assert tile(replace(problem, bits=8), 128, 90) == Tile("triton", 8, 64, 1, 2, 4), "the rule"
        assert tile8(4 * 128, 128, 90) == Int8Tile(*few8) and tile8(5 * 128, 128, 90) == Int8Tile(*many8)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"bits": 3, "m": None, "tile": ["triton", 16, 64, 1, 2, 4]}, r'bits \(2, 4, 8 or "w8a8"\)'),
        ({"bits": 4, "m": 0, "tile": ["triton", 16, 64, 1, 2, 4]}, "m must be a positive number"),
        ({"bits": 4, "m": True, "tile": ["triton", 16, 64, 1, 2, 4]}, "m must be a positive number"),
        ({"bits": 4, "m": 0.5, "tile": ["triton", 16, 64, 1, 2, 4]}, "must have m null"),
        ({"bits": 4, "m": None, "tile": ["triton", 16, 64, 2, 2, 4]}, "split_k 1"),
        ({"bits": 4, "m": None, "tile": ["gluon", 16, 256, 1, 4, 5]}, "of the triton family"),
        ({"bits": 4, "m": None, "tile": [16, 64, 256, 1, 4, 4]}, r"tile must be \[family"),
        ({"bits": "w8a8", "m": None, "tile": [16, 64, 256, 2, 4, 4]}, "block_k, 1, num_warps"),
        ({"bits": "w8a8", "m": None, "tile": ["triton", 16, 64, 1, 2, 4]}, "block_k, 1, num_warps"),
    ],
)
def test_a_wrong_table_of_experts_is_refused(row, message, tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    for bits in (2, 4, 8):
        tuned(store, bits, 8192, 8192, 1e-6, 1e-4, 8e-5)
    made = tune_main.make_table(store, ABOUT, 132, 4.3e12)
    with pytest.raises(ValueError, match=message):
        parse_table({**made, "expert_rows": [row]}, "x")


@pytest.mark.parametrize("arch", [75, 80, 90, 100, 120])
def test_the_tuner_tries_the_experts_tiles_that_fit(arch):
    found = tune_experts.expert_cases(arch, torch.bfloat16)
    assert bool(found) is (arch >= 80) and len({case.key for case in found}) == len(found)
    for case in found:
        assert case.tiles and len(set(case.tiles)) == len(case.tiles), case
        assert all(tile.split_k == 1 and tile.block_m <= max(16, case.tokens // 4) for tile in case.tiles)


def test_what_the_tuner_launches_is_compiled_once():
    """A split of the scaled family is no other kernel; W8A8's tiles are among the jobs."""
    todo = tune_main.work(tune_main.parse(["--dry-run"]), 90, 132, torch.bfloat16)
    jobs = {job for case in todo for job in case.jobs(90)}
    assert len(jobs) < 1100 and {bool(job.experts) for job in jobs if isinstance(job.tile, Int8Tile)} == {True, False}
    assert {job.tile.split_k for job in jobs if isinstance(job.tile, Tile) and job.tile.family == "scaled"} == {1}


def test_an_incomplete_table_is_not_written(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    tuned(store, 4, 8192, 8192, 1e-6, 1e-4, 8e-5)
    with pytest.raises(ValueError, match="no series for 2 bits"):
        tune_main.make_table(store, ABOUT, 132, 4.3e12)

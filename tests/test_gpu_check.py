"""scripts/gpu_check and scripts/tune without a GPU: statistics, records, resumption, reports, and the suite itself."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "eval" / "gpu_check"))

import check_correct  # noqa: E402
import check_main  # noqa: E402
import check_run  # noqa: E402
import tune_main  # noqa: E402
from check_layers import LAYERS, dense_weight, poisoned_empty, random_packed, reference, relative_rms  # noqa: E402
from check_measure import MODES, TOKENS, points  # noqa: E402
from check_report import GOALS, layer_rows, short_table, write_all  # noqa: E402
from check_stats import COLD_BYTES, Timing, copies_for, geometric_mean, interleaved, median, quantile, ratio_text  # noqa: E402
from check_store import Store  # noqa: E402
from check_warm import jobs_of  # noqa: E402

from lowbit_kernels.dispatch import parse_table  # noqa: E402
from lowbit_kernels.tiles import Problem, Tile  # noqa: E402

ABOUT = {
    "gpu": "a GPU", "arch": 90, "driver": "1", "torch": "2", "triton": "3", "cuda": "13", "sources": "abc", "date": "d"
}  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


def script(name, *arguments, **environment):
    """Run scripts/NAME as a user does, with this interpreter."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = [str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


# --- statistics


def test_quantiles_interpolate():
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([4.0, 1.0]) == 2.5 and median([7.0]) == 7.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.25) == 2.0 and quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    for values, q in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError):
            quantile(values, q)


def test_a_timing_refuses_what_is_no_time():
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.0, 1.8, 4.2, 5)
    for bad in ([], [0.0], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="positive seconds"):
            Timing.of(bad)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        geometric_mean([1.0, 0.0])


def test_contestants_take_turns_and_order_alternates():
    order = []
    run = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    timings = interleaved(run, 5)
    assert "".join(order) == "abccbaabccbaabc"
    assert timings["a"].rounds == 5 and timings["a"].median == 7
    with pytest.raises(ValueError, match="at least 5 rounds"):
        interleaved(run, 4)


@pytest.mark.parametrize("weight", [1, 10_000, 8 << 20, 33 << 20, 127 << 20, COLD_BYTES, 1 << 30])
def test_a_rotation_is_colder_than_the_cache(weight):
    copies = copies_for(weight, 1 << 40)
    assert copies >= 2 and copies * weight > 100e6
    with pytest.raises(ValueError, match="do not fit"):
        copies_for(weight, 2 * weight - 1)
    assert copies_for(weight, 2 * weight) == 2


def test_a_missing_figure_is_a_dash():
    assert ratio_text(2.0, 5.0) == "2.50x" and ratio_text(None, 1.0) == ratio_text(1.0, None) == "-"


# --- records


def test_a_stopped_run_is_continued(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("w4a16", "one", {"x": 1})
    store.add("w4a16", "two", {"x": 2})
    with pytest.raises(FileExistsError, match="--resume"):
        Store(tmp_path, ABOUT, resume=False)
    again = Store(tmp_path, {**ABOUT, "date": "later"}, resume=True)
    assert again.has("w4a16", "one") and not again.has("w8a16", "one") and again.stale == 0
    assert [record["x"] for record in again.records("w4a16")] == [1, 2]


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "cuda", "sources"])
def test_records_of_something_else_are_not_reused(tmp_path, name):
    Store(tmp_path, ABOUT, resume=False).add("w4a16", "one", {"x": 1})
    other = Store(tmp_path, {**ABOUT, name: "another"}, resume=True)
    assert not other.has("w4a16", "one") and other.stale == 1


def test_a_line_cut_by_a_kill_costs_that_case_only(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("a", "one", {"x": 1})
    store.add("a", "two", {"x": 2})
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text()[:-20])
    again = Store(tmp_path, ABOUT, resume=True)
    assert again.has("a", "one") and not again.has("a", "two")
    again.add("a", "two", {"x": 3})
    assert [record["x"] for record in Store(tmp_path, ABOUT, resume=True).records()] == [1, 3]
    path.write_text('{"no": "record"}\n')
    with pytest.raises(ValueError, match="line 1 is not a record"):
        Store(tmp_path, ABOUT, resume=True)


# --- reports


def measured(mode, layer, m, linear, seconds):
    return {
        "mode": mode, "layer": layer, "linear": linear, "m": m, "n": 8, "k": 8, "bytes": 1000, "flops": 10_000,
        "seconds": seconds, "tiles": {"lowbit": "t"}, "errors": {"lowbit": 1e-3}, "spread": {}, "clocks": {},
    }  # fmt: skip


def test_a_layer_is_the_sum_of_its_linears():
    records = [
        measured("w4a16", "70b", 1, linear, {"lowbit": 1e-6, "cublas bf16": 3e-6, "humming": 2e-6})
        for linear in ("qkv", "o", "gate_up", "down")
    ]
    (row,) = layer_rows(records)
    assert row["seconds"]["lowbit"] == pytest.approx(4e-6) and row["bytes"] == 4000 and row["goal"] == 3.2
    assert layer_rows(records[:3]) == [], "three of four linears are no layer"
    del records[2]["seconds"]["humming"]
    (row,) = layer_rows(records)
    assert "humming" not in row["seconds"]
    table = short_table(records)
    assert "3.00x" in table and "3.20x" in table and "humming" not in table
    assert short_table([]) == "no layer is measured completely"


def test_every_row_of_the_goals_is_measured():
    cases = {(point.mode, point.layer, point.m) for point in points()}
    assert set(GOALS) <= cases
    assert len(list(points())) == len(MODES) * len(LAYERS) * len(TOKENS) * 4


def test_the_files_of_a_run(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("correct", "a check", {"ok": True, "figure": 1e-3})
    for linear in ("qkv", "o", "gate_up", "down"):
        store.add("w4a16", linear, measured("w4a16", "8b", 1, linear, {"lowbit": 1e-6, "cublas bf16": 2.5e-6}))
    store.add("host", "call", {"text": "5 us"})
    summary = write_all(store, tmp_path)
    assert "1 of 1 passed" in summary and "2.50x" in summary and "host: call: 5 us" in summary
    with (tmp_path / "linears.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["gpu"] for row in rows} == {"a GPU"}
    assert {row["x_cublas"] for row in rows if row["contestant"] == "lowbit"} == {"2.5"}
    assert (tmp_path / "layers.csv").exists() and (tmp_path / "checks.csv").exists()


# --- the run


def options(folder, **changes):
    return SimpleNamespace(
        **{"out": folder, "interpret": True, "minutes": 9.0, "parts": ("correct",), "peers": (), **changes}
    )


def run_with(folder, monkeypatch, checks, deadline=None, resume=False):
    monkeypatch.setattr(check_run, "checks", lambda *_, **__: iter(checks))
    store = Store(folder, ABOUT, resume=resume)
    deadline = time.monotonic() + 60 if deadline is None else deadline
    return check_run.Run(options(folder), store, torch.device("cpu"), deadline).all(), store


def check(name, result):
    def run():
        if isinstance(result, Exception):
            raise result
        return result

    return check_correct.Check(name, run)


def test_every_check_runs_and_a_failure_ends_the_run(tmp_path, monkeypatch, capsys):
    checks = [check("a", 0.5), check("b", check_correct.CheckFailed("off by 7")), check("c", 0.25)]
    status, store = run_with(tmp_path, monkeypatch, checks)
    assert status == 1 and [record["ok"] for record in store.records("correct")] == [True, False, True]
    assert "off by 7" in capsys.readouterr().err
    status, store = run_with(tmp_path, monkeypatch, [check("a", ValueError("run again")), check("b", 1.0)], resume=True)
    assert status == 1 or all(record["ok"] for record in store.records("correct"))


def test_a_failed_check_is_run_again_and_a_passed_one_is_not(tmp_path, monkeypatch):
    run_with(tmp_path, monkeypatch, [check("a", 1.0), check("b", check_correct.CheckFailed("no"))])
    again = [check("a", AssertionError("must not run again")), check("b", 2.0)]
    status, store = run_with(tmp_path, monkeypatch, again, resume=True)
    assert status == 0 and all(record["ok"] for record in store.records("correct"))


def test_no_case_begins_after_the_deadline(tmp_path, monkeypatch):
    status, store = run_with(tmp_path, monkeypatch, [check("a", 1.0)], deadline=time.monotonic() - 1)
    assert status == 3 and store.records() == [] and (tmp_path / "summary.txt").exists()


class Broken:
    """Stands for random weights multiplied by a kernel with a fault."""

    def __init__(self, packed, fault):
        self.packed, self.fault = packed, fault

    def __getattr__(self, name):
        return getattr(self.packed, name)

    def __call__(self, x, bias=None, **_):
        return self.fault(reference(x, self.packed, bias))


@pytest.mark.parametrize(
    "fault, seen",
    [
        (lambda out: (out * 1.01).half(), "relative RMS error 1.00e-02"),
        (lambda out: out.half().index_fill(1, torch.tensor([3]), float("nan")), "inf, allowed"),
        (lambda out: out.float(), "torch.float32, expected"),
        (lambda out: out[:, :-1].half(), r"got \(3, 39\)"),
        (lambda out: out.half().roll(1, 0), "elements stand out"),
    ],
    ids=["scale", "unwritten", "dtype", "shape", "rows"],
)
def test_a_wrong_result_does_not_pass(fault, seen):
    packed = random_packed(40, 64, 4, 32, torch.float16, torch.device("cpu"), asymmetric=True)
    x = torch.randn(3, 64).half()
    tile = Tile("triton", 16, 64)
    check_correct._compare(Broken(packed, lambda out: out.half()), x, tile, None, "a good kernel")
    with pytest.raises(check_correct.CheckFailed, match=seen):
        check_correct._compare(Broken(packed, fault), x, tile, None, "a bad kernel")


def test_the_reference_is_lowbits_formula():
    """The suite's own unpacking agrees with lowbit's, which the formats' tests check against other libraries."""
    from lowbit.affine import QuantizedWeight, dequantize
    from lowbit.packing import unpack_codes
    from lowbit.spec import QuantSpec

    for bits, group, asymmetric in ((4, 32, True), (8, -1, False), (2, 64, True)):
        packed = random_packed(37, 192, bits, group, torch.float16, torch.device("cpu"), asymmetric=asymmetric)
        zeros = None if packed.zeros is None else unpack_codes(packed.zeros, bits, 37, dim=0)
        weight = QuantizedWeight(
            unpack_codes(packed.words, bits, 192), packed.scales, zeros, QuantSpec(bits, group, not asymmetric)
        )
        assert torch.equal(dense_weight(packed, torch.float64), dequantize(weight, torch.float64))
        x = torch.randn(5, 192)
        assert relative_rms(reference(x, packed, step=16), x.double() @ dequantize(weight, torch.float64).t()) < 1e-14


def test_memory_is_poisoned_for_the_kernels_alone():
    namespace = {"torch": torch, "__name__": "lowbit_kernels.example"}
    exec("def make(): return torch.empty(4), torch.empty(4, dtype=torch.int32)", namespace)
    before = torch.empty
    with poisoned_empty():
        floats, integers = namespace["make"]()
        assert floats.isnan().all() and (integers == 0x7D).all()
    assert torch.empty is before


def test_kernels_are_compiled_ahead_once():
    tile = Tile("triton", 16, 64, 1, 4, 4)
    problems = [Problem(m, n, 4096, 4, 128, torch.bfloat16) for m in (1, 16, 64, 4096, 17, 33) for n in (4096, 57344)]
    jobs = jobs_of([(problem, tile) for problem in problems], 90)
    assert sorted(job.problem.m for job in jobs) == [1, 16, 17] and {job.problem.n for job in jobs} == {64}


# --- the commands


def test_the_suite_passes_on_the_interpreter(tmp_path):
    done = script("gpu_check", "--interpret", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "checks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 20 and {row["ok"] for row in rows} == {"True"}
    assert any("same bits" in row["check"] for row in rows) and any("invariance" in row["check"] for row in rows)
    assert any(row["check"].startswith("dequant") for row in rows)


@NO_GPU
@pytest.mark.parametrize("name", ["gpu_check", "tune"])
def test_without_a_gpu_it_says_so_in_one_sentence(name, tmp_path):
    done = script(name, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--out FOLDER is needed"),
        (["--out", "x", "--parts", "w3a16"], "w3a16; allowed are correct"),
        (["--out", "x", "--parts", ","], "nothing named"),
        (["--out", "x", "--peers", "vllm"], "vllm; allowed are"),
        (["--out", "x", "--minutes", "0"], "--minutes must be positive"),
    ],
)
def test_bad_arguments_of_gpu_check(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        check_main.main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_the_plan_needs_no_gpu():
    done = script("gpu_check", "--dry-run", "--parts", "correct,w4a16", "--minutes", "5")
    assert done.returncode == 0, done.stderr
    assert "w4a16: 40 cases" in done.stdout and "w8a16" not in done.stdout and "after 5 minutes" in done.stdout


MEASURING = """
import functools, sys, time, types
import torch
import check_measure, check_peers, tune_measure
from check_layers import Linear
from check_report import layer_rows, short_table
from tune_main import candidates
from tune_table import pick
from lowbit_kernels.tiles import Problem

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
        records.append(check_measure.measure(point, 80, "a GPU", ("here", "absent", "broken"), said.append))
rows = layer_rows(records)
assert [row["mode"] for row in rows] == ["w4a16", "w8a16", "w8a8"], rows
assert {"lowbit", "cublas bf16", "here"} <= set(rows[0]["seconds"]), rows[0]
assert not {"absent", "broken"} & set(rows[0]["seconds"])
assert any("absent: not here" in line for line in said) and any("broken failed" in line for line in said)
assert {"lowbit", "lowbit int8 matmul alone", "torch._int_mm"} <= set(rows[2]["seconds"]), rows[2]
assert all(0 < record["errors"]["lowbit"] < 4e-4 for record in records)
print(short_table(records))
problem = Problem(2, 32, 128, 4, 128, torch.float16)
times, dense = tune_measure.measure_case(problem, candidates(problem, 80, 108), 5)
assert len(times) >= 2 and pick(2, times, dense).seconds > 0
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


def test_an_incomplete_table_is_not_written(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    tuned(store, 4, 8192, 8192, 1e-6, 1e-4, 8e-5)
    with pytest.raises(ValueError, match="no series for 2 bits"):
        tune_main.make_table(store, ABOUT, 132, 4.3e12)


# --- the model's script


def test_generation_is_measured_on_a_tiny_shape(tmp_path):
    command = [sys.executable, ROOT / "eval" / "bench_generate.py", "--shape", "tiny", "--weights", "w4", "--json"]
    sizes = ["--prompt", "8", "--new", "4", "--rounds", "1", "--batches", "1,2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "x.json", *sizes], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["decode_tokens_per_s"] > 0 and row["peak_bytes"] > row["weight_bytes"] > 0 for row in rows)


@NO_GPU
def test_a_large_shape_needs_a_gpu(tmp_path):
    command = [
        sys.executable,
        ROOT / "eval" / "bench_generate.py",
        "--shape",
        "llama-3-8b",
        "--weights",
        "w4",
        "--json",
    ]
    done = subprocess.run([*command, tmp_path / "x.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr

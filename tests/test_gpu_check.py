"""scripts/gpu_check and eval/bench_generate.py without a GPU: the suite itself, a run, the commands."""

import csv
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from gpu_check_modules import ABOUT, ROOT

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import check_correct
import check_main
import check_run
from check_layers import dense_weight, poisoned_empty, random_packed, reference, relative_rms
from check_store import Store
from check_warm import jobs_of

from lowbit_kernels.tiles import Problem, Tile

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


def script(name, *arguments, **environment):
    """Run scripts/NAME as a user does, with this interpreter."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = [str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


# --- the run


def options(folder, **changes):
    return SimpleNamespace(
        **{
            "out": folder,
            "interpret": True,
            "minutes": 9.0,
            "tiny": False,
            "without": (),
            "parts": ("correct",),
            "peers": (),
            **changes,
        }
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [16, 33, 64, 200, 1023, 4096])
def test_a_perfect_result_passes_however_few_its_elements(elements, dtype):
    """Rounded once, nothing else wrong: one failure in 10,000 would end a run on a GPU now and then, for nothing."""
    exact = torch.randn(20_000_000 // max(elements, 1000), elements)
    errors = (exact.to(dtype).float() - exact).square().mean(1).sqrt() / exact.square().mean(1).sqrt()
    limit = check_correct.limit_of(dtype, elements)
    assert errors.max() < limit <= (2 if elements < 1024 else 1) * check_correct.LIMITS[dtype]


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
    jobs = jobs_of([(problem, tile, False) for problem in problems], 90)
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

"""eval/bench_calibration.py runs two tools in turn, each in a process of its own, and compares like with like."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.data import load_text

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "eval"
MODEL = EVAL / "data" / "books-4m"
CALIBRATION = EVAL / "data" / "books-calib.txt"


@pytest.fixture(scope="module")
def bench():
    """The script as a module, found as Python finds it when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVAL))
        yield importlib.import_module("bench_calibration")


RESULT = {
    "seconds": {"quantize": 2.0, "write": 0.5},
    "calibration": {"sha256": "x", "windows": 1, "seq_len": 2, "tokens": 2},
}


def child(code, result=RESULT):
    """A program that runs ``code``, saves four bytes into its first argument, a folder, and prints ``result``."""
    saving = (
        "import pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); (out / 'm.safetensors').write_text('1234')"
    )
    return f"{code}\n{saving}\nprint('a library speaks')\nprint({json.dumps(json.dumps(result))})"


def python_arm(bench, name, code="", result=RESULT):
    command = (sys.executable, "-c", child(code, result), "OUT")
    return bench.Arm(name, command, dict(os.environ))


def bench_arguments(*more):
    model = ["--model", str(MODEL), "--calibration", str(CALIBRATION), "--peer-python", sys.executable]
    return [*model, "--samples", "2", "--seq-len", "64", "--threads", "1", *more]


def test_the_lowbit_arm_is_measured(bench):
    """The real command."""
    run = bench.run_arm(bench.lowbit_arm(bench._parser().parse_args(bench_arguments("--asymmetric"))))
    assert 0 < run.calibrate_and_pack < run.whole
    assert run.calibration == {
        "sha256": load_text(CALIBRATION, "train").sha256, "windows": 2, "seq_len": 64, "tokens": 128,
    }  # fmt: skip
    # float32: embeddings of 4096 x 256, and 4 to 4.5 bits for each of the 3.1 M weights of the blocks.
    embeddings = 4096 * 256 * 4
    assert embeddings + 3.1e6 * 4 / 8 < run.saved_bytes < embeddings + 3.2e6 * 4.5 / 8
    assert run.peak_bytes > 100e6, "torch alone takes more"


def test_each_run_has_its_own_peak():
    """From a process as small as the script's own: what a child counts before exec() is its parent's memory.

    RUSAGE_CHILDREN would give the second process the first one's peak, and so would a parent that has torch loaded.
    """
    code = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); import bench_calibration as bench\n"
        "bench.lowbit_version()\n"
        "arms = [bench.Arm(name, (sys.executable, '-c', sys.argv[2], 'OUT', size), os.environ)\n"
        "        for name, size in (('large', '300'), ('small', '0'))]\n"
        "print(json.dumps([run.peak_bytes for run in bench.alternate(arms, 2)]))"
    )
    allocating = child("import sys; x = bytearray(int(sys.argv[2]) * 10**6)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(EVAL), allocating]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert min(peaks[::2]) > 300e6 and max(peaks[1::2]) < 100e6


def test_the_benchmark_stays_a_small_process():
    """Its own memory is the least that a child's peak can read."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import bench_calibration as b; b.lowbit_version(); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(EVAL)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_failed_run_is_reported_with_what_it_said(bench):
    arm = python_arm(bench, "peer", "raise SystemExit('no such recipe')")
    with pytest.raises(ValueError, match=r"peer failed with 1: no such recipe"):
        bench.run_arm(arm)


@pytest.mark.parametrize("stdout", ["", "done", "[1]", '{"seconds": {"quantize": 1}, "calibration": {}}', "{}"])
def test_a_run_without_its_times_is_an_error(bench, stdout):
    with pytest.raises(ValueError, match="peer did not end with a JSON object of seconds and calibration"):
        bench.parse_result(stdout, "peer")


def test_a_run_that_saves_nothing_is_an_error(bench):
    arm = bench.Arm("peer", (sys.executable, "-c", f"print({json.dumps(json.dumps(RESULT))})"), {})
    with pytest.raises(ValueError, match="peer wrote no safetensors file"):
        bench.run_arm(arm)


def test_the_two_arms_run_in_turn(bench):
    runs = bench.alternate([python_arm(bench, "a"), python_arm(bench, "b")], 2)
    assert [run.arm for run in runs] == ["a", "b", "a", "b"]
    assert all(run.calibrate_and_pack == 2.5 and run.saved_bytes == 4 and run.whole > 0 for run in runs)


def test_arms_that_calibrate_on_other_tokens_are_not_compared(bench):
    other = {**RESULT, "calibration": {**RESULT["calibration"], "sha256": "y"}}
    arms = [python_arm(bench, "a"), python_arm(bench, "b", result=other)]
    with pytest.raises(ValueError, match="not the same calibration"):
        bench.alternate(arms, 1)


def test_ratios_are_of_medians_and_of_pairs(bench):
    times = {"lowbit": (1.0, 2.0, 30.0), "peer": (4.0, 5.0, 6.0)}
    runs = [
        bench.Run(arm, times[arm][i], times[arm][i] / 2, 10**6, 10**6, RESULT["calibration"], {})
        for i in range(3)
        for arm in times
    ]
    summary = bench.summarize(runs)
    assert summary["whole"] == {"median": {"lowbit": 2.0, "peer": 5.0}, "ratio": 0.4, "pair_ratios": [0.25, 5.0]}
    assert summary["peak_bytes"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--model", str(EVAL)], "is not a model folder: it has no config.json"),
        (["--calibration", "wikitext2"], "must be an existing .txt or .jsonl file, got 'wikitext2'"),
        (["--peer-python", "/nowhere/python"], "'/nowhere/python' is no interpreter"),
        ([], "has no llmcompressor"),
    ],
)
def test_the_benchmark_refuses_before_the_first_run(bench, tmp_path, capsys, more, message):
    if not more and importlib.util.find_spec("llmcompressor"):
        pytest.fail("llmcompressor is no dependency of lowbit and must not be in its environment")
    assert bench.main(bench_arguments("--out", str(tmp_path / "b"), *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_calibration: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written_with_settings_and_every_run(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_check", lambda options: None)
    monkeypatch.setattr(bench, "lowbit_arm", lambda options: python_arm(bench, "lowbit"))
    theirs = {**RESULT, "seconds": {"quantize": 4.0, "write": 1.0}, "versions": {"llmcompressor": "7.8.9"}}
    monkeypatch.setattr(bench, "peer_arm", lambda options: python_arm(bench, "llm-compressor", result=theirs))
    assert bench.main(bench_arguments("--out", str(tmp_path / "b"), "--repeat", "2")) == 0
    text = (tmp_path / "b.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| calibrate and pack, s | 2.50 | 5.00 | 0.500 (0.500 to 0.500) |" in text
    assert "w4g128sym in float32" in text and "llmcompressor 7.8.9" in text and "1 threads" in text
    record = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert len(record["runs"]) == 4 and record["setting"]["samples"] == 2


def test_the_peers_script_knows_the_options_it_is_given(bench):
    """It cannot be imported here, its dependencies live in another environment."""
    given = {
        word
        for symmetry in ("--symmetric", "--asymmetric")
        for word in bench.peer_arm(bench._parser().parse_args(bench_arguments(symmetry))).command
        if word.startswith("--")
    }
    calls = (node for node in ast.walk(ast.parse(bench.PEER_SCRIPT.read_text(encoding="utf-8"))) if is_option(node))
    known = {argument.value for node in calls for argument in node.args if isinstance(argument, ast.Constant)}
    assert len(given) > 8 and given <= known


def is_option(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"

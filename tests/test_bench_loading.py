"""eval/bench_loading.py measures in processes of its own, compares with its bounds, and refuses what makes no sense."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "eval" / "bench_loading.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("bench_loading", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_child_says_what_a_load_costs(bench, tmp_path):
    bench.make_folders(tmp_path, *bench.TINY)
    _, packed = bench.make_folders(tmp_path, 256, 1)
    done = run("--child", "installed", "--work", packed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size = (packed / "model.safetensors").stat().st_size
    assert found["tensors"] == found["tensors after generate"] == pytest.approx(size, rel=0.01)
    assert found["peak"] > 0.5 * size and 0 < found["seconds"] < 60


def results(bench, **changes):
    one = {"seconds": 1.0, "cpu seconds": 1.0, "peak": 100.0, "tensors": 90.0, "first seconds": 0.1, "first peak": 1.0}
    one |= {"tensors after generate": 90.0, "resident after generate": 95.0}
    found = {kind: dict(one) for kind in bench.KINDS}
    for kind, fields in changes.items():
        found[kind] |= fields
    return found


def test_every_bound_is_compared(bench, tmp_path):
    rows = bench.rows_of(results(bench), file_bytes=100, largest=10)
    assert [row["met"] for row in rows if row["bound"]] == ["yes"] * 6
    for change, missed in [
        ({"load": {"seconds": 1.3}}, ("lowbit.load", "time")),
        ({"installed": {"peak": 131.0}}, ("installed", "peak memory")),
        ({"onthefly": {"peak": 101.0}}, ("LowbitConfig(4)", "peak memory")),
        ({"installed": {"tensors after generate": 101.0}}, ("installed", "model after generate")),
    ]:
        rows = bench.rows_of(results(bench, **change), file_bytes=100, largest=10)
        assert [(row["what"], row["figure"]) for row in rows if row["met"] == "NO"] == [missed]
    bench.write(rows, "a machine", tmp_path / "loading")
    written = list(csv.DictReader((tmp_path / "loading.csv").read_text(encoding="utf-8").splitlines()))
    assert len(written) == len(rows) and all(row["about"] == "a machine" for row in written)
    assert "| installed | model after generate |" in (tmp_path / "loading.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", 100), "--hidden must be a multiple of 128 above 128"),
        (("--rounds", 0), "--layers and --rounds at least 1, got 2048, 8, 0"),
        (("--out", "no/such/folder/x"), "no folder no/such/folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr

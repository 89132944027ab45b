"""eval/bench_overhead.py runs, writes what it says, and refuses what makes no sense."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, str(ROOT / "eval" / "bench_overhead.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_every_kind_of_layer_gets_a_host_time(tmp_path):
    out = tmp_path / "overhead.csv"
    done = run("--device", "cpu", "--calls", 3, "--rounds", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    kinds = {"nn.Linear", *(f"QuantLinear {s}" for s in ("w4g32sym", "w4g32asym", "w8gchsym")),
             "Int8Linear w8a8gchsym", "Int8Linear w8a8staticgchsym"}  # fmt: skip
    assert {row["what"] for row in rows if row["figure"] == "host"} == kinds
    assert {row["what"] for row in rows if row["figure"] == "implementation"} == kinds - {"nn.Linear"}
    assert all(0 < float(row["least_us"]) <= float(row["median_us"]) for row in rows)
    assert all("torch" in row["about"] and "bench_overhead.py" in row["command"] for row in rows)
    assert all(kind in done.stdout for kind in kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calls", 0), "--calls and --rounds must be at least 1, got 0 and 7"),
        (("--out", "no/such/folder/x.csv"), "no folder no/such/folder"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr

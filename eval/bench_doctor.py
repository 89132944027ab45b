"""How long `lowbit doctor` takes on a packed 70B model: real headers and index, holes where the weights would be.

    python eval/bench_doctor.py [--out eval/results/doctor.md]

Three figures: the call in a process that has imported it, the command from start to exit, and the CPU time of the
command, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from provenance import ROOT, command_line, cpu_name, lowbit_version, version

sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from lowbit.doctor import diagnose  # noqa: E402
from sparse_folder import write_sparse  # noqa: E402

MODELS = {  # layers, shards, hidden, inner
    "70B (Llama 3), w4g128": (80, 15, 8192, 28672),
    "405B (Llama 3.1), w4g128": (126, 70, 16384, 53248),
}
REPEATS = 7


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Sorted times of ``REPEATS`` runs."""
    times = []
    for _ in range(REPEATS):
        start = clock()
        run()
        times.append(clock() - start)
    return sorted(times)


def children_cpu() -> float:
    """CPU seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def row(name: str, layers: int, shards: int, hidden: int, inner: int) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        read = write_sparse(folder, layers, shards, hidden, inner)
        size = sum(path.stat().st_size for path in folder.iterdir())
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        command = [sys.executable, "-m", "lowbit", "doctor", str(folder)]
        call = seconds(lambda: diagnose(folder))
        process, cpu = (
            seconds(lambda: subprocess.run(command, env=environment, check=True, capture_output=True), clock)
            for clock in (time.perf_counter, children_cpu)
        )
    figures = (f"{statistics.median(times):.3f} ({times[0]:.3f} - {times[-1]:.3f})" for times in (call, process, cpu))
    return f"| {name} | {size / 1e9:.1f} GB in {shards} | {read / 1e3:.0f} kB | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "doctor.md")
    out = parser.parse_args().out
    versions = f"lowbit {lowbit_version()}, Python {sys.version.split()[0]}, rich {version('rich')}"
    lines = [
        f"`{command_line()}`: {cpu_name()}; {versions}; load average of other work {os.getloadavg()[0]:.1f}. Seconds: "
        f"median of {REPEATS} (smallest - largest).",
        "",
        "| model | files | read | the call | the command | its CPU time |",
        "|---|---|---|---|---|---|",
        *(row(name, *sizes) for name, sizes in MODELS.items()),
    ]
    text = "\n".join([*lines, ""])
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

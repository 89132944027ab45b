"""Wall time and peak memory of `lowbit quantize --method gptq` beside llm-compressor's GPTQ, on the same tokens.

    PYTHONPATH=.:kernels PEER/bin/python eval/bench_calibration.py --model MODEL --calibration FILE \\
        --peer-python PEER/bin/python [--out PREFIX]

Each run is a process of its own, the two tools in turn, A B A B ...; each loads the model, calibrates on the same
windows in the same dtype with the same number of threads, packs and saves. PEER is an environment with llmcompressor
(eval/peers/llmcompressor_gptq.py runs in it). lowbit runs in the interpreter that runs this script: with PEER's own, to
which greenlet, rich, triton and typer were added, both tools run on the same libraries, whose imports differ by 50 MB
between versions. Writes PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from provenance import ROOT, command_line, cpu_name, gpu_name, lowbit_version, short_name, usable_cores, version

PEER_SCRIPT = ROOT / "eval" / "peers" / "llmcompressor_gptq.py"


@dataclass(frozen=True)
class Arm:
    """One of the two tools: the command that quantizes, OUT standing for the folder to write, and its environment."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        arm: which tool.
        whole: wall time from its start to its end, in seconds.
        calibrate_and_pack: wall time of quantizing and writing alone, by the tool's own clock, in seconds.
        peak_bytes: largest resident set of the process, of its children if theirs was larger.
        saved_bytes: the safetensors files it wrote.
        calibration: sha256, windows, seq_len, tokens: what it calibrated on.
        versions: what it says of itself, by package; empty for lowbit, which runs in this interpreter's environment.
    """

    arm: str
    whole: float
    calibrate_and_pack: float
    peak_bytes: int
    saved_bytes: int
    calibration: dict[str, Any]
    versions: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 2 where the input is at fault or a run failed."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        hardware = f"{cpu_name()}, {options.threads} threads" if options.device == "cpu" else gpu_name()
        runs = alternate([lowbit_arm(options), peer_arm(options)], options.repeat)
        _write(options, summarize(runs), runs, hardware)
    except (ValueError, OSError) as error:
        print(f"bench_calibration: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER")
    add("--calibration", required=True, metavar="FILE", help="a .txt or .jsonl file")
    add("--peer-python", required=True, metavar="PATH", help="interpreter of an environment with llmcompressor")
    add("--samples", type=int, default=128, help="calibration windows (default %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens per window, at most the model's context (default %(default)s)")
    add("--bits", type=int, default=4, choices=(2, 4, 8), help="(default %(default)s)")
    add("--group-size", type=int, default=128, help="(default %(default)s)")
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--symmetric", action="store_true", default=True, help="the default")
    symmetry.add_argument("--asymmetric", dest="symmetric", action="store_false")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cpu hides the GPUs from both (default %(default)s)")
    add("--threads", type=int, default=usable_cores(), help="of both tools (default %(default)s)")
    add("--repeat", type=int, default=3, help="runs of each tool (default %(default)s)")
    default = ROOT / "eval" / "results" / "calibration"
    add("--out", default=str(default), metavar="PREFIX", help="writes PREFIX.json and PREFIX.md")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuses what would only be noticed after the first run.

    Raises:
        ValueError, FileNotFoundError: names the option and what is allowed.
    """
    for name in ("samples", "threads", "repeat"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not Path(options.model, "config.json").is_file():
        raise FileNotFoundError(f"--model {options.model!r} is not a model folder: it has no config.json")
    if Path(options.calibration).suffix not in (".txt", ".jsonl") or not Path(options.calibration).is_file():
        raise FileNotFoundError(f"--calibration must be an existing .txt or .jsonl file, got {options.calibration!r}")
    if not os.access(options.peer_python, os.X_OK) or Path(options.peer_python).is_dir():
        raise FileNotFoundError(f"--peer-python {options.peer_python!r} is no interpreter")
    probe = [options.peer_python, "-c", "import importlib.metadata as m; print(m.version('llmcompressor'))"]
    found = subprocess.run(probe, capture_output=True, text=True, env=_environment(options))
    if found.returncode != 0:
        raise ValueError(f"--peer-python {options.peer_python!r} has no llmcompressor: {found.stderr.strip()[-200:]}")


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Both tools': the same number of threads, the same devices, no network, nothing of this process's Python."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def lowbit_arm(options: argparse.Namespace) -> Arm:
    """The command line of this repository, in this interpreter."""
    command = (sys.executable, "-m", "lowbit", "quantize", options.model, "OUT", "--method", "gptq", "--json")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**_environment(options), "PYTHONPATH": path}
    return Arm("lowbit", (*command, "--device", options.device, *_shared_arguments(options)), environment)


def peer_arm(options: argparse.Namespace) -> Arm:
    """llm-compressor in its own interpreter."""
    command = (options.peer_python, str(PEER_SCRIPT), options.model, "OUT", "--method", "gptq")
    return Arm("llm-compressor", (*command, *_shared_arguments(options)), _environment(options))


def _shared_arguments(options: argparse.Namespace) -> tuple[str, ...]:
    named = ("calibration", "samples", "seq_len", "bits", "group_size", "dtype")
    pairs = ((f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in named)
    symmetry = "--symmetric" if options.symmetric else "--asymmetric"
    return (*(word for pair in pairs for word in pair), symmetry)


def alternate(arms: Sequence[Arm], repeat: int) -> list[Run]:
    """Runs the arms in turn, ``repeat`` times each, and says so on stderr.

    Raises:
        ValueError: a run failed, or the arms did not calibrate on the same tokens.
    """
    runs: list[Run] = []
    for number in range(repeat):
        for arm in arms:
            run = run_arm(arm)
            if run.calibration != (runs or [run])[0].calibration:
                raise ValueError(f"not the same calibration: {runs[0].calibration} and, {arm.name}, {run.calibration}")
            runs.append(run)
            print(
                f"{number + 1}/{repeat} {arm.name}: whole {run.whole:.1f} s, calibrate and pack "
                f"{run.calibrate_and_pack:.1f} s, peak {run.peak_bytes / 1e6:.0f} MB",
                file=sys.stderr,
            )
    return runs


def run_arm(arm: Arm) -> Run:
    """One process of an arm, from its start to its end.

    Raises:
        ValueError: it failed, or did not end with the JSON object that tells its times.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [str(out) if word == "OUT" else word for word in arm.command]
        with open(Path(folder, "stdout"), "w+") as stdout, open(Path(folder, "stderr"), "w+") as stderr:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=arm.environment)
            try:
                # The usage of this child alone; RUSAGE_CHILDREN is the largest of all children so far. What it counts
                # before exec() is this process's, which therefore imports neither torch nor lowbit's heavy parts.
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            whole = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            stdout.seek(0)
            stderr.seek(0)
            if process.returncode != 0:
                raise ValueError(f"{arm.name} failed with {process.returncode}: {stderr.read().strip()[-2000:]}")
            result = parse_result(stdout.read(), arm.name)
        saved = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        if not saved:
            raise ValueError(f"{arm.name} wrote no safetensors file")
        return Run(
            arm=arm.name,
            whole=whole,
            calibrate_and_pack=result["seconds"]["quantize"] + result["seconds"]["write"],
            peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            saved_bytes=saved,
            calibration={name: result["calibration"][name] for name in ("sha256", "windows", "seq_len", "tokens")},
            versions=result.get("versions", {}),
        )


def parse_result(stdout: str, arm: str) -> dict[str, Any]:
    """The JSON object on the last line of a child's stdout; libraries may have printed before it.

    Raises:
        ValueError: there is none, or it lacks the times or what was calibrated on.
    """
    line = (stdout.strip().splitlines() or [""])[-1]
    try:
        result = json.loads(line)
        complete = {"quantize", "write"} <= set(result["seconds"]) and {"sha256", "tokens"} <= set(
            result["calibration"]
        )
    except (json.JSONDecodeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{arm} did not end with a JSON object of seconds and calibration, but with {line[-200:]!r}")
    found: dict[str, Any] = result
    return found


MEASURES = {
    "whole": ("whole process, s", 1.0),
    "calibrate_and_pack": ("calibrate and pack, s", 1.0),
    "peak_bytes": ("peak resident memory, MB", 1e6),
    "saved_bytes": ("safetensors written, MB", 1e6),
}


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per measure: each arm's median, the first's over the second's, and the smallest and largest ratio of one pair."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    summary = {}
    for measure in MEASURES:
        first, second = ([float(getattr(run, measure)) for run in runs if run.arm == arm] for arm in arms)
        ratios = [ours / theirs for ours, theirs in zip(first, second, strict=True)]
        medians = dict(zip(arms, map(statistics.median, (first, second)), strict=True))
        summary[measure] = {
            "median": medians,
            "ratio": medians[arms[0]] / medians[arms[1]],
            "pair_ratios": [min(ratios), max(ratios)],
        }
    return summary


def _write(options: argparse.Namespace, summary: dict[str, dict[str, Any]], runs: Sequence[Run], hardware: str) -> None:
    setting = {
        "model": short_name(options.model),
        "calibration": short_name(options.calibration),
        "spec": f"w{options.bits}g{options.group_size}{'sym' if options.symmetric else 'asym'}",
        **{name: getattr(options, name) for name in ("samples", "seq_len", "dtype", "device", "threads", "repeat")},
        "hardware": hardware,
        "lowbit": lowbit_version(),
        "versions": {
            "lowbit": {name: version(name) for name in ("torch", "transformers")},
            "llm-compressor": runs[-1].versions,
        },
        "command": command_line(),
    }
    prefix = Path(options.out)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(setting, summary)
    record = {"setting": setting, "summary": summary, "runs": [asdict(run) for run in runs]}
    Path(f"{prefix}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Path(f"{prefix}.md").write_text(table, encoding="utf-8")
    print(table)


def markdown(setting: dict[str, Any], summary: dict[str, dict[str, Any]]) -> str:
    """The medians as a table, with what they were measured on."""
    arms = list(summary["whole"]["median"])
    lines = [
        "# Calibration: time and memory\n",
        f"GPTQ of {setting['model']} to {setting['spec']} in {setting['dtype']}, calibrated on the first "
        f"{setting['samples']} windows of {setting['seq_len']} tokens of {setting['calibration']}. Medians of "
        f"{setting['repeat']} runs of each tool, in turn, each a process of its own; behind the ratio the smallest and "
        "largest of one pair of runs.\n",
        f"| | {' | '.join(arms)} | ratio |",
        "|---|---:|---:|---:|",
    ]
    for measure, (label, unit) in MEASURES.items():
        row = summary[measure]
        cells = " | ".join(f"{row['median'][arm] / unit:.2f}" for arm in arms)
        low, high = row["pair_ratios"]
        lines.append(f"| {label} | {cells} | {row['ratio']:.3f} ({low:.3f} to {high:.3f}) |")
    lines.append(
        "\nCalibrate and pack: from the loaded model and the tokenized text to the end of writing, by each "
        "tool's own clock. Whole process: interpreter, imports and loading as well. Memory: ru_maxrss of the process.\n"
    )
    versions = {"lowbit": {"lowbit": setting["lowbit"], **setting["versions"]["lowbit"]}}
    versions["llm-compressor"] = setting["versions"]["llm-compressor"]
    lines += [
        f"- {arm}: {', '.join(f'{name} {v}' for name, v in packages.items())}" for arm, packages in versions.items()
    ]
    lines += [f"- {setting['hardware']}", f"- `{setting['command']}`"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""Wall time and peak memory of `lowbit quantize --method gptq` beside llm-compressor's GPTQ, on the same tokens.

    python eval/bench_calibration.py --model MODEL --calibration FILE --peer-python PEER/bin/python [--out PREFIX]

Each run is a process of its own, the two tools in turn, A B A B ...; each loads the model, calibrates on the same
windows in the same dtype with the same number of threads, packs and saves. PEER is an environment with llmcompressor
(eval/peers/llmcompressor_gptq.py runs in it). Writes PREFIX.json and PREFIX.md.
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
        calibrate_and_pack: wall time of quantizing and writing alone, as the tool itself measured it, in seconds.
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
    asymmetric = argparse.BooleanOptionalAction
    add("--symmetric", action=asymmetric, default=True, help="or --asymmetric (default symmetric)")
    add("--asymmetric", dest="symmetric", action="store_false", help=argparse.SUPPRESS)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cpu hides the GPUs from both (default %(default)s)")
    add("--threads", type=int, default=usable_cores(), help="of both tools (default %(default)s)")
    add("--repeat", type=int, default=3, help="runs of each tool (default %(default)s)")
    default = ROOT / "eval" / "results" / "calibration"
    add("--out", default=str(default), metavar="PREFIX", help="writes PREFIX.json and PREFIX.md")
    return parser

"""Does SGLang read our files as we mean them? Every format lowbit writes, loaded into SGLang's engine on the CPU.

    scripts/check_sglang        (or `python scripts/check_sglang.py` in lowbit's environment)

Each checkpoint meets SGLang twice. Alone: what SGLang 0.5.23 does with it on this CPU, which for quantized weights is
to ask for CUDA; its message is listed. With stand-ins for the kernels that only a GPU has (sglang_stand_ins.py): SGLang
chooses the scheme, creates and fills its parameters and rearranges them for Marlin, and torch multiplies instead of the
kernel. Then two things are asked. Loaded: between filling and rearranging every parameter must hold exactly what the
checkpoint says, q, k, v and gate, up and the experts merged, nothing left unfilled, no tensor of ours left out.
Computed: the greedy tokens and log-probabilities, against lowbit's as in scripts/check_vllm.

Exit code: 0 when every checkpoint that SGLang loads is filled exactly and computes within its limit, and what is
refused is refused as lowbit doctor's table says, 1 otherwise, 2 for bad arguments or too few decided prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_check as shared
import sglang_environment as environment
import sglang_tensors
import vllm_cases
from engine_reference import Reference
from sglang_report import markdown, print_table
from vllm_cases import Case

ROOT = Path(__file__).resolve().parent.parent
ALONE, STOOD_IN = "alone", "kernels stood in for"
REFUSED = {"w2", "w8-asym", "w8a8-static", "moe-w4-asym", "moe-w8a8"}
"""What no SGLang runs, whatever the machine: rows of lowbit/engines.json with the verdict refused for every GPU."""
CASES = tuple(
    replace(case, runs=(ALONE,) if case.options is None and case.to is None else (ALONE, STOOD_IN))
    for case in (
        *vllm_cases.CASES,
        Case("moe-gptq", "MoE, GPTQ v1, W4 symmetric", source="moe-w4", to="gptq"),
        Case("moe-awq", "MoE, AWQ, W4 asymmetric", source="moe-w4-asym", to="awq"),
    )
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    names = [case.name for case in CASES]
    parser = shared.arguments(__doc__, "SGLang", environment.default_folder(), names, time_limit=300)
    options = shared.checked(parser, arguments, names)
    if sys.version_info < (3, 11):
        parser.error(f"SGLang needs Python 3.11, this is {sys.version.split()[0]}")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    with shared.working_folder(options.work) as work, tempfile.TemporaryDirectory() as temporary:
        try:
            python = environment.prepare(options.env)
            made = shared.prepared([case for case in CASES if case.name in options.names], work, options)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        result = about(options, environment.installed(python))
        answers = run_engine(made, options, Path(temporary))
        for case, folder, ours in made:
            for how in case.runs:
                row = judge(case, how, folder, answers[case.name, how], ours)
                environment.say("{format}: {engine}: {verdict}".format_map(row))
                result["rows"].append(row)
        shared.write(result, options.out, markdown)
    print(json.dumps(result, indent=1)) if options.json else print_table(result)
    return int(any(row["verdict"] in ("DIFFERENT", "FAILED", "NOT AS LOADED") for row in result["rows"]))


def run_engine(
    made: Sequence[tuple[Case, Path, Reference]], options: argparse.Namespace, temporary: Path
) -> dict[tuple[str, str], Path]:
    """SGLang runs every job; where each one's answer and what was loaded lie."""
    jobs, places = [], {}
    for case, folder, ours in made:
        for how in case.runs:
            place = places[case.name, how] = temporary / f"{case.name}-{case.runs.index(how)}"
            place.mkdir()
            environ = {"LOWBIT_CHECK_LOADED": str(place), "LOWBIT_CHECK_STAND_INS": str(int(how == STOOD_IN))}
            job = {"model": str(folder.resolve()), "prompts": ours.prompts, "new_tokens": options.new_tokens}
            job |= {"dtype": options.dtype, "environ": environ, "folder": str(place), "time_limit": options.time_limit}
            jobs.append(job)
    asked = temporary / "jobs.json"
    asked.write_text(json.dumps(jobs), encoding="utf-8")
    python = options.env.absolute() / "bin" / "python"
    command = [str(python), str(ROOT / "scripts" / "sglang_run.py"), str(asked)]
    environment.say(f"SGLang runs {len(jobs)} times")
    environ = environment.engine_environ(options.env)
    done = subprocess.run(command, env=environ, cwd=temporary, capture_output=True, text=True)
    for place in places.values():
        if not (place / "answer.json").exists():
            last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            (place / "answer.json").write_text(json.dumps({"error": f"SGLang was not started: {last}", "own": True}))
    return places


def judge(case: Case, how: str, folder: Path, place: Path, ours: Reference) -> dict[str, Any]:
    """One row: what was loaded, what was computed, or SGLang's message."""
    answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    row = {"name": case.name, "format": case.label, "engine": how, "weight_only": case.weight_only}
    if (place / "loaded.json").exists():
        row |= sglang_tensors.compare(folder, place)
    if "error" in answer:
        refused = not answer.get("own") and ((how == ALONE and len(case.runs) > 1) or case.name in REFUSED)
        return {**row, "verdict": "refused" if refused else "FAILED", "message": answer["error"]}
    row |= ours.compare(answer["outputs"])
    if any(row[name] for name in ("different", "unfilled", "skipped", "not_given")):
        row["verdict"] = "NOT AS LOADED"
    return row


def about(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    """Where the figures come from."""
    return shared.about(options, versions, ("sglang", "torch", "transformers", "compressed-tensors"), "check_sglang")


if __name__ == "__main__":
    sys.exit(main())

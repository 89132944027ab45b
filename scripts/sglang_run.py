"""Runs inside the environment of scripts/check_sglang: SGLang loads checkpoints and generates. Knows nothing of lowbit.

    python sglang_run.py JOBS.json

JOBS.json: a list of jobs: ``model`` (folder), ``prompts`` (lists of token ids), ``new_tokens``, ``dtype``, ``environ``
(environment variables), ``folder`` (where ``answer.json`` and SGLang's ``log`` go) and ``time_limit`` in seconds.
answer.json: per prompt the greedy ``tokens``, their log-probabilities and those of the prompt's own tokens; or
``error`` in SGLang's words. What was loaded is written by the plugin, sglang_stand_ins.py.

Every job is SGLang's engine with its own scheduler process, forked from here, where SGLang is imported once: on a slow
machine importing takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    import torch.multiprocessing
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers import scheduler  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401  # imports every model

    # Engine asks for new interpreters; the fork has all modules already.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = torch.multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        folder = Path(job["folder"])
        child = os.fork()
        if child == 0:
            in_child(Engine, job, folder)
        ended = wait(child, job["time_limit"])
        if not (folder / "answer.json").exists():
            message = last_error((folder / "log").read_text(encoding="utf-8", errors="replace"))
            answer = {"error": message if ended else f"no answer in {job['time_limit']} s; {message}"}
            (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        print(folder.name, flush=True)


def in_child(engine: Any, job: dict[str, Any], folder: Path) -> None:
    """Does not return."""
    os.setsid()
    with (folder / "log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(job["environ"])
    try:
        answer = generate(engine, job)
        (folder / "answer.json.part").write_text(json.dumps(answer), encoding="utf-8")
        (folder / "answer.json.part").rename(folder / "answer.json")
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)


def wait(child: int, limit: int) -> bool:
    """Whether it ended in time; afterwards nothing of it runs."""
    until, ended = time.monotonic() + limit, False
    while not ended and time.monotonic() < until:
        ended = os.waitpid(child, os.WNOHANG) != (0, 0)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its session: what SGLang started
    if not ended:
        os.waitpid(child, 0)
    return ended


def last_error(log: str) -> str:
    """The line of a traceback that says what went wrong, the first of them: what follows is its consequence."""
    lines = [line.strip() for line in log.splitlines()]
    named = [line for line in lines if re.match(r"^([a-z_]+\.)*[A-Z]\w*(Error|Exception)\b", line)]
    return named[0] if named else " / ".join(line for line in lines[-3:] if line)


def generate(engine_class: Any, job: dict[str, Any]) -> dict[str, Any]:
    length = len(job["prompts"][0]) + job["new_tokens"]
    engine = engine_class(
        model_path=job["model"],
        device="cpu",
        attention_backend=job.get("attention_backend", "torch_native"),
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        context_length=length + 32,  # it keeps a few tokens for itself
        max_total_tokens=2 * length * len(job["prompts"]),
        max_running_requests=len(job["prompts"]),
        disable_radix_cache=True,  # a cached prompt has no log-probabilities
        disable_overlap_schedule=True,
        random_seed=0,
        log_level="info",
    )
    try:
        outputs = engine.generate(
            input_ids=job["prompts"],
            sampling_params={"temperature": 0, "max_new_tokens": job["new_tokens"], "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=2,
        )
    finally:
        engine.shutdown()
    return {"outputs": [plain(output) for output in outputs]}


def plain(output: dict[str, Any]) -> dict[str, Any]:
    """One request's output as numbers only; the first token of a prompt has no log-probability."""
    about = output["meta_info"]
    return {
        "tokens": output["output_ids"],
        "logprobs": [entry[0] for entry in about["output_token_logprobs"]],
        "top2": [{str(entry[1]): entry[0] for entry in step} for step in about["output_top_logprobs"]],
        "prompt_logprobs": [entry[0] for entry in about["input_token_logprobs"][1:]],
    }


if __name__ == "__main__":
    main()

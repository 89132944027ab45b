"""`lowbit serve` under load on one machine, packed beside dense: requests per second, streams, memory.

    python eval/bench_serve.py [MODEL] [--seconds 60] [--rounds 2] [--out eval/results/serve-cpu]

MODEL is quantized here (4 bits, groups of 128, rounded to nearest: speed does not depend on how well the codes were
chosen). Two servers run, one for each, and are loaded in turn, never both: so both see the same machine. Clients ask
without a pause for streams of completions and chats, each with a prompt of its own length cut from the model's text,
greedily, and check everything that comes back: status, every event, the chunks' ids and order, the finish reason, that
prompt and completion tokens are what was sent and asked for, and the end mark. One thing wrong ends the run with 1.

Memory is the server's resident set, read twice a second while it is under load. Its growth is the median of the last
quarter of the last round less the median of the first round's second quarter (the first quarter is the warm-up).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import psutil  # noqa: E402
from provenance import command_line, cpu_name, lowbit_sources, lowbit_version, short_name, version  # noqa: E402
from server_process import TEMPLATE, Server  # noqa: E402

MODES = {"batched": ["--continuous-batching"], "sequential": []}
GROWTH_BOUND = 0.03
"""Of the resident set: what may come and go with the allocator's caches; a leak per request passes it in minutes."""
NEW_TOKENS = (16, 64)
PROMPT_TOKENS = (4, 128)


class MalformedError(Exception):
    """A stream that is not what it should be."""


@dataclass
class Load:
    """What clients of a server have seen; ``first`` and ``whole`` are seconds until the first text and the end."""

    seconds: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resident: list[list[int]] = field(default_factory=list)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "eval" / "data" / "books-4m", help="dense folder")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time")
    parser.add_argument("--seconds", type=float, default=60, help="of load for each server in each round")
    parser.add_argument("--rounds", type=int, default=2, help="how often the servers take turns")
    parser.add_argument("--modes", default="batched,sequential", help=f"comma-separated, of {', '.join(MODES)}")
    parser.add_argument("--text", type=Path, default=ROOT / "eval" / "data" / "books-test.txt", help="for the prompts")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "eval" / "results" / "serve-cpu", help="PREFIX of .md, .json"
    )
    options = parser.parse_args(arguments)
    options.modes = options.modes.split(",")
    if set(options.modes) - set(MODES):
        parser.error(f"--modes must be of {', '.join(MODES)}")
    if min(options.clients, options.rounds) < 1 or options.seconds <= 0:
        parser.error("--clients and --rounds must be at least 1, --seconds above 0")
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} is no model folder")
    return options


class Client(threading.Thread):
    """Asks until ``until``; everything it sees goes into ``load``."""

    def __init__(self, server: Server, ids: list[int], tokenizer: Any, until: float, load: Load, seed: int) -> None:
        super().__init__()
        self.server, self.ids, self.tokenizer, self.until, self.load = server, ids, tokenizer, until, load
        self.random = random.Random(seed)

    def run(self) -> None:
        while time.perf_counter() < self.until:
            try:
                self.ask()
            except Exception as error:  # whatever it is, it is the result
                self.load.errors.append(f"{type(error).__name__}: {error}")
                return

    def ask(self) -> None:
        length, new = self.random.randint(*PROMPT_TOKENS), self.random.randint(*NEW_TOKENS)
        start = self.random.randrange(len(self.ids) - length)
        prompt = self.tokenizer.decode(self.ids[start : start + length]).strip()
        body: dict[str, Any] = {"model": self.server.ready["model"], "max_tokens": new, "temperature": 0}
        chat = self.random.random() < 0.5
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            prompt = f"user: {prompt}\nassistant:"
        else:
            body["prompt"] = prompt
        sent = len(self.tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
        began = time.perf_counter()
        usage, first = self.stream("chat/completions" if chat else "completions", body, began)
        whole = time.perf_counter() - began
        if usage["prompt_tokens"] != sent or usage["total_tokens"] != sent + usage["completion_tokens"]:
            raise MalformedError(f"{sent} tokens sent, usage {usage}")
        self.load.first.append(first)
        self.load.whole.append(whole)
        self.load.requests += 1
        self.load.prompt_tokens += sent
        self.load.new_tokens += usage["completion_tokens"]

    def stream(self, path: str, body: dict[str, Any], began: float) -> tuple[dict[str, int], float]:
        """Read one stream to its end and check it; its usage and the seconds until its first text."""
        connection = self.server.connect()
        try:
            content = json.dumps({**body, "stream": True})
            connection.request("POST", f"/v1/{path}", content, {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise MalformedError(f"status {response.status}: {response.read().decode()}")
            return read_stream(response, body["max_tokens"], path.startswith("chat"), began)
        finally:
            connection.close()


def read_stream(lines: Any, asked: int, chat: bool, began: float) -> tuple[dict[str, int], float]:
    """Check the events of one stream, an iterable of lines; its usage and the seconds until its first text."""
    chunks: list[dict[str, Any]] = []
    first, ended = 0.0, False
    for line in lines:
        if line == b"\n":
            continue
        if not line.startswith(b"data: ") or not line.endswith(b"\n") or ended:
            raise MalformedError(f"line {line!r}")
        if line == b"data: [DONE]\n":
            ended = True
            continue
        chunk = json.loads(line[6:])
        choice = chunk["choices"][0]
        if choice["delta"].get("content") if chat else choice["text"]:
            first = first or time.perf_counter() - began
        chunks.append(chunk)
    if not ended or not chunks:
        raise MalformedError("the stream ended without [DONE]" if chunks else "the stream is empty")
    kind = "chat.completion.chunk" if chat else "text_completion"
    if {chunk["object"] for chunk in chunks} != {kind} or len({chunk["id"] for chunk in chunks}) != 1:
        raise MalformedError(f"objects or ids differ: {chunks[0]} ... {chunks[-1]}")
    reasons = [chunk["choices"][0].get("finish_reason") for chunk in chunks]
    usage: dict[str, int] = chunks[-1]["usage"]
    new = usage["completion_tokens"]
    if any(reasons[:-1]) or reasons[-1] != ("length" if new == asked else "stop") or not 1 <= new <= asked:
        raise MalformedError(f"{asked} tokens asked for, {new} came, finish reasons {set(reasons)}")
    if not first and new > 1:  # a lone token may be the end of text, which has none
        raise MalformedError(f"{new} tokens without any text")
    return usage, first or time.perf_counter() - began


def put_under_load(server: Server, options: argparse.Namespace, ids: list[int], tokenizer: Any, seed: int) -> Load:
    """One round on one server. Every client has a Load of its own, so that no count is lost between threads."""
    began = time.perf_counter()
    until = began + options.seconds
    clients = [Client(server, ids, tokenizer, until, Load(), seed + index) for index in range(options.clients)]
    for client in clients:
        client.start()
    process, resident = psutil.Process(server.process.pid), []
    while any(client.is_alive() for client in clients):
        resident.append(process.memory_info().rss)
        time.sleep(0.5)
    loads = [client.load for client in clients]
    result = total(loads)
    result.seconds, result.resident = time.perf_counter() - began, [resident]
    return result


def total(loads: Sequence[Load]) -> Load:
    """Their sum; rounds and clients alike."""
    result = Load()
    for load in loads:
        for name, value in vars(load).items():
            setattr(result, name, getattr(result, name) + value)
    return result


def growth(resident: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The resident set after the warm-up and its growth until the end, in bytes; see the module's docstring."""
    first, last = resident[0], resident[-1]
    after = statistics.median(first[len(first) // 4 : max(len(first) // 2, len(first) // 4 + 1)])
    return after, statistics.median(last[-max(len(last) // 4, 1) :]) - after


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def row(mode: str, kind: str, server: Server, load: Load) -> dict[str, Any]:
    """One line of the result."""
    after, grown = growth(load.resident)
    return {
        "mode": mode,
        "weights": kind,
        "weights_bytes": server.ready["weights_bytes"],
        "seconds": round(load.seconds, 1),
        "requests": load.requests,
        "errors": load.errors,
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "requests_per_second": load.requests / load.seconds,
        "tokens_per_second": load.new_tokens / load.seconds,
        "first_text_median": quantile(load.first, 0.5) if load.first else None,
        "first_text_95": quantile(load.first, 0.95) if load.first else None,
        "whole_median": quantile(load.whole, 0.5) if load.whole else None,
        "whole_95": quantile(load.whole, 0.95) if load.whole else None,
        "resident_bytes": after,
        "growth_bytes": grown,
        "resident_samples": load.resident,
    }


def measure(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """All rows; the servers are gone afterwards, whatever happens."""
    from transformers import AutoTokenizer

    packed, template = scratch / f"{options.model.name}-w4g128", scratch / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    quantize = ["quantize", str(options.model), str(packed), "--method", "rtn", "--calibration", str(options.text)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "lowbit", *quantize, "--samples", "1", "--seq-len", "64"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8")[:200_000])["input_ids"]
    rows = []
    for mode in options.modes:
        loads: dict[str, list[Load]] = {"dense": [], "packed": []}
        servers: dict[str, Server] = {}
        try:
            for kind, folder in (("dense", options.model), ("packed", packed)):
                servers[kind] = Server(folder, "--chat-template", template, *MODES[mode])
            for number in range(options.rounds):
                for kind in ("dense", "packed") if number % 2 == 0 else ("packed", "dense"):
                    load = put_under_load(servers[kind], options, ids, tokenizer, 1000 * number)
                    print(f"{mode}, {kind}: {load.requests} requests in {load.seconds:.1f} s", file=sys.stderr)
                    loads[kind].append(load)
            rows += [row(mode, kind, server, total(loads[kind])) for kind, server in servers.items()]
        finally:
            for server in servers.values():
                server.close()
    return rows


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    found = [f"{row['mode']}, {row['weights']}: {error}" for row in rows for error in row["errors"]]
    for row in rows:
        if row["growth_bytes"] > GROWTH_BOUND * row["resident_bytes"]:
            found.append(f"{row['mode']}, {row['weights']}: grew by {row['growth_bytes'] / 1e6:.1f} MB")
    return found


def table(rows: Sequence[dict[str, Any]], options: argparse.Namespace, about: str) -> str:
    """The result as Markdown."""
    lines = [
        f"`{command_line()}`: {about}.",
        "",
        f"{short_name(options.model)} with {options.clients} clients at once; prompts of {PROMPT_TOKENS[0]} to "
        f"{PROMPT_TOKENS[1]} tokens, answers of up to {NEW_TOKENS[0]} to {NEW_TOKENS[1]}, all streamed, half of them "
        f"chats, greedy. Both servers in one run, in turns of {options.seconds:g} s. Every stream was checked event "
        f"by event: {sum(row['requests'] for row in rows)} streams, {sum(len(row['errors']) for row in rows)} errors. "
        "Seconds are the median and, in brackets, the 95th percentile. Growth is of the server's resident set after "
        f"the warm-up; the bound is {GROWTH_BOUND:.0%}.",
        "",
        "| server | weights | MB | requests/s | tokens/s | first text, s | whole answer, s | resident, MB | growth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["requests"]:
            continue
        seconds = (f"{row[f'{what}_median']:.2f} ({row[f'{what}_95']:.2f})" for what in ("first_text", "whole"))
        rates = f"{row['requests_per_second']:.1f} | {row['tokens_per_second']:.0f}"
        lines.append(
            f"| {row['mode']} | {row['weights']} | {row['weights_bytes'] / 1e6:.1f} | {rates} | {' | '.join(seconds)} "
            f"| {row['resident_bytes'] / 1e6:.0f} | {row['growth_bytes'] / 1e6:+.1f} MB "
            f"({row['growth_bytes'] / row['resident_bytes']:+.1%}) |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write; 1 when a stream was malformed or memory grew."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, Path(scratch))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "uvicorn"))
    about = f"{cpu_name()}, one thread per server; lowbit {lowbit_version()}, sources {lowbit_sources()}, {versions}"
    text = table(rows, options, about)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    result = {"command": command_line(), "about": about, "rows": rows}
    options.out.with_suffix(".json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(text)
    for problem in problems(rows):
        print(problem, file=sys.stderr)
    return int(bool(problems(rows)))


if __name__ == "__main__":
    sys.exit(main())

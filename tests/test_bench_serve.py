"""eval/bench_serve.py takes only streams that are right, and sees memory that grows."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "eval"))

from bench_serve import GROWTH_BOUND, Load, MalformedError, growth, problems, read_stream, total  # noqa: E402


def stream(texts, *, chat=False, reason="length", new=None, id="a"):
    """The lines of a stream as the server writes it; every piece of text is a token."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    pieces = [{"delta": {"content": text}} if chat else {"text": text} for text in texts]
    events = [{"id": id, "object": kind, "choices": [piece]} for piece in pieces]
    new = len(texts) if new is None else new
    last = {"finish_reason": reason, **({"delta": {}} if chat else {"text": ""})}
    usage = {"prompt_tokens": 2, "completion_tokens": new, "total_tokens": 2 + new}
    events.append({"id": id, "object": kind, "choices": [last], "usage": usage})
    lines = [line for event in events for line in (f"data: {json.dumps(event)}\n".encode(), b"\n")]
    return [*lines, b"data: [DONE]\n", b"\n"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_that_is_right_gives_its_usage(chat):
    usage, first = read_stream(stream(["one", " two"], chat=chat), 2, chat, time.perf_counter())
    assert usage["completion_tokens"] == 2 and first > 0
    usage, _ = read_stream(stream(["one"], chat=chat, reason="stop"), 2, chat, time.perf_counter())
    assert usage["completion_tokens"] == 1


@pytest.mark.parametrize(
    "lines",
    {
        "cut": stream(["one", " two"])[:-2],
        "empty": [b"data: [DONE]\n"],
        "no event": [b"one\n", *stream(["one", " two"])],
        "after the end": stream(["one", " two"]) + stream(["one", " two"]),
        "two ids": stream(["one"])[:2] + stream(["one", " two"], id="b"),
        "fewer tokens than asked for": stream(["one"]),
        "more tokens than asked for": stream(["one", " two", " three"]),
        "a wrong reason": stream(["one", " two"], reason="stop"),
        "no text": stream(["", ""]),
        "a chat": stream(["one", " two"], chat=True),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_stream_that_is_wrong_is_an_error(lines):
    with pytest.raises((MalformedError, KeyError)):
        read_stream(lines[1], 2, False, time.perf_counter())


def test_growth_leaves_the_warm_up_out_and_is_bounded():
    warm, steady = [10, 90, 100, 100, 100, 100, 100, 100], [100] * 8
    assert growth([warm]) == growth([warm, steady]) == (100, 0)
    assert growth([warm, [100] * 6 + [150] * 2]) == (100, 50)
    row = {"mode": "m", "weights": "w", "errors": [], "resident_bytes": 100.0, "growth_bytes": 100 * GROWTH_BOUND}
    assert problems([row]) == []
    assert problems([{**row, "growth_bytes": 4.0}, {**row, "errors": ["cut"]}]) == ["m, w: cut", "m, w: grew by 0.0 MB"]


def test_the_sum_of_loads_counts_and_joins():
    one, two = Load(requests=1, first=[0.5], resident=[[1]]), Load(requests=2, first=[0.1], resident=[[2]])
    both = total([one, two])
    assert (both.requests, both.first, both.resident) == (3, [0.5, 0.1], [[1], [2]])


@pytest.mark.parametrize("options", [["no/such/model"], ["--modes", "quick"], ["--clients", "0"]])
def test_a_bad_command_line_is_one_sentence(options):
    command = [sys.executable, str(ROOT / "eval" / "bench_serve.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr

"""How ``lowbit serve`` starts, what it refuses before it loads a model, its limits, and how an interrupted one ends."""

import http.client
import itertools
import json
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit.hf.serve as serving
from eval.server_process import Server
from lowbit.cli import main
from lowbit.hf.serve import Settings
from lowbit.hf.serve_requests import RequestError, check_chat, check_completion
from lowbit.hf.serve_stop import StopCut

MODEL = Path(__file__).parent.parent / "eval" / "data" / "books-4m"
LIMIT = 2000
CARD = {"model": "m", "device": "cpu", "dtype": "bfloat16", "context": 512, "url": "http://x:1/v1"}


@pytest.fixture(scope="module")
def server():
    """The dense model: no chat template, a small limit for bodies, one second to end in."""
    running = Server(MODEL, "--max-body", LIMIT, "--grace", 1)
    yield running
    running.close()


@pytest.fixture
def unloadable(monkeypatch):
    """For what has to be refused before a weight is read."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(serving, "load", load)


def error_of(capsys, *arguments):
    """The one message of a command that has to end with status 2."""
    assert main(["serve", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.split("lowbit: error: ")[1].rstrip("\n")


# --- before the model


def test_a_port_in_use_is_refused_before_the_model_is_loaded(capsys, unloadable):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = error_of(capsys, MODEL, "--port", port)
    assert message == f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", 70000], "port must be from 0 to 65535, got 70000"),
        (["--log-level", "loud"], "log_level must be one of debug, info, warning, error, got 'loud'"),
        (["--max-body", 0], "max_body must be at least 1, got 0"),
        (["--grace", -1], "grace must be at least 0, got -1"),
        (["--cache-blocks", 4], "cache_blocks and batch_tokens are for continuous_batching"),
        (["--device", "abacus"], "abacus"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),  # TEST-NET-1: never an address of this machine
        (["--chat-template", "no/such/file"], "No such file or directory: no/such/file"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(capsys, unloadable, options, message):
    assert message in error_of(capsys, MODEL, *options)


def test_a_folder_that_is_no_model_is_refused(capsys, unloadable, tmp_path):
    assert "no such model folder" in error_of(capsys, tmp_path / "missing")
    assert "has no config.json" in error_of(capsys, tmp_path)


def test_a_model_without_a_tokenizer_is_refused(capsys, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path)
    assert "has no tokenizer" in error_of(capsys, tmp_path, "--port", 0)


def test_a_chat_template_that_fails_is_refused(capsys, tmp_path):
    (tmp_path / "template.jinja").write_text("{% for message in messages %}", encoding="utf-8")
    message = error_of(capsys, MODEL, "--port", 0, "--chat-template", tmp_path / "template.jinja")
    assert message.startswith("the chat template fails on a first message: ")


def test_a_missing_extra_is_one_message_with_the_command(capsys, monkeypatch, unloadable):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert error_of(capsys, MODEL) == "lowbit serve needs uvicorn: pip install 'lowbit[serve]'"


def test_a_cache_that_holds_no_full_request_is_refused(capsys):
    message = error_of(capsys, MODEL, "--port", 0, "--continuous-batching", "--cache-blocks", 3)
    assert message == "cache_blocks must be at least 17 for a context of 512"


def test_other_machines_are_let_in_with_a_warning_only(capsys):
    with serving.listening("127.0.0.1", 0) as listener:
        assert serving.url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    assert capsys.readouterr().err == ""
    with serving.listening("0.0.0.0", 0):
        assert "reachable from other machines" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [True, False])
def test_the_command_passes_its_options_and_shows_how_to_ask(capsys, monkeypatch, chat):
    calls = []

    def serve(model, settings, announce):
        calls.append((model, settings))
        announce(
            {"model": "m", "device": "cpu", "dtype": "bfloat16", "context": 512, "url": "http://x:1/v1", "chat": chat}
        )

    monkeypatch.setattr(serving, "serve", serve)
    options = ["--host", "::1", "--port", "1", "--continuous-batching", "--cache-blocks", "9", "--batch-tokens", "8"]
    assert main(["serve", "m", *options, "--grace", "3", "--dtype", "float16"]) == 0
    settings = Settings("::1", 1, True, dtype="float16", cache_blocks=9, batch_tokens=8, grace=3)
    assert calls == [("m", settings)]
    summary, curl = capsys.readouterr().out.splitlines()
    assert summary == "m on cpu, bfloat16, context 512: http://x:1/v1"
    command = shlex.split(curl)
    asked = json.loads(command[command.index("-d") + 1])
    check = check_chat if chat else check_completion
    assert check(asked, batched=True) == asked
    assert command[1] == "http://x:1/v1/" + ("chat/completions" if chat else "completions")


# --- limits


def test_the_dense_model_is_served_too(server):
    assert not server.ready["packed"] and server.ready["formats"] == ["dense"] and not server.ready["chat"]
    answer = server.client.completions.create(model="books-4m", prompt="It was", max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_a_model_without_a_chat_template_says_so(server):
    with pytest.raises(openai.BadRequestError, match="has no chat template: use /v1/completions"):
        server.client.chat.completions.create(model="books-4m", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("size", [LIMIT + 1, 5 * LIMIT, 20 * LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_refused(server, size, chunked):
    body = json.dumps({"prompt": "x" * size}).encode()
    if not chunked:
        answer = server.ask("POST", "completions", body, {"content-type": "application/json"})
    else:
        connection = server.connect()
        pieces = itertools.chain([body[:1000]], [body[1000:]])
        connection.request("POST", "/v1/completions", pieces, {"content-type": "application/json"}, encode_chunked=True)
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        connection.close()
    assert answer.status == 413
    assert json.loads(answer.text)["error"]["message"] == f"the request's body is larger than {LIMIT} bytes"
    assert server.client.models.list().data


def test_ctrl_c_cuts_what_does_not_end_in_time(server, interruptible):
    """Four requests for the rest of the context, one after the other, in a second: the last ones are cut."""
    asked = json.dumps({"prompt": "It was", "max_tokens": 500, "temperature": 0, "stream": True})
    connections = [server.connect() for _ in range(4)]
    for connection in connections:
        connection.request("POST", "/v1/completions", asked, {"content-type": "application/json"})
    answers = [connection.getresponse() for connection in connections]
    assert server.end(signal.SIGINT) == 130
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answers[-1].read()
    for opened in [*answers, *connections]:
        opened.close()
    said = server.said()
    assert "SIGINT" in said and "lowbit: interrupted" in said and "Traceback" not in said, said


# --- what a request may hold


@pytest.mark.parametrize(
    "check, body",
    [
        (check_completion, {"prompt": "x", "model": "m", "temperature": 0.5, "stop": ["a", "b"], "suffix": "!"}),
        (
            check_chat,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "logit_bias": {"3": -1}},
        ),
        (
            check_chat,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        ),
    ],
)
def test_what_is_understood_is_kept(check, body):
    assert check(body, batched=False) == body


def test_what_asks_for_nothing_is_dropped():
    idle = {"n": 1, "logprobs": False, "user": "me", "temperature": None, "stream_options": {"include_usage": True}}
    assert check_completion({"prompt": "x", **idle}, batched=True) == {"prompt": "x"}
    chat = {
        "messages": [{"role": "user", "content": "x"}],
        "max_completion_tokens": 3,
        "response_format": {"type": "text"},
    }
    assert check_chat(chat, batched=True) == {"messages": chat["messages"], "max_tokens": 3}


@pytest.mark.parametrize("field, value", [
    ("temperature", float("nan")), ("temperature", True), ("temperature", 10**400),
    ("top_p", 0), ("max_tokens", 1.5), ("seed", 2**64),
    ("stop", []), ("stop", [""]), ("stream", "yes"), ("frequency_penalty", -1), ("prompt", "\ud800"),
    ("prompt", [1, 2]), ("logprobs", 3), ("echo", True), ("best_of", 2), ("generation_config", "{}"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(field, value):
    with pytest.raises(RequestError) as caught:
        check_completion({"prompt": "x", field: value}, batched=False)
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize("message", [
    "text", {}, {"role": "user", "content": 3}, {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "not json"}}]},
    {"role": "assistant", "tool_calls": None},
])  # fmt: skip
def test_a_malformed_message_is_refused_with_its_number(message):
    good = {"role": "user", "content": "x"}
    with pytest.raises(RequestError, match="message 1"):
        check_chat({"messages": [good, message]}, batched=False)


@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=3), max_size=1), st.data())
def test_a_stop_string_cuts_a_text_in_whatever_pieces_it_comes(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    found = []
    cut = StopCut(stops, lambda: found.append(True))
    passed = [cut.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)] + [cut.flush()]
    assert "".join(passed) == (text.split(stops[0])[0] if stops else text)
    assert found == [True] * any(stop in text for stop in stops)


def test_of_several_stop_strings_the_first_in_the_text_counts():
    cut = StopCut(["end", "\n\n"])
    assert [cut.feed(piece) for piece in ("one e", "n t", "wo\n", "x\n\ny", "end")] == ["one ", "en t", "wo", "\nx", ""]
    assert cut.flush() == ""
    held = StopCut(["end"])
    assert (held.feed("the en"), held.flush()) == ("the ", "en")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["messages", "prompt", "stop", "logit_bias", "tools", "max_tokens", "n", "stream", "top_p"])


@given(st.dictionaries(NAMES, JSON), st.booleans())
def test_whatever_json_comes_is_taken_or_refused(body, batched):
    for check in (check_chat, check_completion):
        try:
            check(body, batched=batched)
        except RequestError as error:
            assert str(error)

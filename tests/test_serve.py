"""``lowbit serve``: the real server in a process, asked over a socket by the openai client."""

import functools
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import torch

import lowbit
from eval.server_process import TEMPLATE, Server

DATA = Path(__file__).parent.parent / "eval" / "data"
MODEL, TEXT = DATA / "books-4m", DATA / "books-calib.txt"
PROMPTS = [
    f"{start} {subject} was" for start in ("It", "Then", "Once", "When") for subject in ("he", "she", "a", "the")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """books-4m in 4 bits, and the chat template of these tests."""
    folder = tmp_path_factory.mktemp("serve")
    lowbit.quantize(MODEL, folder / "books-w4", 4, method="rtn", calibration=TEXT, samples=1, seq_len=32)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["sequential", "batched"])
def server(request, folder):
    """float32, so that both ways of generating give the same tokens."""
    batching = ["--continuous-batching"] if request.param == "batched" else []
    running = Server(folder / "books-w4", "--dtype", "float32", "--chat-template", folder / "template.jinja", *batching)
    running.batched = bool(batching)
    yield running
    running.close()


@pytest.fixture(scope="module")
def reference(folder):
    """What the model itself says: ``reference(prompt, tokens)`` is its greedy continuation."""
    model, tokenizer = lowbit.load(folder / "books-w4", device="cpu", dtype="float32")

    @functools.cache
    def text(prompt, tokens):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    text.tokenizer = tokenizer
    return text


def post(server, path, body, headers=None):
    return server.ask("POST", path, body, headers)


def text_of(answer):
    """The text of a completion that succeeded."""
    assert answer.status == 200, answer.text
    return json.loads(answer.text)["choices"][0]["text"]


def refusal(answer, status):
    """The error object of an answer that has to have the status."""
    assert answer.status == status, answer.text
    error = json.loads(answer.text)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


# --- answers


def test_the_server_says_what_it_serves(server, folder):
    ready = server.ready
    assert ready["model"] == "books-w4" and ready["packed"] and ready["formats"] == ["pack-quantized w4g128sym"]
    assert (ready["context"], ready["dtype"], ready["device"]) == (512, "float32", "cpu")
    assert ready["continuous_batching"] is server.batched
    assert ready["weights_bytes"] < (MODEL / "model.safetensors").stat().st_size
    assert [model.id for model in server.client.models.list()] == ["books-w4"]
    assert server.client.models.retrieve("books-w4").root == str(folder / "books-w4")
    assert json.loads(server.ask("GET", "/health").text) == {"status": "ok"}


def test_a_completion_is_what_the_model_generates(server, reference, folder):
    for name in ("books-w4", str(folder / "books-w4")):  # the folder's name, and the path as it was given
        answer = server.client.completions.create(model=name, prompt="It was", max_tokens=12, temperature=0)
        assert answer.choices[0].text == reference("It was", 12)
    assert answer.choices[0].finish_reason == "length" and answer.model == "books-w4"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)


def test_a_chat_is_the_completion_of_its_template(server, reference):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was he?"}]
    answer = server.client.chat.completions.create(model="books-w4", messages=messages, max_completion_tokens=10)
    prompt = "system: Be brief.\nuser: Who was he?\nassistant:"
    assert answer.choices[0].message.content == reference(prompt, 10)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 10


def test_streams_carry_the_same_text_and_their_usage(server, reference):
    client = server.client
    chunks = list(client.completions.create(model="books-w4", prompt="It was", max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reference("It was", 12)
    assert len(chunks) > 3 and chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12

    asked = {"messages": [{"role": "user", "content": "Who was he?"}], "max_tokens": 10}
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="books-w4", **asked, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reference("user: Who was he?\nassistant:", 10)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 10


def test_a_stream_is_events_of_json_and_ends_with_done(server):
    answer = post(server, "completions", {"prompt": "It was", "max_tokens": 5, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_stop_strings_end_an_answer(server, reference):
    text = reference("It was", 30)
    word = text.split()[3]
    asked = {"prompt": "It was", "max_tokens": 30, "stop": [word]}
    if server.batched:  # transformers has none there
        assert refusal(post(server, "completions", asked), 400)["param"] == "stop"
    else:
        before = text[: text.index(word)]
        answer = server.client.completions.create(model="books-w4", **asked)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, "stop")
        chunks = list(server.client.completions.create(model="books-w4", **asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"
        # the stop string comes with the last token that is allowed
        last = server.client.completions.create(
            model="books-w4", **{**asked, "max_tokens": answer.usage.completion_tokens}
        )
        assert (last.choices[0].text, last.choices[0].finish_reason) == (before, "stop")


def test_a_bias_is_a_number_for_a_token_of_the_model(server, reference):
    asked = {"messages": [{"role": "user", "content": "Who was he?"}], "max_tokens": 3}
    if server.batched:  # transformers has none there
        return
    wanted = reference.tokenizer(" the")["input_ids"][-1]
    answer = post(server, "chat/completions", {**asked, "logit_bias": {str(wanted): 100}})
    assert json.loads(answer.text)["choices"][0]["message"]["content"] == " the" * 3, answer.text
    refused = refusal(post(server, "chat/completions", {**asked, "logit_bias": {"4096": 1}}), 400)
    assert refused["param"] == "logit_bias" and "4095" in refused["message"]


def test_the_arguments_of_a_chat_template_are_not_the_templates_own_variables(server):
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}, "max_tokens": 1}
    assert refusal(post(server, "chat/completions", body), 400)["param"] == "chat_template_kwargs"


def test_a_temperature_of_almost_nothing_is_greedy(server, reference):
    for temperature in (1e-320, 1e-39, 1e-7):
        answer = post(server, "completions", {"prompt": "It was", "max_tokens": 8, "temperature": temperature})
        assert text_of(answer) == reference("It was", 8)


def test_each_request_has_its_own_temperature(server, reference):
    def ask(**sampling):
        return text_of(post(server, "completions", {"prompt": "It was", "max_tokens": 24, **sampling}))

    greedy = reference("It was", 24)
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda sampling: ask(**sampling), [{"temperature": 2.0}, {"temperature": 0}] * 3))
    assert texts[1::2] == [greedy] * 3
    assert greedy not in texts[::2] and len(set(texts[::2])) == 3
    # a nucleus that holds one token is greedy, at any temperature
    assert ask(temperature=2.0, top_p=1e-6) == greedy


def test_a_seed_repeats_an_answer(server):
    asked = {"prompt": "It was", "max_tokens": 16, "temperature": 1.5, "seed": 7}
    answers = [post(server, "completions", asked) for _ in range(2)]
    if server.batched:
        assert refusal(answers[0], 400)["param"] == "seed"
    else:
        assert text_of(answers[0]) == text_of(answers[1])


def test_sixteen_clients_at_once_get_their_own_answers(server, reference):
    client = server.client

    def ask(prompt):
        chunks = client.completions.create(model="books-w4", prompt=prompt, max_tokens=6, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, PROMPTS))
    assert answers == [reference(prompt, 6) for prompt in PROMPTS]


def test_clients_that_choose_the_same_request_id_are_kept_apart(server, reference):
    def ask(prompt):
        asked = {"prompt": prompt, "max_tokens": 6, "stream": False}
        return post(server, "completions", asked, {"x-request-id": "one"})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, PROMPTS[:4]))
    assert [text_of(answer) for answer in answers] == [reference(prompt, 6) for prompt in PROMPTS[:4]]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


# --- requests that are refused


@pytest.mark.parametrize(
    "path, body, field, message",
    [
        ("chat/completions", {}, "messages", "messages is missing"),
        ("chat/completions", {"messages": "hello"}, "messages", "a list of at least one message"),
        ("chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, "messages", "message 0 has a role"),
        ("completions", {}, "prompt", "prompt is missing"),
        ("completions", {"prompt": ["It was"]}, "prompt", "a string"),
        ("completions", {"prompt": ""}, "prompt", "no tokens"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "from 1 to"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "temperature", 'from 0 to 2, got "hot"'),
        ("completions", {"prompt": "x", "n": 2}, "n", "not supported"),
        ("completions", {"prompt": "x", "frobnicate": 1}, "frobnicate", "unknown field"),
    ],
)
def test_a_bad_field_is_named(server, path, body, field, message):
    error = refusal(post(server, path, body), 400)
    assert error["param"] == field and message in error["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b"\xff", b'"text"', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(server, body):
    error = refusal(post(server, "completions", body, {"content-type": "application/json"}), 400)
    assert "JSON object" in error["message"] or "parsing the body" in error["message"]


def test_an_unknown_model_is_not_found_and_the_known_one_named(server):
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4'.*'books-w4'") as caught:
        server.client.completions.create(model="gpt-4", prompt="It was")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_context_is_refused_before_anything_is_generated(server, stream):
    long = "the " * 600
    for asked in ({"prompt": long}, {"prompt": "It was", "max_tokens": 511}, {"prompt": "the " * 511, "max_tokens": 2}):
        with pytest.raises(openai.BadRequestError, match="context is 512 tokens") as caught:
            server.client.completions.create(model="books-w4", stream=stream, **asked)
        assert caught.value.code == "context_length_exceeded"


def test_an_answer_without_a_limit_ends_where_the_context_does(server, reference):
    prompt = reference.tokenizer.decode(reference.tokenizer("It was the time. " * 200)["input_ids"][:500])
    used = len(reference.tokenizer(prompt)["input_ids"])
    assert 490 < used < 512
    answer = server.client.completions.create(model="books-w4", prompt=prompt, temperature=0)
    assert answer.usage.total_tokens == 512 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == used


def test_other_paths_and_methods_have_the_same_error(server):
    for path in ("embeddings", "responses"):
        refusal(post(server, path, {}), 404)
    for path in ("reset", "load_model"):  # transformers' own, which unload and load models
        refusal(server.ask("POST", f"/{path}", {"model": "x"}), 404)
    refusal(server.ask("GET", "completions"), 405)


def test_bytes_that_are_no_http_leave_the_server_alive(server):
    address = urlsplit(server.url)
    for rubbish in (b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 10\r\n\r\n{"):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(rubbish)
    assert server.client.models.list().data


# --- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_stops_its_generation(server, stream):
    """Three requests of 500 tokens, a second or more each: soon after their clients are gone nothing is computed."""
    asked = {"prompt": "It was", "max_tokens": 500, "temperature": 0, "stream": stream}

    def leave(_):
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
        if stream:
            with connection.getresponse() as answer:
                assert answer.readline().startswith(b"data: ")
        else:
            time.sleep(0.3)
        connection.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(leave, range(3)))
    after = server.client.completions.create(model="books-w4", prompt="It was", max_tokens=1)
    assert after.usage.completion_tokens == 1
    time.sleep(0.2)
    before = server.cpu_seconds()
    time.sleep(0.5)
    assert server.cpu_seconds() - before < 0.25
    assert "Traceback" not in server.said()


# --- the end, which is the last test of this server


def test_sigterm_under_load_lets_the_running_requests_finish(server):
    asked = {"model": "books-w4", "prompt": "It was", "max_tokens": 60, "temperature": 0, "stream": True}
    client = server.client
    streams = [client.completions.create(**asked) for _ in range(3)]
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):  # until the signal has arrived requests are still answered
        while True:
            client.completions.create(model="books-w4", prompt="too late", max_tokens=1)
    texts = []
    for stream in streams:
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 60
        texts.append("".join(chunk.choices[0].text for chunk in chunks))
    assert len(set(texts)) == 1 and texts[0]
    assert server.process.wait(timeout=30) == 0
    assert "SIGTERM" in server.said() and "Traceback" not in server.said(), server.said()

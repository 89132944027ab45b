"""Which fields of an OpenAI request ``lowbit serve`` takes, and what may stand in them.

transformers' server ignores what it does not support and answers 500 where a value has the wrong type. Here a request
either means what its sender thinks it means, or it is refused with the name of the field. Fields that ask for nothing
(``n: 1``, ``logprobs: false``) and fields about the sender (``user``) are taken and dropped.

Source: the request bodies of OpenAI's API reference, "Create chat completion" and "Create completion" (legacy).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["RequestError", "check_chat", "check_completion"]

Body = dict[str, Any]
Check = Callable[[Any], str | None]


class RequestError(ValueError):
    """A request that is refused: the ``field`` at fault and OpenAI's ``code`` of the error, where there is one."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.code = field, code


def check_chat(body: Mapping[str, Any], *, batched: bool) -> Body:
    """The body of a chat completion as transformers' handler takes it.

    Args:
        body: the request's JSON object.
        batched: continuous batching, where transformers has no stop strings, seeds, penalties or biases.

    Raises:
        RequestError: a field is missing, unknown, of a wrong type or out of its range, or asks for what the server does
            not do.
    """
    kept = _check(body, {**_SHARED, **_CHAT}, batched)
    if kept.get("messages") is None:
        raise RequestError("messages is missing: a list of objects with a role and a content", "messages")
    if "max_completion_tokens" in kept:  # transformers before 5.18 ignores the newer name
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    if "logit_bias" in kept:  # transformers takes floats only, and OpenAI's examples are integers
        kept["logit_bias"] = {token: float(bias) for token, bias in kept["logit_bias"].items()}
    return kept


def check_completion(body: Mapping[str, Any], *, batched: bool) -> Body:
    """As :func:`check_chat`, for the body of a completion of a plain prompt."""
    kept = _check(body, {**_SHARED, **_COMPLETION}, batched)
    if kept.get("prompt") is None:
        raise RequestError("prompt is missing: a string", "prompt")
    return kept


def _check(body: Mapping[str, Any], fields: Mapping[str, Check], batched: bool) -> Body:
    kept: Body = {}
    for name, value in body.items():
        if name not in fields and name not in _DROPPED and name not in _NOT_DONE:
            raise RequestError(f"unknown field {name!r}; known are {', '.join(sorted(fields))}", name)
        if value is None or name in _DROPPED:
            continue
        if name in _NOT_DONE:
            if value not in _NOT_DONE[name]:
                raise RequestError(f"{name} = {_short(value)} is not supported by this server; leave it out", name)
            continue
        problem = fields[name](value)
        if problem is not None:
            raise RequestError(f"{name} must be {problem}, got {_short(value)}", name)
        if batched and name in _NOT_BATCHED and value not in _NOT_BATCHED[name]:
            raise RequestError(f"{name} is not supported by a server started with --continuous-batching", name)
        if name != "stream_options":  # the last chunk has the usage anyway
            kept[name] = value
    return kept


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_text(value: object) -> bool:
    """A string that can be encoded: JSON can escape half of a surrogate pair, which tokenizers cannot take."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> str | None:
    return None if _is_text(value) else "a string of valid Unicode"


def _flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _number(low: float, high: float, *, open_low: bool = False) -> Check:
    what = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"

    def check(value: object) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return what  # not asked whether it is finite: an integer may be too large for that, and NaN is in no range
        return None if low <= value <= high and not (open_low and value == low) else what

    return check


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> str | None:
        return None if type(value) is int and low <= value <= high else f"an integer from {low} to {high}"

    return check


def _stop(value: object) -> str | None:
    texts = value if isinstance(value, list) else [value]
    if 0 < len(texts) <= 16 and all(_is_text(text) and text for text in texts):
        return None
    return "a string that is not empty, or a list of up to 16 of them"


def _bias(value: object) -> str | None:
    what = "an object of token ids and numbers from -100 to 100"
    if not isinstance(value, dict):
        return what
    number = _number(-100, 100)
    return None if all(key.isdecimal() and number(bias) is None for key, bias in value.items()) else what


def _stream_options(value: object) -> str | None:
    known = {"include_usage", "include_obfuscation"}
    if isinstance(value, dict) and value.keys() <= known and all(isinstance(flag, bool) for flag in value.values()):
        return None
    return "an object with include_usage: true or false"


def _object(value: object) -> str | None:
    return None if isinstance(value, dict) else "an object"


def _tools(value: object) -> str | None:
    if isinstance(value, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in value
    ):
        return None
    return "a list of objects with a function"


def _messages(value: object) -> str | None:
    if not isinstance(value, list) or not value:
        return "a list of at least one message"
    for index, message in enumerate(value):
        problem = _message(message)
        if problem is not None:
            return f"a list of messages, each with a role and a content: message {index} {problem}"
    return None


def _message(message: object) -> str | None:
    if not isinstance(message, dict):
        return "is no object"
    if message.get("role") not in _ROLES:
        return f"has a role that is none of {', '.join(_ROLES)}"
    calls = message.get("tool_calls")
    if calls is not None:
        return None if isinstance(calls, list) and all(map(_is_call, calls)) else "has malformed tool_calls"
    if "tool_calls" in message:
        return "has tool_calls: null; leave the field out"
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if content is None or all(_is_text_part(part) for part in parts):
        return None
    return "has a content that is neither a string nor a list of text parts (this server takes no images or audio)"


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and _is_text(part.get("text"))


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_text(function.get("name")):
        return False
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return isinstance(arguments, dict)
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MOST_TOKENS = 2**31 - 1

_SHARED: dict[str, Check] = {
    "model": _text,
    "stream": _flag,
    "stream_options": _stream_options,
    "max_tokens": _integer(1, _MOST_TOKENS),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, open_low=True),
    "frequency_penalty": _number(-1, 2, open_low=True),  # transformers' repetition_penalty, less 1
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stop,
}
_CHAT: dict[str, Check] = {
    "messages": _messages,
    "max_completion_tokens": _integer(1, _MOST_TOKENS),
    "logit_bias": _bias,
    "tools": _tools,
    "chat_template_kwargs": _object,
}
_COMPLETION: dict[str, Check] = {"prompt": _text, "suffix": _text}

# About the sender, or about storage, caches and tiers that only OpenAI's servers have: no answer depends on them.
_DROPPED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}

# Fields that would change the answer and are not done, with the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "function_call": ("auto",),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

_NOT_BATCHED: dict[str, tuple[Any, ...]] = {
    "stop": (),
    "seed": (),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}

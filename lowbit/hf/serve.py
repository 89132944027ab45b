"""serve: an OpenAI-compatible server for one model on one machine, built on transformers' own.

transformers' application (``transformers.cli.serving``) answers the requests and generates; uvicorn speaks HTTP. What
is ours is around them: the model is loaded by :func:`lowbit.load`, stays packed and is the only one (serve_app.py), a
request is checked before it is taken (serve_requests.py, serve_guard.py), and it ends when nobody waits for it any
more (serve_generate.py).
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ..dtypes import dtype_name, parse_dtype
from ..facts import Checkup, check_up
from .loading import load
from .source import parse_device, resolve

if TYPE_CHECKING:
    from .serve_generate import Batched, Sequential

__all__ = ["Settings", "serve"]

NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_CONTEXT = 2048
"""Tokens, where the configuration names no limit."""
DEFAULT_ANSWER = 1024
"""Tokens of an answer whose request sets no limit: transformers' server's own default."""
CPU_CACHE_BYTES = 2**31
"""Of keys and values for continuous batching on a CPU. transformers would take 60 % of the machine's memory."""
CPU_CACHE_REQUESTS = 64
"""Requests of full length that cache is made for at most."""
PAGE = 32
"""Tokens per page of that cache; transformers' default of 256 is for flash attention on GPUs."""
CPU_BATCH_TOKENS = 512
"""Tokens in one forward pass there: its attention mask is as wide as the cache."""
ONEDNN_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache and torch's own on top of it, both read at the first product in bfloat16."""
ONEDNN_CACHE_SHAPES = "64"
"""Their entries. Each is the code compiled for one number of tokens, 0.7 MB, and requests bring ever new numbers: with
torch's default of 1024 a server grows for an hour. Measured on books-11m: by 0.39 GB in its first 450 requests; with
64, by nothing after the first 100, for 3 % more processor time. Who sets the variables keeps what they say."""
LAST_STEP = 10.0
"""Seconds an interrupted generation has to notice: it does between two tokens."""


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host, port: the address; port 0 is any that is free.
        continuous_batching: answer all requests at once over a paged cache, instead of one after the other.
        device, dtype: as for :func:`lowbit.load`.
        chat_template: file with a Jinja template, in place of the tokenizer's own.
        cache_blocks, batch_tokens: size of the paged cache, in blocks, and tokens of a forward pass with continuous
            batching; None is chosen: on a CPU for 64 full contexts or 2 GiB, on a GPU by transformers.
        max_body: bytes of a request.
        grace: seconds that running requests have when the server is told to stop.
        log_level: debug, info (a line per request), warning or error.
        trust_remote_code: run Python code that comes with the model.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    continuous_batching: bool = False
    device: str = "auto"
    dtype: str = "auto"
    chat_template: str | None = None
    cache_blocks: int | None = None
    batch_tokens: int | None = None
    max_body: int = 8 * 2**20
    grace: int = 30
    log_level: str = "warning"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        for name, least in (("max_body", 1), ("grace", 0), ("cache_blocks", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.continuous_batching and (self.cache_blocks is not None or self.batch_tokens is not None):
            raise ValueError("cache_blocks and batch_tokens are for continuous_batching; set that, or leave them out")


def serve(model: str, settings: Settings, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve a model until SIGTERM or SIGINT; blocks, in the main thread.

    Everything that can be refused is refused before the weights are read. On a signal the server stops listening, lets
    the requests that are running finish for ``settings.grace`` seconds, and closes the connections of those that have
    not by then. A second SIGINT does that at once.

    Args:
        model: folder or hub id of a model that lowbit.load reads, packed or dense.
        settings: how.
        announce: called once, when requests are answered, with url, model, path, packed, formats, weights_bytes,
            device, dtype, context, continuous_batching and chat (whether there is a chat template).

    Raises:
        ModuleNotFoundError: the extra ``lowbit[serve]`` is not installed; the message has the command.
        OSError: the address is taken or not this machine's.
        FileNotFoundError, ValueError: as :func:`lowbit.load`; the model has no tokenizer, or generates no text.
        KeyboardInterrupt: SIGINT; raised when everything is shut down.
    """
    require_extra()
    from .serve_loop import run

    device, _ = parse_device(settings.device), parse_dtype(settings.dtype)
    template = None if settings.chat_template is None else Path(settings.chat_template).read_text(encoding="utf-8")
    folder = resolve(model, trust_remote_code=settings.trust_remote_code)
    checkup = check_up(folder)
    name = folder.resolve().name if Path(model).expanduser().is_dir() else model
    with listening(settings.host, settings.port) as listener, quiet(settings.log_level):
        loaded, tokenizer = load_checked(folder, checkup, device, settings)
        tokenizer = check_servable(folder, loaded, tokenizer, template)
        context = context_of(loaded)
        manager = generating(loaded, settings, context)
        try:
            app = application(loaded, tokenizer, manager, (name, model, context), settings)
            ready = {
                "url": url_of(listener),
                "model": name,
                "path": model,
                **weights_of(checkup),
                "device": str(loaded.device),
                "dtype": dtype_name(loaded.dtype),
                "context": context,
                "continuous_batching": settings.continuous_batching,
                "chat": tokenizer.chat_template is not None,
            }
            stopped_by = run(app, listener, settings.grace, settings.log_level, lambda: announce(ready))
        finally:
            ended = manager.finish(LAST_STEP)
    leave(stopped_by, ended)


def require_extra() -> None:
    """Raise ModuleNotFoundError, with the command to install them, unless the packages of the extra are there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"lowbit serve needs {', '.join(missing)}: pip install 'lowbit[serve]'")


def load_checked(
    folder: Path, checkup: Checkup, device: torch.device, settings: Settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """:func:`load`, announced on stderr, with oneDNN's caches bounded before the first product fills them."""
    if device.type == "cpu":
        for variable in ONEDNN_CACHES:
            os.environ.setdefault(variable, ONEDNN_CACHE_SHAPES)
    formats = ", ".join(kind.label() for kind in checkup.kinds)
    _say(f"loading {folder}: {formats}, {checkup.tensor_bytes / 1e6:.1f} MB of weights, on {device}")
    return load(folder, device=device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)


def leave(stopped_by: int, ended: bool) -> None:
    """What follows the server's end: KeyboardInterrupt after SIGINT; the process's own end if a thread still runs."""
    if not ended:
        # A thread inside a kernel cannot be stopped, and Python's end would abort in it.
        _say("a generation did not end in time; leaving without it")
        sys.stdout.flush()
        os._exit(130 if stopped_by == signal.SIGINT else 0)
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def weights_of(checkup: Checkup) -> dict[str, Any]:
    """What is served, as in ``announce``."""
    return {
        "packed": any(kind.spec is not None for kind in checkup.kinds),
        "formats": [kind.label() for kind in checkup.kinds],
        "weights_bytes": checkup.tensor_bytes,
    }


def _say(line: str) -> None:
    print(f"lowbit serve: {line}", file=sys.stderr, flush=True)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address, so that no other process can take it while the model is loaded.

    It does not listen yet: who connects before the server is ready is refused instead of left waiting.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host}: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":  # connections of a server that has just ended do not block the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OSError(f"cannot listen on {host} port {port}: {reason}; choose another with --port") from error
        if not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
            _say(f"{host} is reachable from other machines, and this server asks nobody for a key")
        yield listener


def url_of(listener: socket.socket) -> str:
    """``http://host:port/v1`` of a bound socket, what OpenAI's clients call the base URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@contextmanager
def quiet(log_level: str) -> Iterator[None]:
    """transformers' server logs each request as a warning: shown from info on."""
    before = hf_logging.get_verbosity()
    shown = "error" if log_level == "warning" else log_level
    hf_logging.set_verbosity(getattr(logging, shown.upper()))
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def check_servable(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, template: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template in it.

    Raises:
        ValueError: the folder has no tokenizer, or a model or tokenizer that transformers cannot stream text from, or
            the template cannot be rendered.
    """
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer, which a server of text needs")
    if not hasattr(tokenizer, "_tokenizer"):
        raise ValueError(f"{type(tokenizer).__name__} has no fast version (tokenizer.json), which streaming needs")
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} generates no text")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder and a decoder; transformers serves decoders")
    if template is not None:
        tokenizer.chat_template = template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except Exception as error:  # Jinja's, and whatever the template's own expressions raise
            raise ValueError(f"the chat template fails on a first message: {error}") from error
    return tokenizer


def context_of(model: PreTrainedModel) -> int:
    """Tokens of prompt and answer together."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT)


def generating(model: PreTrainedModel, settings: Settings, context: int) -> Sequential | Batched:
    """What generates, started, after one forward pass: what is compiled or built at first use is built here."""
    from .serve_generate import Batched, Sequential

    defaults = model.generation_config
    defaults.max_new_tokens = max(defaults.max_new_tokens or 0, DEFAULT_ANSWER)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    if not settings.continuous_batching:
        return Sequential(context)
    if not hasattr(model, "init_continuous_batching"):
        raise ValueError(f"{type(model).__name__} cannot be served with continuous batching; leave the option out")
    manager = Batched(context, cache_config(model, settings, context))
    manager.start(model, defaults)
    return manager


def cache_config(model: PreTrainedModel, settings: Settings, context: int) -> ContinuousBatchingConfig:
    """The paged cache's size. Every request that fits the context fits the cache.

    Raises:
        ValueError: ``settings.cache_blocks`` are too few for one full context.
    """
    # The price of what is asked: per_request_processors makes transformers keep temperature and top_p per request.
    options: dict[str, Any] = {"per_request_processors": True, "allow_block_sharing": True}
    if model.device.type == "cpu":
        # transformers 5.17 calls it block_size
        fields = ContinuousBatchingConfig.__dataclass_fields__
        options["page_size" if "page_size" in fields else "block_size"] = PAGE
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
        least = -(-context // PAGE) + 1
        affordable = CPU_CACHE_BYTES // (token_bytes * PAGE)
        options["num_blocks"] = settings.cache_blocks or max(least, min(affordable, CPU_CACHE_REQUESTS * least))
        options["max_batch_tokens"] = settings.batch_tokens or CPU_BATCH_TOKENS
        if options["num_blocks"] < least:
            raise ValueError(f"cache_blocks must be at least {least} for a context of {context}")
    else:
        options["num_blocks"], options["max_batch_tokens"] = settings.cache_blocks, settings.batch_tokens
    return ContinuousBatchingConfig(**options)


def application(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Sequential | Batched,
    named: tuple[str, str, int],
    settings: Settings,
) -> Any:
    """The ASGI application; ``named`` is the model's name, its path as given, and its context."""
    from .serve_app import OneModel, build_app
    from .serve_guard import Guard

    return Guard(build_app(OneModel(model, tokenizer, *named), manager), settings.max_body)

"""How requests reach the model: transformers' two ways of generating, made cancellable and held to the context.

transformers' server generates for one request after the other (``GenerateManager``) or for all at once
(``CBGenerateManager``, continuous batching). What is added here: a request whose client is gone stops generating,
streamed or not; prompt and answer fit the model's context; with continuous batching each request has its own
temperature and top_p, where transformers gives all of them those of the first; and errors inside a stream are JSON.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import CBGenerateManager, GenerateManager, GenerationState, _StreamError
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from ..heap import return_free_memory
from .serve_requests import RequestError
from .serve_stop import StopCut

__all__ = ["Batched", "Job", "Sequential", "State", "current_job"]


@dataclass
class Job:
    """What is known about the request that is being answered.

    Attributes:
        asked: tokens the request asks for at most, None where it does not say.
        seed: of its random numbers.
        stop_strings: texts that end the answer and are no part of it.
        stops: what ends the generation it started; harmless when that has ended already.
    """

    asked: int | None = None
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    sampling: dict[str, float] = field(default_factory=dict)
    stops: list[Callable[[], None]] = field(default_factory=list)

    def cancel(self) -> None:
        """Stop generating for it."""
        for stop in self.stops:
            stop()


current_job: ContextVar[Job] = ContextVar("current_job")
"""Set by the guard for each request; transformers' handlers hand nothing of ours through."""


def fit(config: GenerationConfig, prompt_tokens: int, context: int) -> None:
    """Set ``config.max_new_tokens`` so that prompt and answer fit into ``context`` tokens.

    Raises:
        RequestError: the prompt has no tokens or fills the context, or the request asks for more than is left.
    """
    asked = current_job.get().asked
    if prompt_tokens == 0:
        raise RequestError("the prompt has no tokens", "prompt")
    if prompt_tokens >= context or (asked is not None and prompt_tokens + asked > context):
        wanted = "" if asked is None else f" and {asked} for the answer"
        raise RequestError(
            f"this model's context is {context} tokens; the request has {prompt_tokens} in the prompt{wanted}",
            code="context_length_exceeded",
        )
    config.max_new_tokens = min(config.max_new_tokens, context - prompt_tokens)


class Cancelled(Exception):
    """Raised inside ``generate`` when nobody waits for its result any more."""


class _Watch:
    """A streamer that streams nothing: ``generate`` shows it every token, so it can stop ``generate``."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    def end(self) -> None:
        pass


class _Stream:
    """A queue of transformers' pieces of text, read only: up to a stop string, and with errors fit for their JSON.

    Args:
        pieces: texts, other events of an answer, and None at its end.
        cut: what the texts go through.
    """

    def __init__(self, pieces: asyncio.Queue[Any], cut: StopCut) -> None:
        self._pieces, self._cut = pieces, cut
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        while not self._ready:
            self._take(await self._pieces.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        while not self._ready:
            self._take(self._pieces.get_nowait())
        return self._ready.popleft()

    def _take(self, piece: Any) -> None:
        if isinstance(piece, _StreamError):
            piece = _StreamError(json.dumps(piece.msg)[1:-1])
        text = self._cut.feed(piece) if type(piece) is str else self._cut.flush()
        self._ready.extend([text] if text else [])
        self._ready.extend([] if type(piece) is str else [piece])


def _was_stopped(config: GenerationConfig) -> None:
    """Let transformers' handlers say "stop", also where the stop string came with the last token that was allowed."""
    config.max_new_tokens = None


class Sequential(GenerateManager):
    """One request after the other, in the order in which they came."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        """transformers' own, within the context; raises before anything has been sent."""
        fit(gen_config, inputs["input_ids"].shape[-1], self.context)
        pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **options)
        job = current_job.get()
        job.stops.append(streamer.cancel)
        return _Stream(pieces, StopCut(job.stop_strings, partial(_was_stopped, gen_config))), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> Any:
        """As generate_streaming."""
        fit(gen_config, inputs["input_ids"].shape[-1], self.context)
        text, *counts = await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **options)
        cut = StopCut(current_job.get().stop_strings, partial(_was_stopped, gen_config))
        return cut.feed(text) + cut.flush(), *counts

    def submit(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        """Runs ``fn`` on the inference thread, which is where a seed has its effect."""
        future: Future[Any] = super().submit(partial(_seeded, current_job.get().seed, fn), *args, **options)
        return future

    def async_submit(self, fn: Callable[..., Any], *args: Any, **options: Any) -> asyncio.Future[Any]:
        """As submit; ``fn`` is ``generate``. The job can be cancelled, which a bare future would not notice."""
        job, watch = current_job.get(), _Watch()
        job.stops.append(watch.cancelled.set)

        def run() -> Any:
            try:
                return _seeded(job.seed, fn, *args, streamer=watch, **options)
            except Cancelled:
                return None

        # Shielded: the thread sets the future's result, which fails when the future itself has been cancelled.
        return asyncio.shield(super().async_submit(run))

    def finish(self, seconds: float) -> bool:
        """Wait until the inference thread has nothing left to do; False when it still has after ``seconds``."""
        try:
            super().submit(lambda: None).result(timeout=seconds)
        except StillRunning:
            return False
        return True


def _seeded(seed: int | None, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if seed is not None:
        torch.manual_seed(seed)
    try:
        return fn(*args, **options)
    finally:
        return_free_memory()  # of prompts of ever new lengths: the heap would keep its holes


class _Temperature(ContinuousBatchingTemperatureLogitsWarper):
    """A temperature per request; 0 is greedy."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``scores (tokens, vocabulary)`` divided by each token's temperature."""
        temperatures = tensor_arg[: scores.size(0)].view(dtype=torch.float32).unsqueeze(-1)
        greedy = temperatures == 0
        # Adding -inf to all but the first of the largest makes sampling choose that one.
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), False)
        scaled = scores / temperatures.masked_fill(greedy, 1.0)
        return scaled.masked_fill(greedy & others, float("-inf"))


class _TopP(ContinuousBatchingTopPLogitsWarper):
    """A top_p per request; nothing is sorted on a CPU while all of them are 1."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``scores (tokens, vocabulary)`` with -inf outside each token's nucleus."""
        if scores.is_cpu and bool((tensor_arg[: scores.size(0)].view(dtype=torch.float32) >= 1).all()):
            return scores
        kept: torch.Tensor = super().__call__(scores, tensor_arg)
        return kept


def _claim(owner: object) -> None:
    """Write to every page of the tensors an object holds on the CPU.

    Memory that is only reserved counts once traffic has reached it: a server would grow for hours, and fail then.
    """
    for value in vars(owner).values():
        for tensor in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.is_cpu and tensor.is_contiguous():
                pages = tensor.view(-1)[:: max(4096 // tensor.itemsize, 1)]
                pages.copy_(pages.clone())


class Batched(CBGenerateManager):
    """All requests at once: continuous batching over a paged cache."""

    def __init__(self, context: int, cb_config: ContinuousBatchingConfig) -> None:
        super().__init__(cb_config=cb_config)
        self.context = context

    def start(self, model: PreTrainedModel, defaults: GenerationConfig) -> None:
        """Build the cache and start the thread, before the first request.

        Args:
            model: a causal language model that transformers can batch.
            defaults: the model's generation configuration; its top_k holds for every request.
        """
        shared = GenerationConfig(
            do_sample=True,
            temperature=0.5,  # any that is not 1, and a top_p below 1: so the two processors below are made
            top_p=0.5,
            top_k=defaults.top_k if defaults.do_sample else None,
            eos_token_id=defaults.eos_token_id,
            pad_token_id=defaults.pad_token_id,
            max_new_tokens=defaults.max_new_tokens,
            use_cache=False,
        )
        self._cb = model.init_continuous_batching(generation_config=shared, continuous_batching_config=self._cb_config)
        processors = self._cb.logit_processor.logits_processor
        for index, processor in enumerate(processors):
            if isinstance(processor, ContinuousBatchingTemperatureLogitsWarper):
                processors[index] = _Temperature(TemperatureLogitsWarper(1.0))
            elif isinstance(processor, ContinuousBatchingTopPLogitsWarper):
                processors[index] = _TopP(TopPLogitsWarper(1.0))
        add = self._cb.add_request
        # CBGenerateManager hands no sampling parameters on.
        self._cb.add_request = lambda *args, **options: add(*args, **options, **current_job.get().sampling)
        self._cb.warmup()
        processor = self._cb.batch_processor
        for part in (processor.cache, processor.inputs_and_outputs):
            _claim(part)
        self._cb.start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> tuple[Any, Any]:
        """transformers' own, within the context; raises before anything has been sent."""
        self._prepare(inputs, gen_config, request_id)
        pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, **options)
        return _Stream(pieces, StopCut(())), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        """As generate_streaming."""
        self._prepare(inputs, gen_config, request_id)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id, **options)

    def _prepare(self, inputs: Any, config: GenerationConfig, request_id: str) -> None:
        fit(config, len(inputs["input_ids"]), self.context)
        job = current_job.get()
        job.sampling = {
            "temperature": float(config.temperature or 1.0) if config.do_sample else 0.0,
            "top_p": float(config.top_p or 1.0) if config.do_sample else 1.0,
        }
        job.stops.append(partial(self._forget, request_id))

    def _forget(self, request_id: str) -> None:
        """Cancel a request, unless it is finished: then its handler is gone."""
        router = self._cb.output_router
        with router._lock:
            unfinished = router.result_handlers.pop(request_id, None) is not None
        if not unfinished:
            return
        self._cb.cancel_request(request_id)
        try:
            while True:  # results without a handler land here, where nobody would ever fetch them
                router.output_queue.get_nowait()
        except queue.Empty:
            pass

    def finish(self, seconds: float) -> bool:
        """Stop the thread once it has nothing left to do; False when it still runs after ``seconds``."""
        self._cb.stop(block=True, timeout=seconds)
        return not self._cb.is_running()


class State(GenerationState):
    """transformers' table of managers, with the one there is."""

    def __init__(self, manager: Sequential | Batched) -> None:
        super().__init__(continuous_batching=isinstance(manager, Batched))
        self.manager = manager
        if isinstance(manager, Batched):
            self._cb_manager = manager  # whose health /health reports

    def use_continuous_batching(self, *args: Any, **options: Any) -> bool:
        """Decided when the server starts; never a silent fallback."""
        return bool(self._continuous_batching)

    def get_manager(self, *args: Any, **options: Any) -> Sequential | Batched:
        """The manager, whatever the model's name."""
        return self.manager

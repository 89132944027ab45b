"""transformers' server application, holding one loaded model, with errors in the shape OpenAI's clients expect."""

from __future__ import annotations

import inspect
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError

from .serve_generate import Batched, Sequential, State, current_job
from .serve_guard import error_body
from .serve_requests import RequestError, check_chat, check_completion

__all__ = ["OneModel", "build_app"]

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""What is kept of transformers' server. The others load and unload models by name, or are for other kinds of models."""

COLDEST = 1e-6
"""A temperature below it is taken for 0: the choice is the same, and logits divided by less overflow float32."""


class UnknownModelError(LookupError):
    """A request names a model that is not the server's."""


class OneModel(ModelManager):
    """transformers' model manager with one model, loaded by :func:`lowbit.load`; it neither loads nor unloads any."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, path: str, context: int
    ) -> None:
        super().__init__(device="cpu")
        self.model, self.tokenizer, self.name, self.path, self.context = model, tokenizer, name, path, context
        self.created = int(time.time())

    def find(self, requested: str | None) -> str:
        """The model's name, if ``requested`` is one of its names or None.

        Raises:
            UnknownModelError: it is another one.
        """
        if requested not in (None, self.name, self.path):
            raise UnknownModelError(f"the model {requested!r} does not exist here; this server has {self.name!r}")
        return self.name

    def load_model_and_processor(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self.model, self.tokenizer

    def card(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lowbit",
            "root": self.path,
            "max_model_len": self.context,
        }

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model. (transformers' lists the hub's cache, and fails where there is none.)"""
        return [self.card()]

    def shutdown(self) -> None:
        """The model lives as long as the process."""


class _OneModelHandler:
    """What both handlers do differently from transformers'."""

    model_manager: OneModel

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.model_manager.find(body.get("model")), self.model_manager.model, self.model_manager.tokenizer

    def _keep(self, body: dict[str, Any], checked: dict[str, Any]) -> None:
        job = current_job.get()
        job.seed, job.asked = checked.pop("seed", None), checked.get("max_tokens")
        stop = checked.get("stop", ())
        job.stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if checked.get("temperature", 1) < COLDEST:
            checked["temperature"] = 0
        body.clear()
        body.update(checked)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        # transformers passes temperature and top_p on to a model that is set to greedy, where they do nothing.
        if body.get("temperature", 0) > 0 or ("temperature" not in body and body.get("top_p", 1) < 1):
            config.do_sample = True
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        return config


class _Chat(_OneModelHandler, ChatCompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        self._keep(body, check_chat(body, batched=self.generation_state.use_continuous_batching()))
        tokenizer = self.model_manager.tokenizer
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        wrong = sorted((taken | {"messages"}) & body.get("chat_template_kwargs", {}).keys())
        if wrong:
            raise RequestError(f"chat_template_kwargs cannot set {wrong[0]!r}", "chat_template_kwargs")
        vocabulary = self.model_manager.model.config.get_text_config().vocab_size
        unknown = [token for token in body.get("logit_bias", {}) if int(token) >= vocabulary]
        if unknown:
            raise RequestError(
                f"logit_bias names the token {unknown[0]}; this model's are 0 to {vocabulary - 1}", "logit_bias"
            )

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name, model, tokenizer = super()._resolve_model(body)
        if tokenizer.chat_template is None:
            raise RequestError(
                f"the model {name!r} has no chat template: use /v1/completions, or serve it with --chat-template FILE"
            )
        return name, model, tokenizer


class _Completion(_OneModelHandler, CompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        self._keep(body, check_completion(body, batched=self.generation_state.use_continuous_batching()))


def build_app(model: OneModel, manager: Sequential | Batched) -> FastAPI:
    """transformers' application for one model.

    Args:
        model: the model.
        manager: how it generates.
    """
    state = State(manager)
    parts: dict[str, Any] = {
        "model_manager": model,
        "chat_handler": _Chat(model, state),
        "completion_handler": _Completion(model, state),
        "generation_state": state,
    }
    # The handlers of the routes that are not kept: which there are depends on transformers' version.
    for name, parameter in inspect.signature(build_server).parameters.items():
        if parameter.default is parameter.empty:
            parts.setdefault(name, None)
    app: FastAPI = build_server(**parts)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    @app.get("/v1/models/{name:path}")
    def retrieve_model(name: str) -> JSONResponse:
        model.find(name)
        return JSONResponse(model.card())

    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, field: str | None = None, code: str | None = None) -> JSONResponse:
        return JSONResponse(error_body(status, message, field, code), status_code=status)

    def refused(_: Request, error: RequestError) -> JSONResponse:
        return answer(400, str(error), error.field, error.code)

    def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        reason = first.get("ctx", {}).get("error", first.get("msg", "not valid"))
        return answer(400, f"the body must be a JSON object, with content-type application/json: {reason}")

    def failed(_: Request, error: Exception) -> JSONResponse:
        return answer(500, f"the server failed: {type(error).__name__}: {error}")

    app.add_exception_handler(RequestError, refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, malformed)  # type: ignore[arg-type]
    app.add_exception_handler(UnknownModelError, lambda _, error: answer(404, str(error), "model", "model_not_found"))
    app.add_exception_handler(TemplateError, lambda _, error: answer(400, f"the chat template: {error}", "messages"))
    app.add_exception_handler(CBWorkerDeadError, lambda _, error: answer(503, str(error)))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, failed)


def _http_error(_: Request, error: Any) -> JSONResponse:
    """Starlette's own: no such path, another method; and what transformers' handlers refuse."""
    return JSONResponse(
        error_body(error.status_code, str(error.detail)), status_code=error.status_code, headers=error.headers
    )

"""What :func:`lowbit.quantize` may be asked for, apart from activations: each value that is not allowed is named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blockwise import METHODS
from .data import check_vocabulary
from .evaluate import context_length
from .spec import PACKED_BITS, QuantSpec

__all__ = ["check_calibration", "check_counts", "check_method", "check_tokens", "parse_ignore"]


def check_method(method: str, spec: QuantSpec, packed: bool) -> None:
    """ValueError: no such method, or a width that has no packed form where it is to be packed."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if packed and spec.bits not in PACKED_BITS:
        raise ValueError(
            f"{spec.bits}-bit weights have no packed form (packed widths: {PACKED_BITS}); "
            f"lowbit.quantize_(model, spec, packed=False) measures what they would cost"
        )


def parse_ignore(ignore: Sequence[str]) -> tuple[str, ...]:
    """The patterns as a tuple. ValueError: one string, which is a sequence too, of letters."""
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a sequence of regular expressions, got {ignore!r}; give [{ignore!r}]")
    return tuple(ignore)


def check_calibration(method: str, calibration: Tensor | None) -> None:
    """ValueError: tokens are missing that the method needs, or they are not ``(windows, seq_len)`` int64."""
    if method != "rtn" and calibration is None:
        raise ValueError(f"method {method!r} needs calibration tokens; only 'rtn' works without data")
    if calibration is not None and (
        calibration.ndim != 2 or calibration.dtype != torch.int64 or not calibration.numel()
    ):
        raise ValueError(
            f"calibration must be token ids (windows, seq_len) int64 with at least one window, got "
            f"{tuple(calibration.shape)} {calibration.dtype}"
        )


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Refuse tokens the model has no embedding or no position for, where it says how many there are."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if isinstance(embedding, nn.Embedding):
        check_vocabulary(tokens, embedding.num_embeddings)
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config") and tokens.shape[1] > context_length(model):
        raise ValueError(
            f"calibration windows of {tokens.shape[1]} tokens exceed the model's context of {context_length(model)}"
        )


def check_counts(samples: int | None, seq_len: int) -> None:
    """ValueError: fewer than one window, or windows too short to hold a token and the next."""
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}")

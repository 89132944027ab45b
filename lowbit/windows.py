"""Which windows of a text a run is calibrated on."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .data import TextSource, token_windows

__all__ = ["choose_windows", "enough", "first_windows"]

_SAMPLES = 128


def enough(calibration: str | os.PathLike[str], samples: int | None, seq_len: int) -> int | None:
    """Characters that surely hold the windows asked for; a hub data set is streamed no further. None reads all."""
    return None if os.fspath(calibration) == "wikitext2" else 2 * 8 * (samples or _SAMPLES) * seq_len


def choose_windows(tokenizer: Any, text: TextSource, samples: int | None, seq_len: int, seed: int) -> Tensor:
    """The windows a model is calibrated on: a file's first ones, of a hub data set random ones.

    Args:
        tokenizer: see :func:`lowbit.data.token_windows`.
        text: tokenized in one call, or as much of it as is needed.
        samples: windows asked for; None takes up to 128, as many as the text has.
        seq_len: tokens per window.
        seed: picks the windows of a hub data set.

    Returns:
        token ids ``(windows, seq_len)``, int64 on the CPU.

    Raises:
        ValueError: the text holds fewer windows than ``samples``, or not one.
    """
    wanted = samples or _SAMPLES
    if text.is_file:
        windows = first_windows(tokenizer, text.text, seq_len, wanted)
    else:
        windows = token_windows(tokenizer, text.text, seq_len)
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:wanted]]
    if samples is not None and len(windows) < samples:
        raise ValueError(
            f"calibration text {text.name!r} holds {len(windows)} windows of {seq_len} tokens, {samples} were asked "
            f"for; use a longer text, fewer samples or a shorter seq_len"
        )
    return windows


def first_windows(tokenizer: Any, text: str, seq_len: int, wanted: int) -> Tensor:
    """The first windows of a text, tokenizing no more of it than they need: a long text's tokens take much memory.

    Part of the text is cut off at a line's end and one window more is asked for than used, so that the cut cannot show
    in any token that is kept.
    """
    length = 6 * seq_len * (wanted + 1)
    while length < len(text):
        end = text.rfind("\n", 0, length)
        with suppress(ValueError):  # a part of less than one window is no error yet
            windows = token_windows(tokenizer, text[: max(end, 0)], seq_len)
            if len(windows) > wanted:
                return windows[:wanted]
        length *= 2
    return token_windows(tokenizer, text, seq_len, wanted)

"""A base model that remembers its logits: a table compares it with many quantized models on the same windows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["CachedBase"]


class CachedBase:
    """A causal LM for ``evaluate(base=...)`` that runs each window once; everything else is the model's own.

    Args:
        model: a Hugging Face causal LM.
        limit_bytes: main memory that logits may take, ``seq_len * vocabulary * element size`` per window. What is
            beyond it is run every time.
    """

    def __init__(self, model: Any, limit_bytes: int) -> None:
        self._model, self._left = model, limit_bytes
        self._logits: dict[bytes, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """``input_ids (1, seq_len)`` to an object with ``logits (1, seq_len, vocabulary)``."""
        window = input_ids.cpu().numpy().tobytes()
        if window not in self._logits:
            logits = self._model(input_ids=input_ids, **options).logits
            if logits.nbytes > self._left:
                return SimpleNamespace(logits=logits)
            self._left -= logits.nbytes
            self._logits[window] = logits.cpu()
        return SimpleNamespace(logits=self._logits[window])

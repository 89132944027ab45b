"""Causal attention on a CPU without the part of the scores that the mask throws away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["CausalSlices"]

_KEY_BLOCK = 512  # torch's CPU kernel skips masked keys in blocks of this many, so of fewer it computes all
_FEWEST = 256  # tokens from which slices are faster
_SLICES = 8


class CausalSlices(TorchFunctionMode):
    """While active, short causal attention on a CPU runs in slices of queries, each with the keys it can see.

    Of ``256 <= T <= 512`` keys torch's kernel computes all ``T^2`` scores; eight slices compute 9/16 of them. The
    result is the kernel's up to the order of its float32 additions. Anything else is passed on as it is.

    Args:
        see_query: called with the queries of every attention.
    """

    def __init__(self, see_query: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self._see_query = see_query

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, or its sliced form where that computes less."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self._see_query is not None:
                self._see_query(args[0] if args else kwargs["query"])
            if _gains(*args, **kwargs):
                return _sliced(*args, **kwargs)
        return func(*args, **kwargs)


def _gains(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    tokens = query.shape[-2]
    square = query.ndim == 4 and tokens == key.shape[-2] and _FEWEST <= tokens <= _KEY_BLOCK
    return is_causal and attn_mask is None and dropout_p == 0.0 and square and query.device.type == "cpu"


def _sliced(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    options = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
    batch, heads, tokens = query.shape[:3]
    width = -(-tokens // _SLICES)
    hidden = torch.full((width, tokens), -torch.inf, dtype=query.dtype)
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # laid out as the kernel's own result
    # Query heads that share a key head, one below the other, are one product: the same numbers, and in 16 bits faster.
    shared = heads // key.shape[1] if options.get("enable_gqa") and query.element_size() == 2 else 1
    queries, results = (x.unflatten(1, (heads // shared, shared)) for x in (query, out))
    for start in range(0, tokens, width):
        stop = min(start + width, tokens)
        mask = hidden[: stop - start, :stop].triu(start + 1).repeat(shared, 1)
        rows = queries[:, :, :, start:stop].flatten(2, 3)
        part = F.scaled_dot_product_attention(rows, key[:, :, :stop], value[:, :, :stop], attn_mask=mask, **options)
        results[:, :, :, start:stop] = part.unflatten(2, (shared, stop - start))
    return out

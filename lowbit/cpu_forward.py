"""A model's own operations on a CPU, in less time than torch's choice of kernel takes for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import onednn

__all__ = ["CpuForward"]

_KEY_BLOCK = 512  # torch's CPU kernel skips masked keys in blocks of this many, so of fewer it computes all
_FEWEST = 256  # tokens from which slices are faster
_SLICES = 8


class CpuForward(TorchFunctionMode):
    """While active, two operations on a CPU take another way to the same result, up to the order of float32 additions.

    * Short causal attention runs in slices of queries, each with the keys it can see: of ``256 <= T <= 512`` keys
      torch's kernel computes all ``T^2`` scores, eight slices compute 9/16 of them.
    * float32 linears without gradients run in oneDNN where that is faster (:mod:`lowbit.onednn`).

    Anything else is passed on as it is.

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
        elif func is F.linear:
            return onednn.linear(*args, **kwargs)
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
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # laid out as the kernel's own result
    # Query heads that share a key head, one below the other, are one product: the same numbers in less time.
    shared = heads // key.shape[1] if options.get("enable_gqa") else 1
    queries, results = (x.unflatten(1, (heads // shared, shared)) for x in (query, out))
    for start in range(0, tokens, width):
        stop = min(start + width, tokens)
        mask = _mask(start, stop, shared, query.dtype)
        rows = queries[:, :, :, start:stop].flatten(2, 3)
        part = F.scaled_dot_product_attention(rows, key[:, :, :stop], value[:, :, :stop], attn_mask=mask, **options)
        results[:, :, :, start:stop] = part.unflatten(2, (shared, stop - start))
    return out


@functools.lru_cache(maxsize=4 * _SLICES)
def _mask(start: int, stop: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Of queries ``start`` to ``stop``, ``shared`` times, what each adds to the scores of the first ``stop`` keys."""
    hidden = torch.full((stop - start, stop), -torch.inf, dtype=dtype, device="cpu")
    return hidden.triu(start + 1).repeat(shared, 1)

"""ReorderedLinear: a QuantLinear whose weight is stored with its columns sorted by group (GPTQ's act-order).

The kernels want groups of consecutive columns. Sorting the columns of the weight and gathering the inputs in the same
order changes no product and no group: ``y = x[..., order] @ W[:, order].T = x @ W.T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..linear import QuantLinear
from .base import COLUMN_ORDER

__all__ = ["ReorderedLinear"]


class ReorderedLinear(QuantLinear):
    """A :class:`~lowbit.linear.QuantLinear` with one more tensor, ``column_order (K,)`` int64.

    Column ``j`` of the packed weight is input ``column_order[j]``. The arguments are QuantLinear's. Of the standard
    formats only GPTQ's has a place for the order, so a model with such layers is written by ``lowbit convert``, not by
    ``save_pretrained``.
    """

    column_order: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        order = torch.arange(self.in_features, device=self.weight_packed.device)
        setattr(self, COLUMN_ORDER, nn.Parameter(order, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """As QuantLinear's: ``x (..., K)`` -> ``(..., N)``, x with its features in the model's order."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got {tuple(x.shape)}")
        return super().forward(x.index_select(-1, self.column_order))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(N, K)``, columns in the model's order."""
        weight = super().dequantize(dtype)
        return torch.empty_like(weight).index_copy_(1, self.column_order, weight)

    def extra_repr(self) -> str:
        """QuantLinear's, and that the columns are reordered."""
        return f"{super().extra_repr()}, reordered"

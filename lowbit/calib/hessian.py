"""The second moment of a linear's inputs, which is the Hessian of its squared output error (GPTQ, section 3.1).

    H = E[x x^T]        (K, K) float32        loss of Q for W:  trace((Q - W) H (Q - W)^T) = E |Q x - W x|^2
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Hessian", "output_loss"]

_COLUMNS = 1024  # the symmetric product is computed in stripes of this many columns: 5/8 of the work at K = 4096


class Hessian:
    """Running mean of ``x x^T`` over tokens.

    Args:
        k: input features.
        device: where to accumulate, float32.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add a chunk of inputs ``(tokens, K)``, any floating dtype (16-bit products are exact in float32).

        Raises:
            ValueError: wrong width, or a NaN or infinity among the inputs.
        """
        k = self._sum.shape[0]
        if x.ndim != 2 or x.shape[1] != k:
            raise ValueError(f"expected inputs (tokens, {k}), got {tuple(x.shape)}")
        x = x.to(self._sum.device, torch.float32)
        for start in range(0, k, _COLUMNS):
            stop = min(start + _COLUMNS, k)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """``E[x x^T]`` as a new symmetric ``(K, K)`` float32 tensor.

        Raises:
            ValueError: no token was seen (a hook that never fired would otherwise turn GPTQ into rounding), or the
                inputs held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("the Hessian has seen no tokens: the linear was not reached by the calibration data")
        upper = torch.triu(self._sum) / self.tokens
        hessian = upper + torch.triu(upper, 1).t()
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError("the calibration inputs of this linear contain NaN or infinite values")
        return hessian


def output_loss(candidate: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """``E |Q x - W x|^2`` per output row: shapes ``(N, K)``, ``(N, K)``, ``(K, K)`` -> ``(N,)``."""
    error = candidate - weight
    return ((error @ hessian) * error).sum(1)

"""What a packed linear shows of the dense weight it does not have."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["NoDenseWeightError", "StandInWeight", "stand_in"]


class NoDenseWeightError(AttributeError, ValueError):
    """A model wants the numbers of a weight that is packed. AttributeError for ``hasattr``."""

    def __init__(self, wanted: str, shape: tuple[int, ...]) -> None:
        super().__init__(
            f"{wanted}: the model uses the weight {shape} of a linear itself instead of calling the linear, which is "
            "packed; quantize the model again with that linear left out by ignore (--ignore)"
        )


class StandInWeight:
    """Shape, dtype and device of a weight ``(N, K)`` that is packed: models ask for these without calling the linear.

    No tensor on purpose. One without data, or of another dtype, would be multiplied by where a model or a fused kernel
    takes ``linear.weight``; this raises. It is no parameter either, so nothing saves, moves or ties it.

    Raises:
        NoDenseWeightError: an operation of torch is given it, or it is asked for anything but these three and ``ndim``.
    """

    _is_hf_initialized = True  # for the functions of transformers' _init_weights: the packed weight was loaded

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device, self.ndim = torch.Size(shape), dtype, device, 2

    def __getattr__(self, name: str) -> NoReturn:
        raise NoDenseWeightError(f"weight.{name}", tuple(self.shape))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        shape = next(tuple(a.shape) for a in tree_leaves((args, kwargs)) if isinstance(a, cls))
        raise NoDenseWeightError(f"{getattr(func, '__name__', func)}(weight)", shape)


def stand_in(linear: Any) -> StandInWeight | nn.Parameter:
    """The stand-in of a QuantLinear, in the dtype and on the device of its scales, or a ``weight`` it was lent."""
    lent: nn.Parameter | None = linear._parameters.get("weight")  # while transformers loads what is packed on the way
    if lent is not None:
        return lent
    scales = linear.weight_scale
    return StandInWeight((linear.out_features, linear.in_features), scales.dtype, scales.device)

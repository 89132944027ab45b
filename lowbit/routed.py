"""What calibration does for experts that few tokens are routed to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calib.hessian import Hessian
from .distributed import ALONE, Ranks
from .experts import Experts

__all__ = ["BLENDED", "RoutedInputs"]

BLENDED = "the Hessian of all the layer's tokens makes up for the rest"


class RoutedInputs:
    """Hessians of everything that enters the experts of a block, while it is entered as a context.

    An expert is starved when fewer tokens reach one of its linears than the linear has inputs K, so that their Hessian
    is singular. What it is calibrated with then:

    * ``gate_proj`` and ``up_proj``, which read the tokens themselves: the expert's own Hessian with the weight
      tokens / K, and with the remaining weight that of all tokens of the layer, whoever they are routed to;
    * ``down_proj``, whose inputs exist only for the expert's own tokens: rounding to nearest, on a grid that those
      inputs weigh, or on the weight's alone where there is none.
    """

    def __init__(
        self, block: nn.Module, device: torch.device, ranks: Ranks = ALONE, products: torch.dtype = torch.float32
    ) -> None:
        self._experts = {name: m for name, m in block.named_modules() if isinstance(m, Experts)}
        self._device, self._ranks, self._products = device, ranks, products
        self._all: dict[str, Hessian] = {}
        self._complete: set[str] = set()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> RoutedInputs:
        for name, module in self._experts.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self._complete:
                x = args[0].reshape(-1, args[0].shape[-1])
                self._all.setdefault(name, Hessian(x.shape[1], self._device, self._products)).add(x)

        return add

    def _owner(self, linear: str) -> str | None:
        return next((name for name in self._experts if linear.startswith(f"{name}.")), None)

    def is_expert(self, linear: str) -> bool:
        """Whether a linear, named relative to the block, belongs to an expert."""
        return self._owner(linear) is not None

    def share(self, linear: str) -> float:
        """Share of the tokens that reach a linear, if the router is fair: 1 outside of experts."""
        owner = self._owner(linear)
        return 1.0 if owner is None else self._experts[owner].top_k / len(self._experts[owner])

    def resolve(self, linear: str, own: Hessian) -> tuple[Tensor | None, str | None]:
        """The Hessian ``(K, K)`` to calibrate with, None for none at all, and the fallback in words if it is one.

        Args:
            linear: relative to the block.
            own: of the tokens that reached it, over all batches, each of which has entered the experts by now.

        Raises:
            ValueError: no token reached a linear that is not an expert's, or inputs that are not finite.
        """
        owner = self._owner(linear)
        if owner is None:
            return own.mean(), None
        everyone = self._of_all(owner)
        tokens, module = own.tokens, self._experts[owner].get_submodule(linear.removeprefix(f"{owner}."))
        assert isinstance(module, nn.Linear)
        k = module.in_features
        if tokens >= k:
            return own.mean(), None
        reached = f"starved expert: {tokens} calibration tokens for {k} inputs"
        if linear.endswith(".down_proj"):
            return (own.mean() if tokens else None), f"{reached}; rounded to nearest"
        blend = everyone.mean() * (1 - tokens / k)
        if tokens:
            blend += own.mean() * (tokens / k)
        return blend, f"{reached}; {BLENDED}"

    def everyone(self, linear: str) -> Hessian | None:
        """Of all tokens of the layer an expert's ``gate_proj`` or ``up_proj`` belongs to; None for other linears."""
        owner = self._owner(linear)
        return None if owner is None or linear.endswith(".down_proj") else self._of_all(owner)

    def _of_all(self, owner: str) -> Hessian:
        if owner not in self._complete:
            self._complete.add(owner)  # every batch has come by: later passes bring the same tokens again
            self._ranks.add_up(self._all[owner])
        return self._all[owner]

"""Mixtures of experts as linears of their own, one set per expert.

transformers 5 keeps the experts of a layer merged in 3-D parameters of one module, which a walk over ``nn.Linear``s
does not see. :func:`separate` makes an :class:`Experts` of such a module: the same function of its arguments, with one
``nn.Linear`` per expert and projection, named as in the checkpoints other engines read. Those are traced, calibrated
with the tokens routed to them, packed and stored like any other linear.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Experts", "separate", "why_not_separable"]

_PARTS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "_apply_gate")


class Experts(nn.ModuleList):
    """Routed experts; child ``e`` holds ``gate_proj`` and ``up_proj`` (I, H) and ``down_proj`` (H, I) of expert ``e``.

    Each token's outputs are put into a row per routed expert and summed over those rows, so the same input gives the
    same bits on every run. Packed experts that no token is routed to are not called; dense ones are, with no rows,
    because a walk that calibrates them expects each linear to run once per pass.

    Args:
        merged: the module of transformers this replaces; its activation is used, its weights are not.
        experts: one module per expert.
    """

    def __init__(self, merged: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__(experts)
        shell = copy.copy(merged)
        shell.__dict__["_parameters"] = {}  # not to keep the merged weights alive
        self._merged = (shell,)  # in a tuple, as it is no submodule: its name must not show in the state_dict
        self.top_k = 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states (T, H)``, ``top_k_index`` and ``top_k_weights (T, k)`` -> ``(T, H)``.

        An index of ``len(self)`` or more routes to nobody.
        """
        tokens, self.top_k = top_k_index.shape
        x = hidden_states.reshape(tokens, -1)
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        ends = torch.searchsorted(chosen[order], torch.arange(len(self), device=chosen.device), right=True).tolist()
        weights = top_k_weights.reshape(-1, 1)
        rows = x.new_zeros(tokens * self.top_k, x.shape[1], dtype=torch.promote_types(x.dtype, weights.dtype))
        start = 0
        for expert, end in zip(self, ends, strict=True):
            slots, start = order[start:end], end
            if len(slots) or isinstance(expert.down_proj, nn.Linear):
                rows[slots] = (self._run(expert, x[slots // self.top_k]) * weights[slots]).to(rows.dtype)
        return rows.view(tokens, self.top_k, -1).sum(1).to(hidden_states.dtype).view(hidden_states.shape)

    def _run(self, expert: Any, x: Tensor) -> Tensor:
        merged: Any = self._merged[0]
        up: Tensor = expert.up_proj(x)
        if not merged.has_gate:
            return expert.down_proj(merged.act_fn(up))  # type: ignore[no-any-return]
        gate: Tensor = expert.gate_proj(x)
        both = torch.cat((gate, up), -1) if merged.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return expert.down_proj(merged._apply_gate(both))  # type: ignore[no-any-return]


def why_not_separable(module: nn.Module) -> str | None:
    """Why a module is not merged experts that :func:`separate` understands; None when it is.

    The knowledge is transformers' own: the attributes its ``use_experts_implementation`` leaves on every such module.
    """
    missing = [name for name in _FLAGS if not hasattr(module, name)]
    if missing:
        return f"it does not describe its experts (no {', '.join(missing)})"
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return "experts with norms of their own or spread over devices"
    known = {name + end for name in _PARTS for end in ("", "_bias")}
    others = [name for name, _ in module.named_parameters() if name not in known]
    if others:
        return f"unknown parameters {others}"
    first = "gate_up_proj" if module.has_gate else "up_proj"
    wrong = [name for name in (first, "down_proj") if getattr(getattr(module, name, None), "ndim", 0) != 3]
    return f"{wrong} are not 3-D parameters" if wrong else None


def separate(merged: nn.Module) -> Experts:
    """:class:`Experts` whose linears are views of the merged module's weights.

    Raises:
        ValueError: :func:`why_not_separable` has a reason.
    """
    reason = why_not_separable(merged)
    if reason is not None:
        raise ValueError(f"{type(merged).__name__} cannot be taken apart: {reason}")
    first = "gate_up_proj" if merged.has_gate else "up_proj"
    experts = []
    for (weight, bias), down in zip(_slices(merged, first), _slices(merged, "down_proj"), strict=True):
        expert = nn.Module()
        if merged.has_gate:
            for i, name in enumerate(("gate_proj", "up_proj")):
                half = _half(weight, i, merged), None if bias is None else _half(bias, i, merged)
                expert.add_module(name, _linear(*half))
        else:
            expert.add_module("up_proj", _linear(weight, bias))
        expert.add_module("down_proj", _linear(*down))
        experts.append(expert)
    return Experts(merged, experts).train(merged.training)


def _slices(merged: nn.Module, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Per expert the weight ``(N, K)`` and the bias ``(N,)``, views."""
    weights: Tensor = getattr(merged, name).detach()
    weights = weights.mT if merged.is_transposed else weights
    biases = getattr(merged, f"{name}_bias").detach() if merged.has_bias else [None] * len(weights)
    return list(zip(weights, biases, strict=True))


def _half(rows: Tensor, index: int, merged: nn.Module) -> Tensor:
    """The gate's (0) or the up projection's (1) of rows that hold both, one after the other or in turn."""
    return rows.chunk(2)[index] if merged.is_concatenated else rows[index::2]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear

"""Weights of linears that are not held by an ``nn.Linear``, given to one for the time they are quantized."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .experts import separate, why_not_separable
from .plan import Plan, make_plan
from .spec import QuantSpec
from .walk import find_blocks

__all__ = ["Replacement", "linearize", "place", "plan_linearized", "settle"]

# Their forward looks at the dtype of the weight of their child "wo" before calling it, if there is one.
_LOOK_AT_WEIGHT = ("DenseActDense", "DenseGatedActDense")


@dataclass(frozen=True)
class Replacement:
    """A module that was replaced by another that computes the same from ``nn.Linear``s sharing its weights."""

    name: str
    original: nn.Module


def plan_linearized(
    model: nn.Module, spec: QuantSpec, ignore: Sequence[str], *, in_blocks: bool, allow_partial: bool
) -> Plan:
    """:func:`~lowbit.plan.make_plan` over the linears that :func:`linearize` makes too.

    Only modules the plan has targets in stay replaced; when it raises, none.

    Args:
        in_blocks: quantize the decoder blocks only; otherwise all of the model.
    """
    replaced = linearize(model)
    targets: Collection[str] = ()
    try:
        blocks = find_blocks(model) if in_blocks else None
        plan = make_plan(model, blocks, spec, ignore, allow_partial=allow_partial)
        targets = plan.targets
    finally:
        settle(model, replaced, targets)
    return plan


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a quantized linear where the dense one of that name was."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if type(parent).__name__.endswith(_LOOK_AT_WEIGHT) and not hasattr(module, "weight"):
        module.weight = None  # type: ignore[assignment]  # a ShardedLinear: only a tensor makes T5 cast its input
    model.set_submodule(name, module)


def linearize(model: nn.Module) -> list[Replacement]:
    """Replace, in place, GPT-2's Conv1D by an ``nn.Linear`` and merged experts by :class:`~lowbit.experts.Experts`.

    No weight is copied. A module that is used under two names stays as it is.

    Returns:
        what was replaced, for :func:`settle`, without which a model is not to be saved.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    replaced = []
    for module, (name, *others) in names.items():
        if others or not name:
            continue
        if _is_conv1d(module):
            model.set_submodule(name, _from_conv1d(module))
        elif why_not_separable(module) is None:
            model.set_submodule(name, separate(module))
        else:
            continue
        replaced.append(Replacement(name, module))
    return replaced


def settle(model: nn.Module, replaced: list[Replacement], targets: Collection[str]) -> None:
    """Put back every original none of whose linears is in ``targets``, and forget the others."""
    for entry in replaced:
        if not any(name == entry.name or name.startswith(f"{entry.name}.") for name in targets):
            model.set_submodule(entry.name, entry.original)
    replaced.clear()


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: ``x @ weight + bias`` with ``weight (K, N)``. Known by its name: this is no importer."""
    weight = getattr(module, "weight", None)
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter) and tuple(weight.shape) == sizes


def _from_conv1d(module: nn.Module) -> nn.Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(module.training)

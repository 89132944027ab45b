"""Which weights a run will quantize and which it will not, with the reason, before any work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .report import SkippedWeight
from .spec import QuantSpec
from .walk import Block

__all__ = ["MIN_COVERAGE", "Plan", "make_plan"]

MIN_COVERAGE = 0.9
"""Below this share of the decoder's weights a run is refused unless partial coverage is allowed."""


@dataclass(frozen=True)
class Plan:
    """Names of the linears to quantize, in model order, and every other weight matrix with its reason."""

    targets: tuple[str, ...]
    skipped: tuple[SkippedWeight, ...]
    coverage: float


def make_plan(
    model: nn.Module,
    blocks: Sequence[Block] | None,
    spec: QuantSpec,
    ignore: Sequence[str] = (),
    *,
    allow_partial: bool = False,
) -> Plan:
    """Decide for every parameter of two or more dimensions.

    Args:
        model: nothing in it is changed.
        blocks: the decoder blocks; linears elsewhere stay dense. None takes the whole model for the decoder.
        spec: its group size must divide K of every target.
        ignore: regular expressions, searched for in the module names; what matches stays dense.
        allow_partial: accept a coverage below :data:`MIN_COVERAGE`.

    Raises:
        ValueError: a bad or unused expression, a group size that does not divide some K (every such layer is named),
            NaN or infinite weights, nothing to quantize, or too little coverage.
    """
    patterns = [_compile(pattern) for pattern in ignore]
    used: set[str] = set()
    targets: list[str] = []
    skipped: list[SkippedWeight] = []
    inside = quantized = 0
    modules = dict(model.named_modules())
    for full_name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        owner = full_name.rpartition(".")[0]
        in_decoder = blocks is None or any(owner == b.name or owner.startswith(f"{b.name}.") for b in blocks)
        inside += parameter.numel() if in_decoder else 0
        match = next((p.pattern for p in patterns if p.search(owner)), None)
        used.update(p.pattern for p in patterns if p.search(owner))
        reason = _reason(full_name, modules[owner], parameter, in_decoder, match)
        if reason is None:
            targets.append(owner)
            quantized += parameter.numel()
        else:
            skipped.append(SkippedWeight(full_name, tuple(parameter.shape), reason))
    for pattern in patterns:
        if pattern.pattern not in used:
            raise ValueError(
                f"ignore {pattern.pattern!r} matches no weight of the model; for one, {_example(modules)!r}"
            )
    plan = Plan(tuple(targets), tuple(skipped), quantized / inside if inside else 0.0)
    _check(plan, modules, spec, allow_partial)
    return plan


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"ignore {pattern!r} is not a regular expression: {error}") from error


def _example(modules: dict[str, nn.Module]) -> str:
    return next((name for name, module in modules.items() if isinstance(module, nn.Linear)), "")


def _reason(name: str, owner: nn.Module, parameter: nn.Parameter, in_decoder: bool, match: str | None) -> str | None:
    """Why a weight stays dense; None when it is to be quantized."""
    if match is not None:
        return f"matches ignore {match!r}"
    if isinstance(owner, nn.Embedding):
        return "embedding, kept in the model's dtype"
    if not in_decoder:
        return "outside the decoder blocks, kept in the model's dtype"
    if not isinstance(owner, nn.Linear):
        return f"{parameter.ndim}-D parameter of {type(owner).__name__}: only nn.Linear weights are quantized"
    if not name.endswith(".weight"):
        return "not the weight of its nn.Linear"
    return None


def _check(plan: Plan, modules: dict[str, nn.Module], spec: QuantSpec, allow_partial: bool) -> None:
    if not plan.targets:
        raise ValueError(f"there is no linear weight to quantize; left out: {_list(plan.skipped)}")
    problems = []
    for name in plan.targets:
        weight = modules[name].weight
        assert isinstance(weight, torch.Tensor)
        try:
            spec.num_groups(weight.shape[1], name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{shown}\n  choose another group size, or leave these layers out with ignore")
    for name in plan.targets:
        weight = modules[name].weight
        assert isinstance(weight, torch.Tensor)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight contains NaN or infinite values; the model cannot be quantized")
    if plan.coverage < MIN_COVERAGE and not allow_partial:
        inside = [w for w in plan.skipped if "outside the decoder" not in w.reason and "embedding" not in w.reason]
        raise ValueError(
            f"only {plan.coverage:.1%} of the decoder's weights would be quantized, at least {MIN_COVERAGE:.0%} is "
            f"expected; not covered: {_list(inside)}. Allow it with allow_partial (--allow-partial)"
        )


def _list(weights: Sequence[SkippedWeight], limit: int = 4) -> str:
    largest = sorted(weights, key=lambda w: -torch.Size(w.shape).numel())
    shown = "; ".join(f"{w.name} {list(w.shape)} ({w.reason})" for w in largest[:limit])
    return shown + (f"; and {len(weights) - limit} more" if len(weights) > limit else "")

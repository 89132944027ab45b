"""Which weights a run will quantize and which it will not, with the reason, before any work."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .experts import Experts
from .facts import HELD_DENSE, of_latent_attention
from .report import SkippedWeight
from .spec import QuantSpec
from .walk import Block

__all__ = ["MIN_COVERAGE", "Plan", "make_plan"]

MIN_COVERAGE = 0.9
"""Below this share of the decoder's weights a run is refused unless partial coverage is allowed."""

_READ_THEIR_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that hand the weights of their linears to fused functions."""

_ROUTER = re.compile(r"(^|_)(gate|router)$")

_NARROW_GATES = re.compile(r"(^|\.)linear_attn\.(in_proj_(a|b|ba)|[ab]_proj)$")
"""Decay and strength of linear attention (Qwen3-Next, Qwen3.5, OLMo Hybrid): an output per head, 16 to 64 of them, some
0.1 % of a model. Kernels of vLLM and SGLang want outputs in multiples of 32 or 64, and SGLang has a fast way for these
where they are bfloat16 (0.5.23, ``qwen3_5.py``)."""


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

    A weight that two modules share stays dense: replacing one of them would leave the other as it was.

    Args:
        model: nothing in it is changed.
        blocks: the decoder blocks; linears elsewhere stay dense. None takes all of the model for the decoder but
            embeddings and a language model's output head.
        spec: its group size must divide K of every target.
        ignore: regular expressions, searched for in the module names; what matches stays dense.
        allow_partial: accept a coverage below :data:`MIN_COVERAGE`.

    Raises:
        ValueError: a bad or unused expression, a group size that does not divide some K (names five such layers and
            counts the rest), NaN or infinite weights, nothing to quantize, or too little coverage.
    """
    patterns = [_compile(pattern) for pattern in ignore]
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = _experts_within(modules)
    head = _output_head(model)
    used: set[str] = set()
    targets: list[str] = []
    skipped: list[SkippedWeight] = []
    uncovered: list[SkippedWeight] = []
    inside = quantized = 0
    for parameter, (name, *others) in _matrices(model).items():
        owner = name.rpartition(".")[0]
        found = [p.pattern for p in patterns if any(p.search(n.rpartition(".")[0]) for n in (name, *others))]
        used.update(found)
        if blocks is None:
            in_decoder = not isinstance(modules[owner], nn.Embedding) and modules[owner] is not head
        else:
            in_decoder = any(owner == b.name or owner.startswith(f"{b.name}.") for b in blocks)
        inside += parameter.numel() if in_decoder else 0
        reason = (
            f"matches ignore {found[0]!r}" if found else _reason(name, modules, experts, parameter, in_decoder, others)
        )
        if reason is None:
            targets.append(owner)
            quantized += parameter.numel()
            continue
        weight = SkippedWeight(name, tuple(parameter.shape), reason)
        uncovered += [weight] if in_decoder else []
        skipped.append(weight)
        skipped += [SkippedWeight(other, weight.shape, f"the same weight as {name}") for other in others]
    _check_used(patterns, used, modules)
    plan = Plan(tuple(targets), tuple(skipped), quantized / inside if inside else 0.0)
    _check(plan, model, spec)
    if plan.coverage < MIN_COVERAGE and not allow_partial:
        raise ValueError(
            f"only {plan.coverage:.1%} of the decoder's weights would be quantized, at least {MIN_COVERAGE:.0%} is "
            f"expected; not covered: {_list(uncovered)}. Allow it with allow_partial (--allow-partial)"
        )
    return plan


def _matrices(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter of two or more dimensions, in model order, with all names it has."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            names.setdefault(parameter, []).append(name)
    return names


def _output_head(model: nn.Module) -> nn.Module | None:
    """The module a Hugging Face language model makes its logits with."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"ignore {pattern!r} is not a regular expression: {error}") from error


def _check_used(patterns: Sequence[re.Pattern[str]], used: set[str], modules: dict[str, nn.Module]) -> None:
    example = next((name for name, module in modules.items() if isinstance(module, nn.Linear)), "")
    for pattern in patterns:
        if pattern.pattern not in used:
            raise ValueError(
                f"ignore {pattern.pattern!r} matches no weight of the model; module names look like {example!r}"
            )


def _reason(
    name: str,
    modules: dict[str, nn.Module],
    experts: Mapping[str, Sequence[nn.Module]],
    parameter: nn.Parameter,
    in_decoder: bool,
    others: Sequence[str],
) -> str | None:
    """Why a weight stays dense; None when it is to be quantized. ``experts`` as :func:`_experts_within` finds them."""
    path = name.rpartition(".")[0]
    owner, parent = modules[path], modules[path.rpartition(".")[0]]
    if isinstance(owner, nn.Embedding):
        return "embedding, kept in the model's dtype"
    if not in_decoder:
        return "outside the decoder blocks, kept in the model's dtype"
    if not isinstance(owner, nn.Linear):
        return f"{parameter.ndim}-D parameter of {type(owner).__name__}: only nn.Linear weights are quantized"
    if not path:
        return "the model itself is an nn.Linear, which cannot be replaced in place"
    if not name.endswith(".weight"):
        return "not the weight of its nn.Linear"
    if _is_in_router(path, modules, experts):
        return "router of a mixture of experts, kept in the model's dtype"
    if HELD_DENSE.search(path):
        return "vLLM and SGLang have it in the model's dtype, whatever the checkpoint says"
    if _NARROW_GATES.search(path):
        return "gate of linear attention, kept in the model's dtype: too few outputs for engines' kernels"
    if of_latent_attention(path, modules, bool(experts)):
        return "latent attention, kept in the model's dtype: SGLang has no other way"
    if others:
        return f"shared with {', '.join(others)}"
    if isinstance(parent, _READ_THEIR_CHILDREN):
        return f"{type(parent).__name__} reads this weight itself instead of calling its nn.Linear"
    if not _computes_a_linear(owner):
        return f"{type(owner).__name__} computes something else than an nn.Linear"
    return None


def _is_in_router(path: str, modules: dict[str, nn.Module], experts: Mapping[str, Sequence[nn.Module]]) -> bool:
    """Whether a linear decides about experts: it, or a module it is in, stands beside them and is called a gate or a
    router, or holds nothing else and gives a number per expert. Every linear directly beside :class:`Experts` does.
    """
    linear, inside = modules[path], path
    while inside:
        outer, _, name = inside.rpartition(".")
        module = modules[inside]
        beside = [other for other in experts.get(outer, ()) if other is not module]
        if module is linear and any(isinstance(other, Experts) for other in beside):
            return True
        if beside and (_ROUTER.search(name) or (_holds_only(module, linear) and _gives_one_each(linear, beside))):
            return True
        inside = outer
    return False


def _experts_within(modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """By the name of a module, its children that are experts, all of a block in one: also those that stay merged."""
    experts: dict[str, list[nn.Module]] = {}
    for path, module in modules.items():
        outer, _, name = path.rpartition(".")
        if path and (isinstance(module, Experts) or name == "experts" or type(module).__name__.endswith("Experts")):
            experts.setdefault(outer, []).append(module)
    return experts


def _holds_only(module: nn.Module, linear: nn.Module) -> bool:
    return [inner for inner in module.modules() if isinstance(inner, nn.Linear)] == [linear]


def _gives_one_each(linear: nn.Module, beside: Sequence[nn.Module]) -> bool:
    """Whether a linear has as many outputs as there are experts, where those tell their number."""
    counts: set[int] = set()
    for experts in beside:
        if isinstance(experts, (Experts, nn.ModuleList, nn.ModuleDict)):
            counts.add(len(experts))
        counts |= {len(parameter) for parameter in experts.parameters(recurse=False) if parameter.ndim == 3}
    return linear.out_features in counts


@torch.no_grad()
def _computes_a_linear(module: nn.Linear) -> bool:
    """False for subclasses, such as the routers of some mixtures of experts, that only store their weight like one."""
    if type(module).forward is nn.Linear.forward:
        return True
    if module.weight.is_meta:
        module = _with_values(module)
    k, weight = module.in_features, module.weight
    x = torch.linspace(-1, 1, 2 * k, device=weight.device).reshape(2, k).to(weight.dtype)
    try:
        found = module(x)
    except Exception:  # foreign code, called in a way it may not expect
        return False
    expected = nn.functional.linear(x, weight, module.bias)
    same = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return same and torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def _with_values(module: nn.Linear) -> nn.Linear:
    """A small stand-in for a module whose weight is not there yet: a copy of it with 4 rows of 8 columns."""
    stand_in = copy.copy(module)
    values = {"weight": torch.linspace(-1, 1, 32, device="cpu").reshape(4, 8).sin()}
    if module.bias is not None:
        values["bias"] = torch.linspace(-1, 1, 4, device="cpu")
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    stand_in.__dict__ = {**module.__dict__, "_parameters": {"bias": None, **parameters}}
    stand_in.in_features, stand_in.out_features = 8, 4
    return stand_in


def _check(plan: Plan, model: nn.Module, spec: QuantSpec) -> None:
    if not plan.targets:
        left_out = _list(plan.skipped) if plan.skipped else "nothing, it has no weight matrices"
        raise ValueError(f"{type(model).__name__} has no linear weight to quantize; left out: {left_out}")
    problems = []
    for name in plan.targets:
        try:
            spec.num_groups(model.get_parameter(f"{name}.weight").shape[1], name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{shown}\n  choose another group size, or leave these layers out with ignore")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            half = "; it was loaded in float16, beyond whose range of 65504 it may lie: try float32 or bfloat16"
            raise ValueError(
                f"{name} contains NaN or infinite values; the model cannot be quantized"
                + (half if parameter.dtype == torch.float16 else "")
            )


def _list(weights: Sequence[SkippedWeight], limit: int = 4) -> str:
    largest = sorted(weights, key=lambda w: -torch.Size(w.shape).numel())
    shown = "; ".join(f"{w.name} {list(w.shape)} ({w.reason})" for w in largest[:limit])
    return shown + (f"; and {len(weights) - limit} more" if len(weights) > limit else "")

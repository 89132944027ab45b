"""What a mixture of experts inside a decoder block is made of, found by structure: who reads its input, and which
projection of an expert a scale can pass from into the next.

A token's hidden state is read by the router and by the experts it is routed to, and in many models by shared experts,
which see every token. A scale that leaves the norm before must enter all of them. Within an expert it passes from the
up projection into the down projection where what comes between is proportional to the up projection's output: true of
``act(gate) * up``, false of gpt-oss, which clamps it and adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .experts import Experts

__all__ = ["Mixture", "find_mixture"]

_GATED = {"gate_proj", "up_proj", "down_proj"}
_NOT_PROPORTIONAL = "what comes before it is not proportional to the up projection's output"
_RANGE = 2.0**15  # of the inputs an activation is tried on: clamps in use are at 7 to 20


@dataclass
class Mixture:
    """A mixture of experts. Names are relative to the block.

    Attributes:
        name: the child of the block that holds the experts.
        inputs: linears of routed and shared experts that read its input.
        others: modules with a 2-D ``weight`` that read it too: routers, and gates of shared experts.
        pairs: (up projection, down projection) that a scale can pass between.
        reasons: linear -> why no scale enters it.
    """

    name: str
    inputs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


def find_mixture(block: nn.Module) -> Mixture | None:
    """The mixture of experts of a block, whose experts are linears of their own (:mod:`lowbit.experts`); None without.

    Where something in it is unknown, ``inputs`` is empty and ``reasons`` names what.
    """
    holders = [name for name, child in block.named_children() if _experts_of(child)]
    if len(holders) != 1:
        return None
    holder = block.get_submodule(holders[0])
    experts_name = _experts_of(holder)[0]
    experts = holder.get_submodule(experts_name)
    assert isinstance(experts, Experts)
    parts = ("gate_proj", "up_proj") if hasattr(experts[0], "gate_proj") else ("up_proj",)
    width = experts[0].up_proj.in_features
    inputs = [f"{experts_name}.{e}.{part}" for e in range(len(experts)) for part in parts]
    pairs = [(f"{experts_name}.{e}.up_proj", f"{experts_name}.{e}.down_proj") for e in range(len(experts))]
    reasons: dict[str, str] = {}
    if not _passes_a_scale(experts):
        reasons.update({down: _NOT_PROPORTIONAL for _, down in pairs})
        pairs = []
    others: list[str] = []
    unknown = [name for name, p in holder.named_parameters(recurse=False) if p.ndim > 1 or p.numel() == width]
    for name, child in holder.named_children():
        if name == experts_name or not any(True for _ in child.parameters()):
            continue
        if _is_gated_mlp(child, width):
            inputs += [f"{name}.gate_proj", f"{name}.up_proj"]
            pairs.append((f"{name}.up_proj", f"{name}.down_proj"))
        elif (router := _router(child, width)) is not None:
            others.append(f"{name}.{router}".rstrip("."))
        else:
            unknown.append(name)
    if unknown:
        reasons.update(dict.fromkeys(inputs, f"unknown parts {unknown} beside the experts"))
        inputs = []
    return Mixture(
        name=holders[0],
        inputs=tuple(f"{holders[0]}.{name}" for name in inputs),
        others=tuple(f"{holders[0]}.{name}" for name in others),
        pairs=tuple((f"{holders[0]}.{up}", f"{holders[0]}.{down}") for up, down in pairs),
        reasons={f"{holders[0]}.{name}": reason for name, reason in reasons.items()},
    )


def _experts_of(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, Experts)]


def _is_gated_mlp(module: nn.Module, width: int) -> bool:
    """Whether a module has a gated MLP's three linears and no other parameter."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if set(linears) != _GATED:
        return False
    owned = {p for linear in linears.values() for p in linear.parameters()}
    return set(module.parameters()) == owned and linears["up_proj"].in_features == width


def _router(module: nn.Module, width: int) -> str | None:
    """The module (itself: an empty name) with the only matrix of a router, ``weight (E, H)``; None if it is none."""
    matrices = [(name, p) for name, p in module.named_parameters() if p.ndim > 1]
    if len(matrices) != 1:
        return None
    (name, weight), path = matrices[0], matrices[0][0].rpartition(".")[0]
    fits = weight.ndim == 2 and weight.shape[1] == width and name.rpartition(".")[2] == "weight"
    vectors_fit = all(p.numel() == weight.shape[0] for p in module.parameters() if p.ndim < 2)
    return path if fits and vectors_fit else None


@torch.no_grad()
def _passes_a_scale(experts: Experts) -> bool:
    """Whether what the down projection reads doubles with the up projection's output, whatever the gate projection's.

    Doubling rounds nothing, so this is exact; the values reach beyond every clamp in use.
    """
    count = experts[0].up_proj.out_features
    draw = torch.Generator().manual_seed(0)
    up = torch.randn(64, count, generator=draw) * torch.logspace(-4, 15, 64, base=2.0).unsqueeze(1)
    up = up.clamp(-_RANGE, _RANGE)
    gate = 4 * torch.randn(64, count, generator=draw) if hasattr(experts[0], "gate_proj") else None

    def run(values: Tensor) -> Tensor:
        return experts._activate(gate, values)

    return torch.equal(run(2 * up), 2 * run(up))

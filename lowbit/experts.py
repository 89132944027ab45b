"""Mixtures of experts as linears of their own, one set per expert.

transformers 5 keeps the experts of a layer merged in 3-D parameters of one module, which a walk over ``nn.Linear``s
does not see. :func:`separate` makes an :class:`Experts` of such a module: the same function of its arguments, with one
``nn.Linear`` per expert and projection, named as in the checkpoints other engines read. Those are traced, calibrated
with the tokens routed to them, packed and stored like any other linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .stacked import Bond, GroupedLinear, InStack, device_of, kind_of, one_weight, why_not_stackable

__all__ = ["Expert", "Experts", "separate", "why_not_separable"]

_PARTS = ("gate_up_proj", "up_proj", "down_proj")
_UNITS = {
    "gate_up": ("gate_proj", "up_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj",),
    "down": ("down_proj",),
}
"""What is called in common -> the projections in it, from top to bottom."""
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "_apply_gate")


class _Unit(NamedTuple):
    """The stacks of what is called in common, one per kind, by name, and the experts that are called alone."""

    stacks: tuple[str, ...]
    alone: tuple[int, ...]


class Expert(nn.Module):
    """One expert's projections. Replacing one, as adapters do, ends the common calls for all experts (`Bond`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        replaced = self.__dict__.get("_modules", {}).get(name)
        if isinstance(replaced, InStack) and value is not replaced:
            replaced.bond.intact = False
        super().__setattr__(name, value)


class Experts(nn.Module):
    """Routed experts; child ``e`` holds ``gate_proj`` and ``up_proj`` (I, H) and ``down_proj`` (H, I) of expert ``e``.

    Each token's outputs are put into a row per routed expert and summed over those rows, so the same input gives the
    same bits on every run. :meth:`repack` puts packed experts into stacks, after which one grouped call multiplies with
    gate and up projections of all experts and another with the down projections, and no routing decision is copied to
    the host. Experts of several kinds (widths, groups, symmetry, W8A8) are as many calls. Ones that cannot be stacked,
    such as dense ones, are called alone between them, for which the routing is copied to the host.

    Until then experts run one after the other: packed ones that no token is routed to are not called; dense ones are,
    with no rows, because a walk that calibrates them expects each linear to run once per pass.

    Names and values in the ``state_dict`` do not depend on it, nor does what ``to``, ``half``, ``load_state_dict``,
    ``copy.deepcopy`` and ``pickle`` do.

    Args:
        merged: the module of transformers this replaces; its activation is used, its weights are not.
        experts: one module per expert.
    """

    def __init__(self, merged: nn.Module, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        for e, expert in enumerate(experts):
            self.add_module(str(e), expert)
        shell = copy.copy(merged)
        shell.__dict__["_parameters"] = {}  # not to keep the merged weights alive
        # in a tuple, as it is no submodule: its name must not show in the state_dict
        self._merged: tuple[Any] = (shell,)
        self._count, self.top_k = len(experts), 0
        self._bond: Bond | None = None
        self._units: dict[str, _Unit] = {}
        self._restack = False
        self.register_load_state_dict_post_hook(_restack)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._modules[str(range(self._count)[index])]

    def __iter__(self) -> Iterator[Any]:
        return (self[e] for e in range(self._count))

    @property
    def stacked(self) -> bool:
        """Whether the experts run in grouped calls."""
        return self._bond is not None and self._bond.intact

    def repack(self) -> Experts:
        """Put the projections of all experts into stacks where they are alike; returns self. Idempotent; experts that
        have become stackable since are stacked too.

        Their linears are to be repacked before. Needs memory for one more copy of one projection of all experts.
        :meth:`why_not_stackable` says why nothing happens.
        """
        called_alone = [(unit, e) for unit, held in self._units.items() for e in held.alone]
        if any(why_not_stackable(part) is None for unit, e in called_alone for part in self._linears(unit)[e]):
            self.take_apart()
        if self._bond is None and self.why_not_stackable() is None:
            self._bond = Bond()
            for unit in self._plan():
                self._units[unit] = self._stack(unit, self._bond)
        return self

    def why_not_stackable(self) -> str | None:
        """Why the experts have to run one after the other; None when some stack in each part."""
        devices = set()
        for part in self._parts():
            linears = [getattr(expert, part) for expert in self]
            reasons = [why_not_stackable(linear) for linear in linears]
            if None not in reasons:
                return f"{part}: {reasons[0]}"
            devices |= {device_of(linear) for linear, reason in zip(linears, reasons, strict=True) if reason is None}
        return f"experts on several devices, {sorted(map(str, devices))}" if len(devices) > 1 else None

    def take_apart(self) -> None:
        """Undo :meth:`repack`: every linear has its own tensors again."""
        for name in self._stacks:
            stack = self._modules.pop(name)
            assert isinstance(stack, GroupedLinear)
            stack.take_apart()
        self._units, self._bond = {}, None

    @property
    def _stacks(self) -> tuple[str, ...]:
        return tuple(name for unit in self._units.values() for name in unit.stacks)

    def _stack(self, unit: str, bond: Bond) -> _Unit:
        """Move what can be stacked of a unit, one stack per kind."""
        kinds: dict[Hashable, list[int]] = {}
        alone = []
        for e, parts in enumerate(self._linears(unit)):
            if any(why_not_stackable(part) is not None for part in parts):
                alone.append(e)
            else:
                alike = tuple((kind_of(part), part.out_features) for part in parts)
                kinds.setdefault(alike, []).append(e)
        names = []
        for number, members in enumerate(kinds.values()):
            linears = [self._linears(unit)[e] for e in members]
            slots = None
            if len(members) < len(self):
                slots = torch.full((len(self),), -1, dtype=torch.int32, device="cpu")
                slots[members] = torch.arange(len(members), dtype=torch.int32, device="cpu")
                slots = slots.to(linears[0][0].weight_scale.device)
            names.append(f"{unit}_{number}" if number else unit)
            self.add_module(names[-1], GroupedLinear(linears, bond, slots))
        return _Unit(tuple(names), tuple(alone))

    def _linears(self, unit: str) -> list[list[Any]]:
        """Per expert the projections of a unit."""
        return [[getattr(expert, part) for part in _UNITS[unit]] for expert in self]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states (T, H)``, ``top_k_index`` and ``top_k_weights (T, k)`` -> ``(T, H)``.

        An index of ``len(self)`` or more routes to nobody.
        """
        tokens, top_k = top_k_index.shape
        x, chosen, weights = hidden_states.flatten(0, -2), top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        if self._bond is not None and not self._bond.intact:
            self.take_apart()
        run = self._one_by_one if self._bond is None else self._grouped
        rows = run(x, chosen, weights, top_k)
        return rows.view(tokens, top_k, x.shape[1]).sum(1).to(hidden_states.dtype).view(hidden_states.shape)

    def _grouped(self, x: Tensor, chosen: Tensor, weights: Tensor, top_k: int) -> Tensor:
        """Weighted outputs ``(T * k, H)``, a row per token and choice; only an expert called alone makes this wait for
        the device."""
        sorted_experts, order = torch.sort(chosen, stable=True)
        experts = torch.arange(self._count, device=chosen.device, dtype=chosen.dtype)
        ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
        routed = x[order // top_k]
        if "gate_up" in self._units:
            both = self._call("gate_up", routed, ends)
            merged = self._merged[0]
            inner = merged._apply_gate(both) if merged.is_concatenated else self._activate(*both.chunk(2, -1))
        else:
            gate = self._call("gate", routed, ends) if "gate" in self._units else None
            inner = self._activate(gate, self._call("up", routed, ends))
        out = self._call("down", inner, ends) * weights[order]
        back = order.scatter(0, order, torch.arange(len(order), device=order.device))  # the inverse permutation
        return out[back]

    def _call(self, unit: str, x: Tensor, ends: Tensor) -> Tensor:
        """``x (T, K)`` sorted by expert -> ``(T, N)``: a grouped call per kind, whose results add up, as every row has
        one expert; then the experts that are called alone."""
        stacks, alone = self._units[unit].stacks, self._units[unit].alone
        out: Tensor = self.get_submodule(stacks[0])(x, ends)
        for name in stacks[1:]:
            out = out + self.get_submodule(name)(x, ends)
        if alone:
            stops = [0, *ends.tolist()]
            for e in alone:
                mine, parts = slice(stops[e], stops[e + 1]), [getattr(self[e], part) for part in _UNITS[unit]]
                if stops[e] < stops[e + 1] or isinstance(parts[0], nn.Linear):
                    out[mine] = torch.cat([part(x[mine]) for part in parts], -1)
        return out

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor, top_k: int) -> Tensor:
        """As :meth:`_grouped`, one expert after the other."""
        self.top_k = top_k
        order = torch.argsort(chosen, stable=True)
        ends = torch.searchsorted(chosen[order], torch.arange(len(self), device=chosen.device), right=True).tolist()
        rows = x.new_zeros(len(chosen), x.shape[1], dtype=torch.promote_types(x.dtype, weights.dtype))
        start = 0
        for expert, end in zip(self, ends, strict=True):
            slots, start = order[start:end], end
            if len(slots) or isinstance(expert.down_proj, nn.Linear):
                rows[slots] = (self._run(expert, x[slots // top_k]) * weights[slots]).to(rows.dtype)
        return rows

    def _run(self, expert: Any, x: Tensor) -> Tensor:
        up: Tensor = expert.up_proj(x)
        gate: Tensor | None = expert.gate_proj(x) if self._merged[0].has_gate else None
        return expert.down_proj(self._activate(gate, up))  # type: ignore[no-any-return]

    def _activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        merged: Any = self._merged[0]
        if gate is None:
            return merged.act_fn(up)  # type: ignore[no-any-return]
        both = torch.cat((gate, up), -1) if merged.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return merged._apply_gate(both)  # type: ignore[no-any-return]

    def _parts(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj", "down_proj") if self._merged[0].has_gate else ("up_proj", "down_proj")

    def _plan(self) -> tuple[str, ...]:
        """Units; gate and up projection are one where they are slices of one weight in every stacked expert."""
        if not self._merged[0].has_gate:
            return "up", "down"
        pairs = [pair for pair in self._linears("gate_up") if all(why_not_stackable(part) is None for part in pair)]
        return ("gate_up", "down") if pairs and all(one_weight(pair) for pair in pairs) else ("gate", "up", "down")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        if not self.stacked:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        stacks: list[Any] = [self._modules[name] for name in self._stacks]
        probes = [stack.scales.detach()[:0] for stack in stacks]
        if all(fn(probe) is probe for probe in probes):  # "moved" to where it is: the slices stay good
            for stack in stacks:
                stack._apply(fn, recurse)
            for unit, held in self._units.items():
                for part in (part for e in held.alone for part in self._linears(unit)[e]):
                    part._apply(fn, recurse)
            return self
        self.take_apart()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.repack()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restack = self.stacked
        self.take_apart()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the stacks: the linears, copied alone, have tensors of their own."""
        modules = {name: module for name, module in self._modules.items() if name not in self._stacks}
        return {**self.__dict__, "_modules": modules, "_units": {}, "_bond": None, "_restack": self.stacked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _restack(self, None)


def _restack(experts: nn.Module, _: object) -> None:
    """After the linears have their new values, whether loaded or unpickled."""
    assert isinstance(experts, Experts)
    if experts._restack:
        experts._restack = False
        experts.repack()


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
        expert = Expert()
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

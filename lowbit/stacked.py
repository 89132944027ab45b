"""Packed weights of many experts in one tensor, for the grouped matmuls, and the linears that lie in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .cpu import CPU_INT4, CPU_INT8, DISK
from .grouped import grouped_packed_linear
from .grouped_int8 import grouped_int8_linear
from .linear import Int8Linear, QuantLinear
from .ops import CUDA_TILES, has_grouped_kernel, packed_linear

__all__ = [
    "Bond",
    "GroupedLinear",
    "InStack",
    "StackedInt8Linear",
    "StackedLinear",
    "device_of",
    "kind_of",
    "one_weight",
    "why_not_stackable",
]

_NAMES = {"weight": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point", "bias": "bias"}
"""Tensor of a stack -> attribute of a QuantLinear."""
_NAMES_INT8 = {**_NAMES, "weight": "weight", "static": "input_scale"}
"""The same of an Int8Linear."""
_ROWS_AXIS = {
    DISK: {"weight": 0, "scales": 0, "zeros": 0, "bias": 0},
    CPU_INT4: {"weight": 0, "scales": 0, "zeros": 0, "bias": 0},
    CPU_INT8: {"weight": 1, "scales": 0, "zeros": 0, "bias": 0},
    CUDA_TILES: {"weight": 0, "scales": 1, "zeros": 1, "bias": 0},
}
"""Along which axis of a tensor, in each layout, rows of the weight follow each other (zeros on disk: words of rows)."""
_BY_COLUMN = (CPU_INT4, CPU_INT8)
_WHOLE_ROWS = 16
"""Rows that begin a new word or unit in every layout at every width."""


@dataclass
class Bond:
    """What stacks share with the linears in them: whether each of those is still where its expert calls it."""

    intact: bool = True


class InStack:
    """What a linear becomes when its tensors are slices of a :class:`GroupedLinear`'s and so no parameters of its own.

    To the outside (names, ``state_dict``, ``dequantize``, calls) it is the linear it was. A copy of it is one. Moving,
    converting and loading go through the module of all experts.
    """

    bond: Bond
    alone: type[QuantLinear] | type[Int8Linear]
    """The class it was."""

    def repack(self) -> Any:
        """Nothing: the stack is in the layout that the device multiplies fastest with."""
        return self

    def take_back(self) -> None:
        """Become a linear with tensors of its own again, in place."""
        linear: Any = self
        linear.__class__ = self.alone
        del linear.bond
        for name in _names_of(linear).values():
            slice_of_stack = linear.__dict__.pop(name)
            own = None if slice_of_stack is None else nn.Parameter(slice_of_stack.clone(), requires_grad=False)
            setattr(linear, name, own)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        linear: Any = self
        nn.Module._save_to_state_dict(linear, destination, prefix, keep_vars)
        tensors = {name: getattr(linear, name) for name in _names_of(linear).values()}
        if isinstance(linear, QuantLinear):
            tensors.update(zip(list(_NAMES.values())[:3], linear._disk_tensors(), strict=True))
        for name, tensor in tensors.items():
            if tensor is not None:
                shared = tensor.untyped_storage().nbytes() != tensor.nbytes
                destination[prefix + name] = tensor.clone() if shared else tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this linear lies in a stack of experts; load a state_dict into the module of all experts")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeError("this linear lies in a stack of experts; move or convert the module of all experts")

    def __reduce_ex__(self, protocol: Any) -> Any:
        linear: Any = self
        copy = object.__new__(type(linear))
        copy.__dict__ = {**linear.__dict__, "_parameters": dict(linear._parameters)}
        copy.take_back()
        return _blank, (self.alone,), copy.__getstate__() if self.alone is QuantLinear else copy.__dict__


def _blank(of: type[QuantLinear] | type[Int8Linear]) -> QuantLinear | Int8Linear:
    """What a pickle of a linear in a stack begins with; its state follows."""
    return object.__new__(of)


class StackedLinear(InStack, QuantLinear):
    """A :class:`QuantLinear` in a stack."""

    alone = QuantLinear

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`QuantLinear.forward`; a slice that the kernels cannot read in place is copied."""
        scales, zeros = self.weight_scale, self.weight_zero_point
        if self._layout == CUDA_TILES:
            scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
        how: dict[str, Any] = {"bits": self.spec.bits, "group_size": self.spec.group_size, "layout": self._layout}
        return packed_linear(x, self.weight_packed, scales, zeros, self.bias, **how)


class StackedInt8Linear(InStack, Int8Linear):
    """An :class:`Int8Linear` in a stack."""

    alone = Int8Linear


class GroupedLinear(nn.Module):
    """``x @ W[e].T + bias[e]`` of E experts, for rows sorted by expert.

    Args:
        linears: per weight its parts, from top to bottom, such as gate and up projection of an expert. Their tensors
            move into the stack one by one, and they become :class:`StackedLinear`s or :class:`StackedInt8Linear`s.
        bond: shared with them.
        slots: ``(E,)`` int32 on the linears' device, which of the weights an expert has, where some have none (-1).

    Raises:
        ValueError: the linears differ in more than their values (:func:`kind_of`).
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    static: Tensor | None
    bias: Tensor | None
    slots: Tensor | None

    def __init__(
        self, linears: Sequence[Sequence[QuantLinear | Int8Linear]], bond: Bond, slots: Tensor | None = None
    ) -> None:
        super().__init__()
        if len({kind_of(part) for parts in linears for part in parts}) > 1:
            raise ValueError(f"linears of one stack must be alike, got {[repr(parts) for parts in linears[:2]]}")
        first = linears[0]
        self.spec, self.layout, self.in_features = first[0].spec, _layout_of(first[0]), first[0].in_features
        self.out_features, self.num_experts = sum(part.out_features for part in first), len(linears)
        self.linears = tuple(part for parts in linears for part in parts)
        self.static = None
        for name, attribute in _names_of(first[0]).items():
            held = self._move(name, attribute, [[getattr(part, attribute) for part in parts] for parts in linears])
            setattr(self, name, None if held is None else nn.Parameter(held, requires_grad=False))
        self.register_buffer("slots", slots, persistent=False)
        for linear in self.linears:
            for name in _HOOKED:
                vars(linear).pop(name, None)
            linear.__class__ = StackedLinear if isinstance(linear, QuantLinear) else StackedInt8Linear
            cast(InStack, linear).bond = bond

    def _move(self, name: str, attribute: str, tensors: list[list[Tensor | None]]) -> Tensor | None:
        """Put one tensor of every linear into a stack and the slice in its place."""
        first = [tensor for tensor in tensors[0] if tensor is not None]
        if not first:
            for linear in self.linears:
                linear._parameters.pop(attribute, None)
                linear.__dict__[attribute] = None
            return None
        axis = _ROWS_AXIS[self.layout].get(name)
        shape, sizes = list(first[0].shape), [tensor.shape[axis or 0] for tensor in first]
        if axis is not None:
            shape[axis] = sum(sizes)
        if name in ("scales", "zeros") and self.layout in _BY_COLUMN:
            stack = first[0].new_empty(len(tensors), shape[1], shape[0]).transpose(1, 2)
        else:
            stack = first[0].new_empty(len(tensors), *shape)
        linears = iter(self.linears)
        for expert, parts in zip(stack, tensors, strict=True):
            # a static scale, which has no rows, is that of all parts of a weight
            places = [expert] * len(parts) if axis is None else expert.split(sizes, axis)
            for place, i in zip(places, range(len(parts)), strict=True):
                linear, own = next(linears), parts[i]
                assert own is not None
                place.copy_(own.detach())
                parts[i] = None  # the last reference but the linear's own
                del linear._parameters[attribute], own
                linear.__dict__[attribute] = place
        return stack

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """``x (T, K)`` sorted by expert, ``ends (E,)`` where each expert's rows end -> ``(T, N)``. See routing.py."""
        if self.spec.activations is not None:
            return grouped_int8_linear(
                x, ends, self.weight, self.scales, self.zeros, self.static, self.bias, slots=self.slots
            )
        how: dict[str, Any] = {"bits": self.spec.bits, "group_size": self.spec.group_size, "layout": self.layout}
        return grouped_packed_linear(x, ends, self.weight, self.scales, self.zeros, self.bias, slots=self.slots, **how)

    def take_apart(self) -> None:
        """Give every linear its own tensors back. The stack is of no use afterwards."""
        for linear in self.linears:
            if isinstance(linear, InStack):
                linear.take_back()

    def extra_repr(self) -> str:
        """Sizes, the spec's label, and the layout in memory."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec.label()}, layout={self.layout}"
        )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the linears write their slices under their own names."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: as above."""


def _names_of(linear: QuantLinear | Int8Linear) -> dict[str, str]:
    return _NAMES if isinstance(linear, QuantLinear) else _NAMES_INT8


def _layout_of(linear: QuantLinear | Int8Linear) -> str:
    return linear._layout if isinstance(linear, QuantLinear) else DISK


def device_of(linear: QuantLinear | Int8Linear) -> torch.device:
    """Where the packed weight lies."""
    return linear.weight_scale.device


def kind_of(linear: QuantLinear | Int8Linear) -> Hashable:
    """Equal for linears that differ in nothing but values and the number of rows, so that one call can multiply with
    them."""
    scales, bias = linear.weight_scale, linear.bias
    numbers = scales.dtype, None if bias is None else bias.dtype
    return linear.spec, _layout_of(linear), linear.in_features, numbers, device_of(linear)


def one_weight(parts: Sequence[QuantLinear | Int8Linear]) -> bool:
    """Whether the rows of linears can follow each other in the same tensor and all of them stay slices of it."""
    first = parts[0]
    if any(kind_of(part) != kind_of(first) for part in parts):
        return False
    if isinstance(first, QuantLinear):
        return all(part.out_features % _WHOLE_ROWS == 0 for part in parts)
    given = [part.input_scale for part in parts if isinstance(part, Int8Linear) and part.input_scale is not None]
    return all(torch.equal(scale, given[0]) for scale in given)


_HOOKED = ("forward", "_old_forward", "_hf_hook")
"""What accelerate puts on a module whose calls it precedes."""


def why_not_stackable(linear: nn.Module) -> str | None:
    """Why the projection of an expert has to be called alone; None when it need not.

    A hook by which accelerate only moves inputs to the weight's device (``device_map``) is no reason: the module of all
    experts has one too.
    """
    if type(linear) not in (QuantLinear, Int8Linear):
        return f"{type(linear).__name__} is no QuantLinear or Int8Linear"
    packed = cast("QuantLinear | Int8Linear", linear)
    device = device_of(packed)
    if device.type == "meta":
        return "weights on meta"
    hook = getattr(linear, "_hf_hook", None)
    only_moves = type(hook).__name__ == "AlignDevicesHook" and not cast(Any, hook).offload
    if linear._forward_hooks or linear._forward_pre_hooks or ("forward" in vars(linear) and not only_moves):
        return "something listens to the calls of a single expert"
    readable = isinstance(packed, Int8Linear) or packed._layout == CUDA_TILES
    if device.type == "cuda" and not (readable and has_grouped_kernel(device)):
        return f"no grouped kernel for the layout {_layout_of(packed)} on {torch.cuda.get_device_name(device)}"
    return None

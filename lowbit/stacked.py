"""Packed weights of many experts in one tensor, for the grouped matmul, and the linears that lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .cpu import CPU_INT4, CPU_INT8, DISK
from .grouped import grouped_packed_linear
from .linear import QuantLinear
from .ops import CUDA_TILES, has_grouped_kernel, packed_linear

__all__ = ["Bond", "GroupedLinear", "StackedLinear", "can_be_one", "whole_rows", "why_not_stackable"]

_NAMES = {"weight": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point", "bias": "bias"}
"""Tensor of a stack -> attribute of a QuantLinear."""
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
    """What a stack shares with the linears in it: whether each of those is still where its expert calls it."""

    intact: bool = True


class StackedLinear(QuantLinear):
    """A :class:`QuantLinear` whose tensors are slices of a :class:`GroupedLinear`'s and so no parameters of its own.

    To the outside (names, ``state_dict``, :meth:`dequantize`, calls) it is the QuantLinear it was. A copy of it is one.
    Moving, converting and loading go through the module of all experts.
    """

    bond: Bond

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`QuantLinear.forward`; a slice that the kernels cannot read in place is copied."""
        scales, zeros = self.weight_scale, self.weight_zero_point
        if self._layout == CUDA_TILES:
            scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
        how: dict[str, Any] = {"bits": self.spec.bits, "group_size": self.spec.group_size, "layout": self._layout}
        return packed_linear(x, self.weight_packed, scales, zeros, self.bias, **how)

    def repack(self) -> StackedLinear:
        """Nothing: the stack is in the layout that the device multiplies fastest with."""
        return self

    def take_back(self) -> None:
        """Become a QuantLinear with tensors of its own again, in place."""
        self.__class__ = QuantLinear  # type: ignore[assignment]
        del self.bond
        for name in _NAMES.values():
            slice_of_stack = self.__dict__.pop(name)
            own = None if slice_of_stack is None else nn.Parameter(slice_of_stack.clone(), requires_grad=False)
            setattr(self, name, own)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, tensor in zip(_NAMES.values(), (*self._disk_tensors(), self.bias), strict=True):
            if tensor is not None:
                shared = tensor.untyped_storage().nbytes() != tensor.nbytes
                destination[prefix + name] = tensor.clone() if shared else tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this linear lies in a stack of experts; load a state_dict into the module of all experts")

    def _apply(self, fn: Any, recurse: bool = True) -> StackedLinear:
        raise RuntimeError("this linear lies in a stack of experts; move or convert the module of all experts")

    def __reduce_ex__(self, protocol: Any) -> Any:
        copy = object.__new__(StackedLinear)
        copy.__dict__ = {**self.__dict__, "_parameters": dict(self._parameters)}
        copy.take_back()
        return _blank, (), copy.__getstate__()


def _blank() -> QuantLinear:
    """What a pickle of a linear in a stack begins with; its state follows."""
    return object.__new__(QuantLinear)


class GroupedLinear(nn.Module):
    """``x @ W[e].T + bias[e]`` of E experts, for rows sorted by expert.

    Args:
        linears: per expert the parts of its weight, from top to bottom, such as gate and up projection. Their tensors
            move into the stack one by one, and they become :class:`StackedLinear`s.
        bond: shared with them.

    Raises:
        ValueError: :func:`can_be_one` says no.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, linears: Sequence[Sequence[QuantLinear]], bond: Bond) -> None:
        super().__init__()
        if not can_be_one([part for parts in linears for part in parts]):
            raise ValueError(f"linears of one stack must be alike, got {[repr(parts) for parts in linears[:2]]}")
        first = linears[0]
        self.spec, self.layout, self.in_features = first[0].spec, first[0]._layout, first[0].in_features
        self.out_features, self.num_experts = sum(part.out_features for part in first), len(linears)
        self.linears = tuple(part for parts in linears for part in parts)
        for name, attribute in _NAMES.items():
            held = self._move(name, [[getattr(part, attribute) for part in parts] for parts in linears])
            setattr(self, name, None if held is None else nn.Parameter(held, requires_grad=False))
        for linear in self.linears:
            linear.__class__ = StackedLinear  # as torch.nn.utils.parametrize changes classes
            cast(StackedLinear, linear).bond = bond

    def _move(self, name: str, tensors: list[list[Tensor | None]]) -> Tensor | None:
        """Put one tensor of every linear into a stack and the slice in its place."""
        first = [tensor for tensor in tensors[0] if tensor is not None]
        if not first:
            for linear in self.linears:
                linear._parameters.pop(_NAMES[name], None)
                linear.__dict__[_NAMES[name]] = None
            return None
        axis = _ROWS_AXIS[self.layout][name]
        shape, sizes = list(first[0].shape), [tensor.shape[axis] for tensor in first]
        shape[axis] = sum(sizes)
        if name in ("scales", "zeros") and self.layout in _BY_COLUMN:
            stack = first[0].new_empty(len(tensors), shape[1], shape[0]).transpose(1, 2)
        else:
            stack = first[0].new_empty(len(tensors), *shape)
        linears = iter(self.linears)
        for expert, parts in zip(stack, tensors, strict=True):
            for place, i in zip(expert.split(sizes, axis), range(len(parts)), strict=True):
                linear, own = next(linears), parts[i]
                assert own is not None
                place.copy_(own.detach())
                parts[i] = None  # the last reference but the linear's own
                del linear._parameters[_NAMES[name]], own
                linear.__dict__[_NAMES[name]] = place
        return stack

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """``x (T, K)`` sorted by expert, ``ends (E,)`` where each expert's rows end -> ``(T, N)``. See grouped.py."""
        how: dict[str, Any] = {"bits": self.spec.bits, "group_size": self.spec.group_size, "layout": self.layout}
        return grouped_packed_linear(x, ends, self.weight, self.scales, self.zeros, self.bias, **how)

    def take_apart(self) -> None:
        """Give every linear its own tensors back. The stack is of no use afterwards."""
        for linear in self.linears:
            if isinstance(linear, StackedLinear):
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


def can_be_one(linears: Sequence[QuantLinear]) -> bool:
    """Whether linears differ in nothing but values and the number of rows, so that one call can multiply with them."""
    first = linears[0]
    return all(
        linear.spec == first.spec
        and linear._layout == first._layout
        and linear.in_features == first.in_features
        and linear.weight_scale.dtype == first.weight_scale.dtype
        and linear.weight_packed.device == first.weight_packed.device
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


def whole_rows(linear: QuantLinear) -> bool:
    """Whether another weight's rows can follow this one's in the same tensor and both stay slices of it."""
    return linear.out_features % _WHOLE_ROWS == 0


def why_not_stackable(linears: Sequence[nn.Module]) -> str | None:
    """Why one projection of all experts has to be called expert by expert; None when it need not."""
    for linear in linears:
        if type(linear) is not QuantLinear:
            return f"{type(linear).__name__} is no QuantLinear"
        if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
            return "something listens to the calls of a single expert"
    packed = [linear for linear in linears if isinstance(linear, QuantLinear)]
    first = packed[0]
    if not can_be_one(packed) or any(linear.out_features != first.out_features for linear in packed):
        return "experts of different shapes, widths, layouts, dtypes or devices"
    device = first.weight_packed.device
    if device.type == "meta":
        return "weights on meta"
    if device.type == "cuda" and not (first._layout == CUDA_TILES and has_grouped_kernel(device)):
        return f"no grouped kernel for the layout {first._layout} on {torch.cuda.get_device_name(device)}"
    return None

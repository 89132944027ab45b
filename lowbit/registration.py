"""How lowbit's torch.library operators are registered, and how they refuse a tensor that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOATS", "check_activations", "check_tensor", "register", "register_gradient"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What activations, scales and biases may be in."""

_LIBRARY = torch.library.Library("lowbit", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Tensor],
    cuda: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    save: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register ``lowbit::<schema>``.

    Args:
        cpu, cuda: implementations.
        fake: checks the arguments as they do and returns an empty result.
        save, backward: the formula of its gradients, as ``torch.library.register_autograd`` takes it.
    """
    name = _define(schema, fake)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_autograd(f"lowbit::{name}", backward, setup_context=save, lib=_LIBRARY)


def register_gradient(schema: str, *, anywhere: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Register ``lowbit::<operator>_backward``, an operator so that torch.compile does not trace its chunks.

    Args:
        anywhere: the implementation on every device.
        fake: an empty result.
    """
    name = _define(schema, fake)
    _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")

    def refuse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator = name.removesuffix("_backward")
        raise RuntimeError(
            f"lowbit::{operator} has no second derivative; call backward() or grad() without create_graph=True"
        )

    torch.library.register_autograd(f"lowbit::{name}", refuse, lib=_LIBRARY)


def _define(schema: str, fake: Callable[..., Tensor]) -> str:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lowbit::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.lowbit, name).default
    for device_type in ("cpu", "cuda"):
        _LIBRARY.impl(name, _outside_of_autocast(operator, device_type), f"Autocast{device_type.upper()}")
    return name


def _outside_of_autocast(operator: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """What runs where autocast is on: the result has x's dtype and not fewer bits than it has elsewhere."""

    def call(*args: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    return call


def check_activations(x: Tensor) -> None:
    """ValueError unless x is ``(..., K)`` in one of FLOATS."""
    if x.ndim == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x must be (..., K) in one of {FLOATS}, got {tuple(x.shape)} {x.dtype}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], x: Tensor) -> None:
    """ValueError that says which of shape, dtype and device is not what x and the operator's table ask for."""
    if tensor.ndim != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {dtypes}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; move one of them")

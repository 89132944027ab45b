"""compressed-tensors ``pack-quantized`` and ``int-quantized`` as a :class:`~lowbit.formats.base.SourceFormat`. The
layouts are in ``pack_quantized.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pack_config import PackedFormat
from ..pack_quantized import from_int8
from ..packing import pack_codes, packed_width, unpack_codes
from ..spec import QuantSpec
from .base import SCALE_DTYPES, LayerTensors, PackedLinear, check_scales

__all__ = ["CompressedFormat"]

_PACKED = ("weight_packed", "weight_scale", "weight_shape")
_INT = ("weight", "weight_scale")
# Tensors of the same family of formats that change what the others mean.
_FOREIGN_PARTS = ("weight_g_idx", "weight_global_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True)
class CompressedFormat:
    """A configuration of compressed-tensors that was read.

    Attributes:
        config: its config groups.
    """

    config: PackedFormat

    label = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale", *_FOREIGN_PARTS)

    def required(self, name: str) -> tuple[str, ...]:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        try:
            spec = self.config.spec_for(name)
        except ValueError:  # check() will say so; what the layer lacks is found first
            return _PACKED
        if spec.activations is None:
            return _PACKED
        return _INT if spec.activations.dynamic else (*_INT, "input_scale")

    def check(self, layer: LayerTensors) -> PackedLinear:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        name = layer.name
        spec = self.config.spec_for(name)
        allowed = {*self.required(name), "weight_zero_point"}
        for part in layer.infos:
            if part not in allowed:
                raise ValueError(f"packed layer {name} must not have a tensor {part!r}, but it does")
        if ("weight_zero_point" in layer) == spec.symmetric:
            have = "has" if spec.symmetric else "has no"
            raise ValueError(f"{name} {have} weight_zero_point, but its config_group says symmetric: {spec.symmetric}")
        shape = _check_packed(layer, spec) if spec.activations is None else _check_int(layer, spec)
        check_scales(f"{name}.weight_scale", layer.read("weight_scale"))
        return PackedLinear(name, shape, spec, layer.infos["weight_scale"].dtype, layer.nbytes)

    def packed(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        if linear.spec.activations is not None:
            return pack_codes(from_int8(layer.read("weight")), linear.spec.bits)
        return layer.read("weight_packed")

    def scales(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return layer.read("weight_scale")

    def zeros(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        stored = layer.read("weight_zero_point")
        if linear.spec.activations is not None:
            return from_int8(stored)
        return unpack_codes(stored, linear.spec.bits, linear.shape[0], dim=0)

    def order(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """Never reordered: actorder "weight" leaves the groups where they are."""
        return torch.arange(linear.shape[1], device="cpu")


def _check_packed(layer: LayerTensors, spec: QuantSpec) -> tuple[int, int]:
    """Dtypes, shapes and padding of a ``pack-quantized`` layer; returns (N, K)."""
    name = layer.name
    layer.expect("weight_shape", (torch.int64,), (2,))
    n, k = layer.read("weight_shape").tolist()
    if n <= 0 or k <= 0:
        raise ValueError(f"{name}.weight_shape must be two positive sizes, got {[n, k]}")
    groups = spec.num_groups(k, name)
    layer.expect("weight_packed", (torch.int32,), (n, packed_width(k, spec.bits)))
    layer.expect("weight_scale", SCALE_DTYPES, (n, groups))
    _check_padding(f"{name}.weight_packed", k * spec.bits, layer.view("weight_packed"), 1)
    if not spec.symmetric:
        layer.expect("weight_zero_point", (torch.int32,), (packed_width(n, spec.bits), groups))
        _check_padding(f"{name}.weight_zero_point", n * spec.bits, layer.view("weight_zero_point"), 0)
    return n, k


def _check_int(layer: LayerTensors, spec: QuantSpec) -> tuple[int, int]:
    """Dtypes and shapes of an ``int-quantized`` layer; returns (N, K)."""
    n, k = layer.matrix("weight")
    layer.expect("weight", (torch.int8,), (n, k))
    layer.expect("weight_scale", SCALE_DTYPES, (n, 1))
    if not spec.symmetric:
        layer.expect("weight_zero_point", (torch.int8,), (n, 1))
    if "input_scale" in layer:
        layer.expect("input_scale", SCALE_DTYPES, (1,))
        scale = float(layer.read("input_scale"))
        if not 0 < scale < float("inf"):
            raise ValueError(f"{layer.name}.input_scale must be finite and positive, got {scale}")
    return n, k


def _check_padding(name: str, bits: int, view: Any, dim: int) -> None:
    """Bits after the last code of a packed row (``dim`` 1) or column (``dim`` 0) are zero in every file."""
    used = bits % 32
    if used:
        last = view[:, -1:] if dim == 1 else view[-1:, :]
        if bool(((last.to(torch.int64) & 0xFFFFFFFF) >> used).any()):
            raise ValueError(f"{name} has bits set after its last code, so it was not packed as its config says")

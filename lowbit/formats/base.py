"""What the readers of all checkpoint formats have in common: a layer's stored tensors, checks, the result.

A format is a class with the methods of :class:`SourceFormat`. It sees one layer at a time, as a
:class:`LayerTensors`, and answers with packed codes, scales, zeros and, where the columns were reordered, their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..affine import QuantizedWeight
from ..packing import pack_codes, packed_width, unpack_codes
from ..spec import QuantSpec

__all__ = [
    "COLUMN_ORDER",
    "SCALE_DTYPES",
    "LayerTensors",
    "PackedLinear",
    "SourceFormat",
    "StoredWeight",
    "check_scales",
    "disk_tensor",
    "disk_tensors",
    "order_from_groups",
    "read_weight",
    "zeros_of",
]

COLUMN_ORDER = "column_order"
"""Name of the extra tensor of a layer whose columns are stored sorted by group (see :class:`StoredWeight`)."""

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TensorHeader(Protocol):
    """What a file's header says about a tensor (``shards.TensorInfo``)."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class PackedLinear:
    """One quantized layer of a checkpoint, described before its codes are read.

    Attributes:
        name: in the checkpoint, without ``.weight`` or the format's own suffixes.
        shape: of the weight, ``(N, K)``.
        spec: bits, group size, symmetry.
        scale_dtype: of the stored scales.
        nbytes: bytes of its stored tensors (codes, scales, zeros and what else the format keeps; not the bias).
        reordered: whether its groups are not of consecutive columns (GPTQ's act-order), see :class:`StoredWeight`.
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    scale_dtype: torch.dtype
    nbytes: int
    reordered: bool = False


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it was read.

    Attributes:
        weight: codes, scales and zeros, columns sorted by group.
        order: ``(K,)`` int64, or None when the columns stand as they are. Column ``j`` of ``weight`` is column
            ``order[j]`` of the layer, so ``y = x[:, order] @ dequantize(weight).T``.
        input_scale: ``(1,)``, where the layer's activations are quantized with one scale for all.
    """

    weight: QuantizedWeight
    order: Tensor | None = None
    input_scale: Tensor | None = None


class LayerTensors:
    """The stored tensors of one layer by the last part of their names (``qweight``), read when asked for.

    Args:
        name: the layer.
        infos: header of each part that exists.
        view: part -> something whose ``[...]`` reads it, such as a safetensors slice.
    """

    def __init__(self, name: str, infos: Mapping[str, TensorHeader], view: Callable[[str], Any]) -> None:
        self.name, self.infos, self._view = name, infos, view

    def __contains__(self, part: str) -> bool:
        return part in self.infos

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(info.nbytes for info in self.infos.values())

    def view(self, part: str) -> Any:
        """A lazily read tensor."""
        return self._view(part)

    def read(self, part: str) -> Tensor:
        """The whole tensor."""
        tensor: Tensor = self._view(part)[:]
        return tensor

    def matrix(self, part: str) -> tuple[int, int]:
        """Rows and columns of a part that must be a matrix, neither of them 0.

        Raises:
            ValueError: names the tensor and its shape.
        """
        shape = tuple(self.infos[part].shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.name}.{part} must be a matrix, got the shape {shape}")
        return shape[0], shape[1]

    def expect(self, part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        """Refuse another dtype or shape.

        Raises:
            ValueError: names the tensor, what it is and what it has to be.
        """
        info = self.infos[part]
        if info.dtype not in dtypes or tuple(info.shape) != shape:
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{self.name}.{part} must be {allowed} {shape}, got {info.dtype} {tuple(info.shape)}")


class SourceFormat(Protocol):
    """A checkpoint format that was recognised from ``quantization_config``, with what that says."""

    @property
    def label(self) -> str:
        """What the user calls it: ``gptq``, ``gptq-v2``, ``awq``, ``compressed-tensors``."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Last parts of the names of a quantized layer's tensors."""

    def required(self, name: str) -> tuple[str, ...]:
        """Parts that the quantized layer ``name`` must have; ``weight`` among them makes that a part of it too."""

    def check(self, layer: LayerTensors) -> PackedLinear:
        """Compare a layer's tensors with each other and with the configuration. Reads small tensors only."""

    def packed(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """Codes as packing.py packs them, ``(N, ceil(K * bits / 32))`` int32, columns sorted by group."""

    def scales(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """``(N, G)``."""

    def zeros(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """``(N, G)`` uint8; only asked for when the spec is asymmetric."""

    def order(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """``(K,)`` int64; only asked for when the layer is reordered."""


def read_weight(form: SourceFormat, layer: LayerTensors, linear: PackedLinear) -> StoredWeight:
    """One layer, unpacked."""
    codes = unpack_codes(form.packed(layer, linear), linear.spec.bits, linear.shape[1])
    zeros = None if linear.spec.symmetric else form.zeros(layer, linear)
    order = form.order(layer, linear) if linear.reordered else None
    static = linear.spec.activations is not None and not linear.spec.activations.dynamic
    input_scale = layer.read("input_scale").reshape(1) if static else None
    return StoredWeight(QuantizedWeight(codes, form.scales(layer, linear), zeros, linear.spec), order, input_scale)


def zeros_of(qw: QuantizedWeight) -> Tensor:
    """``(N, G)`` uint8: the zero points, of a symmetric weight the ones its grid implies."""
    return torch.full_like(qw.scales, qw.spec.mid_code, dtype=torch.uint8) if qw.zeros is None else qw.zeros


def disk_tensors(linear: PackedLinear) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of the layer in lowbit's own layout (packing.py, linear.py): part -> dtype and shape."""
    (n, k), spec = linear.shape, linear.spec
    groups = spec.num_groups(k, linear.name)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (n, packed_width(k, spec.bits))),
        "weight_scale": (linear.scale_dtype, (n, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (packed_width(n, spec.bits), groups))
    if linear.reordered:
        tensors[COLUMN_ORDER] = (torch.int64, (k,))
    return tensors


def disk_tensor(form: SourceFormat, layer: LayerTensors, linear: PackedLinear, part: str) -> Tensor:
    """One of :func:`disk_tensors`; reads only what that one needs."""
    if part == "weight_packed":
        return form.packed(layer, linear)
    if part == "weight_scale":
        return form.scales(layer, linear)
    if part == "weight_zero_point":
        return pack_codes(form.zeros(layer, linear), linear.spec.bits, dim=0)
    if part == "weight_shape":
        return torch.tensor(linear.shape, dtype=torch.int64, device="cpu")
    if part == COLUMN_ORDER:
        return form.order(layer, linear)
    raise ValueError(f"{linear.name} has no tensor {part!r}; it has {sorted(disk_tensors(linear))}")


def check_scales(name: str, scales: Tensor) -> None:
    """Refuse a scale that is zero or not finite. Negative ones are legal: AutoRound writes them.

    Raises:
        ValueError: names the tensor, the first such scale and where it stands.
    """
    bad = ~(torch.isfinite(scales) & (scales != 0))
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        value = float(scales[tuple(index)])
        raise ValueError(f"{name} must be finite and not zero, got {value} at {index}")


def order_from_groups(name: str, g_idx: Tensor, groups: int) -> Tensor | None:
    """The column order that sorts columns by group: GPTQ's ``g_idx`` undone.

    Args:
        name: of the tensor, for messages.
        g_idx: ``(K,)`` integer, group of each column.
        groups: G.

    Returns:
        ``(K,)`` int64, columns of one group in their own order; None when they are sorted already.

    Raises:
        ValueError: an entry outside ``[0, G)``, or groups that do not all have K / G columns.
    """
    g_idx = g_idx.to(torch.int64)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        column = int((g_idx < 0).logical_or(g_idx >= groups).nonzero()[0])
        raise ValueError(f"{name} must be in [0, {groups - 1}], got {int(g_idx[column])} at column {column}")
    counts = torch.bincount(g_idx, minlength=groups)
    size = g_idx.numel() // groups
    if bool((counts != size).any()):
        group = int((counts != size).nonzero()[0])
        raise ValueError(f"{name} must give every group {size} columns, but group {group} has {int(counts[group])}")
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True)

"""The AWQ format of AutoAWQ, version GEMM, read and written.

For a linear ``m`` with weight (N, K), 4 bits and G groups per row:

    m.qweight   int32  (K, N/8)   codes packed along N, interleaved: nibble i of a word holds its column ORDER[i]
    m.qzeros    int32  (G, N/8)   zeros packed the same way
    m.scales    float  (G, N)

Source: AutoAWQ 0.2.9 ``modules/linear/gemm.py`` and ``utils/packing_utils.py``. There is no act-order and no symmetric
form: zero points are always stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..foreign_config import AWQ, AWQ_BITS, AwqConfig
from ..packing import pack_codes, unpack_codes
from .base import SCALE_DTYPES, LayerTensors, PackedLinear, StoredWeight, check_scales, zeros_of

__all__ = ["AwqFormat", "awq_config", "awq_tensors", "check_awq"]

BITS = AWQ_BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of the eight of a word, that each nibble holds; nibble 0 is the low bits."""


@dataclass(frozen=True)
class AwqFormat:
    """AWQ as a :class:`~lowbit.formats.base.SourceFormat`, with a configuration that was read."""

    config: AwqConfig

    label = "awq"
    parts = ("qweight", "qzeros", "scales")

    def required(self, name: str) -> tuple[str, ...]:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return ("qweight", "qzeros", "scales")

    def check(self, layer: LayerTensors) -> PackedLinear:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        name, spec = layer.name, self.config.spec
        for part in self.config.dense:
            if part in name:
                raise ValueError(f"{name} is packed, but quantization_config.modules_to_not_convert lists {part!r}")
        k, words = layer.matrix("qweight")
        n = words * 8
        groups = spec.num_groups(k, name)
        layer.expect("qweight", (torch.int32,), (k, words))
        layer.expect("qzeros", (torch.int32,), (groups, words))
        layer.expect("scales", SCALE_DTYPES, (groups, n))
        check_scales(f"{name}.scales", layer.read("scales"))
        if spec.symmetric and bool((_unpack(layer.read("qzeros")) != spec.mid_code).any()):
            raise ValueError(
                f"{name}.qzeros holds zero points other than {spec.mid_code}, but quantization_config says "
                "zero_point: false"
            )
        return PackedLinear(name, (n, k), spec, layer.infos["scales"].dtype, layer.nbytes)

    def packed(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        n, k = linear.shape
        if k % 8:
            return pack_codes(_unpack(layer.read("qweight")).t().contiguous(), BITS)
        # Two rows of codes become one row of bytes: the nibbles of k and k + 1, one byte for each of the N columns.
        stored = layer.read("qweight").view(torch.uint8).view(k // 2, 2, n // 8, 4)
        even, odd = stored[:, 0], stored[:, 1]
        pairs = stored.new_empty(k // 2, n // 8, 8)
        for j in range(4):
            pairs[:, :, ORDER[2 * j]] = even[:, :, j] & 15 | (odd[:, :, j] & 15) << 4
            pairs[:, :, ORDER[2 * j + 1]] = even[:, :, j] >> 4 | odd[:, :, j] & 0xF0
        return pairs.view(k // 2, n).t().contiguous().view(torch.int32)

    def scales(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return layer.read("scales").t().contiguous()

    def zeros(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return _unpack(layer.read("qzeros")).t().contiguous()

    def order(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """Never reordered."""
        return torch.arange(linear.shape[1], device="cpu")


def _unpack(words: Tensor) -> Tensor:
    """``(R, C/8)`` words -> ``(R, C)`` codes."""
    stored = unpack_codes(words, BITS, words.shape[1] * 8).view(words.shape[0], -1, 8)
    codes = stored.clone()
    codes[:, :, list(ORDER)] = stored
    return codes.view(words.shape[0], -1)


def _pack(codes: Tensor) -> Tensor:
    """Inverse of :func:`_unpack`."""
    rows, columns = codes.shape
    return pack_codes(codes.reshape(rows, -1, 8)[:, :, list(ORDER)].reshape(rows, columns), BITS)


def check_awq(linear: PackedLinear) -> None:
    """Refuse a layer the format has no form for.

    Raises:
        ValueError: another width than 4 bits, reordered columns, rows that do not fill whole words.
    """
    if linear.spec.bits != BITS:
        raise ValueError(f"{linear.name}: awq holds {BITS}-bit weights, this one has {linear.spec.bits} bits")
    if linear.reordered:
        raise ValueError(f"{linear.name}: awq cannot hold reordered columns (act-order, g_idx); gptq can")
    if linear.shape[0] % 8:
        raise ValueError(f"{linear.name}: awq holds weights whose N is a multiple of 8, this one is {linear.shape}")


def awq_tensors(name: str, stored: StoredWeight) -> dict[str, Tensor]:
    """One layer that :func:`check_awq` lets pass, as AWQ stores it.

    A symmetric weight gets zero points of 8, which is what its grid means.
    """
    qw = stored.weight
    return {
        f"{name}.qweight": _pack(qw.codes.t().contiguous()),
        f"{name}.qzeros": _pack(zeros_of(qw).t().contiguous()),
        f"{name}.scales": qw.scales.t().contiguous(),
    }


def awq_config(linears: Mapping[str, PackedLinear], dense: Sequence[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``.

    Args:
        linears: the quantized layers, all of one group size.
        dense: names of linears that are not quantized.

    Raises:
        ValueError: group sizes differ, or a dense layer's name is part of a quantized one's: readers search for it.
    """
    sizes = sorted({linear.spec.group_size for linear in linears.values()})
    if len(sizes) > 1:
        raise ValueError(f"awq holds one group size for all layers, this checkpoint has {sizes}")
    for name in dense:
        longer = next((other for other in linears if name in other), None)
        if longer is not None:
            raise ValueError(
                f"awq cannot leave {name} dense: readers look for that text in names, and {longer} has it too"
            )
    return {
        "quant_method": AWQ,
        "version": "gemm",
        "bits": BITS,
        "group_size": sizes[0],
        "zero_point": True,
        "modules_to_not_convert": list(dense) or None,
    }

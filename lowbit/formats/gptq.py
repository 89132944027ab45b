"""The GPTQ format of AutoGPTQ and GPTQModel, read and written.

For a linear ``m`` with weight (N, K), b bits, group size g and G groups per row:

    m.qweight   int32  (K*b/32, N)   codes packed along K, first code in the low bits
    m.qzeros    int32  (G, N*b/32)   zeros packed along N: version 1 stores zero - 1, version 2 the zero
    m.scales    float  (G, N)
    m.g_idx     int32  (K,)          group of each column; k // g unless the columns were reordered (act-order)

Sources: AutoGPTQ 0.7.1 ``nn_modules/qlinear``, GPTQModel 7.7 ``nn_modules/qlinear/__init__.py`` and ``utils/model.py``.

Version 1 has no form for a zero of 0. Writers put 2**b - 1 there, and some of them borrow from the next code's bits;
which of them wrote a file cannot be told, so such a file is refused instead of being read one way or the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..foreign_config import GPTQ, GPTQ_VERSIONS, GptqConfig
from ..packing import pack_codes, packed_width, unpack_codes
from ..spec import QuantSpec
from .base import (
    SCALE_DTYPES,
    LayerTensors,
    PackedLinear,
    StoredWeight,
    check_scales,
    order_from_groups,
    zeros_of,
)

__all__ = ["GptqFormat", "check_gptq", "gptq_config", "gptq_tensors"]


@dataclass(frozen=True)
class GptqFormat:
    """GPTQ as a :class:`~lowbit.formats.base.SourceFormat`, with a configuration that was read."""

    config: GptqConfig

    parts = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def label(self) -> str:
        """``gptq`` or ``gptq-v2``."""
        return "gptq" if self.config.version == 1 else "gptq-v2"

    def required(self, name: str) -> tuple[str, ...]:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return ("qweight", "qzeros", "scales")

    def check(self, layer: LayerTensors) -> PackedLinear:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        settings, name = self.config.settings_for(layer.name), layer.name
        spec = settings.spec
        rows, n = layer.matrix("qweight")
        k = rows * 32 // spec.bits
        if "g_idx" in layer:  # it alone has one entry for each column
            shape = tuple(layer.infos["g_idx"].shape)
            if len(shape) != 1 or 0 in shape:
                raise ValueError(f"{name}.g_idx must be a vector, got the shape {shape}")
            k = shape[0]
        groups = spec.num_groups(k, name)
        per_word = 32 // spec.bits
        if n % per_word or k % per_word:
            raise ValueError(f"{name}: {spec.bits}-bit gptq has multiples of {per_word} rows and columns, not {(n, k)}")
        layer.expect("qweight", (torch.int32,), (packed_width(k, spec.bits), n))
        layer.expect("qzeros", (torch.int32,), (groups, n * spec.bits // 32))
        layer.expect("scales", SCALE_DTYPES, (groups, n))
        check_scales(f"{name}.scales", layer.read("scales"))
        reordered = False
        if "g_idx" in layer:
            layer.expect("g_idx", (torch.int32, torch.int64), (k,))
            reordered = order_from_groups(f"{name}.g_idx", layer.read("g_idx"), groups) is not None
        if reordered and not settings.desc_act:
            raise ValueError(
                f"{name}.g_idx reorders columns, but quantization_config says desc_act: false; engines disagree about "
                "what that means"
            )
        self._check_zeros(name, self._zeros(layer, spec, n), spec)
        return PackedLinear(name, (n, k), spec, layer.infos["scales"].dtype, layer.nbytes, reordered)

    def packed(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        words = layer.read("qweight")
        if linear.reordered:
            words = _reorder_rows(words, linear.spec.bits, self.order(layer, linear))
        return words.t().contiguous()

    def scales(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return layer.read("scales").t().contiguous()

    def zeros(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        return self._zeros(layer, linear.spec, linear.shape[0])

    def order(self, layer: LayerTensors, linear: PackedLinear) -> Tensor:
        """See :class:`~lowbit.formats.base.SourceFormat`."""
        k = linear.shape[1]
        order = order_from_groups(f"{linear.name}.g_idx", layer.read("g_idx"), linear.spec.num_groups(k))
        return torch.arange(k, device="cpu") if order is None else order

    def _zeros(self, layer: LayerTensors, spec: QuantSpec, n: int) -> Tensor:
        """``(N, G)``; version 1's ``2**bits - 1`` becomes ``2**bits`` (0 in 8 bits), which ``_check_zeros`` refuses."""
        stored = unpack_codes(layer.read("qzeros"), spec.bits, n).t().contiguous()
        return stored + 1 if self.config.version == 1 else stored

    def _check_zeros(self, name: str, zeros: Tensor, spec: QuantSpec) -> None:
        overflow = zeros == 2**spec.bits % 256
        if self.config.version == 1 and bool(overflow.any()):
            raise ValueError(
                f"{name}.qzeros holds {spec.max_code} in {int(overflow.sum())} of {overflow.numel()} places. GPTQ "
                f"version 1 stores zero - 1, so that is a zero point of 0 that underflowed, or one of {2**spec.bits}, "
                "out of range; tools disagree about which. Quantize the original model again, as gptq_v2"
            )
        if spec.symmetric and bool((zeros != spec.mid_code).any()):
            raise ValueError(
                f"{name}.qzeros holds zero points other than {spec.mid_code}, but quantization_config says sym: true"
            )


def _reorder_rows(words: Tensor, bits: int, order: Tensor) -> Tensor:
    """``(K*bits/32, N)`` words of codes along K -> the words of the codes ``order``, without expanding all of them."""
    rows, n = words.shape
    per_byte, mask = 8 // bits, 2**bits - 1
    # byte j of a word is a row of its own here, so that whole rows are gathered
    stored = words.view(torch.uint8).view(rows, n, 4).transpose(1, 2).reshape(rows * 4, n)
    out = torch.zeros_like(stored)
    for i in range(per_byte):
        source = order[i::per_byte]
        shift = (source % per_byte * bits).to(torch.uint8)[:, None]
        out |= (stored[source // per_byte] >> shift & mask) << (i * bits)
    return out.view(rows, 4, n).transpose(1, 2).contiguous().view(torch.int32).view(rows, n)


def check_gptq(linear: PackedLinear, zeros: Tensor | None, version: int) -> None:
    """Refuse a layer the format has no form for.

    Args:
        linear: the layer.
        zeros: ``(N, G)`` or None when it is symmetric.
        version: 1 or 2.

    Raises:
        ValueError: sizes that do not fill whole words; in version 1 a zero point of 0.
    """
    (n, k), bits = linear.shape, linear.spec.bits
    per_word = 32 // bits
    if n % per_word or k % per_word:
        raise ValueError(f"{linear.name}: {bits}-bit gptq holds multiples of {per_word} rows and columns, not {(n, k)}")
    if version == 1 and zeros is not None and bool((zeros == 0).any()):
        raise ValueError(
            f"{linear.name}: gptq stores zero - 1 and cannot hold a zero point of 0, which "
            f"{int((zeros == 0).sum())} of its {zeros.numel()} groups have; gptq-v2 can"
        )


def gptq_tensors(name: str, stored: StoredWeight, version: int) -> dict[str, Tensor]:
    """One layer that :func:`check_gptq` lets pass, as GPTQ stores it.

    Args:
        name: of the layer.
        stored: the weight and its column order.
        version: 1 or 2.
    """
    qw, order = stored.weight, stored.order
    bits, k, groups = qw.spec.bits, qw.codes.shape[1], qw.scales.shape[1]
    g_idx, codes = torch.arange(k, dtype=torch.int32, device=qw.codes.device) // (k // groups), qw.codes
    if order is not None:
        place = torch.argsort(order)  # where each column stands in the sorted weight
        g_idx, codes = g_idx[place], codes[:, place]
    zeros = zeros_of(qw)
    return {
        f"{name}.qweight": pack_codes(codes, bits).t().contiguous(),
        f"{name}.qzeros": pack_codes((zeros - 1 if version == 1 else zeros).t().contiguous(), bits),
        f"{name}.scales": qw.scales.t().contiguous(),
        f"{name}.g_idx": g_idx,
    }


def gptq_config(linears: Mapping[str, PackedLinear], dense: Sequence[str], version: int) -> dict[str, Any]:
    """config.json's ``quantization_config``; layers that differ from the most frequent spec are named in ``dynamic``.

    Args:
        linears: the quantized layers.
        dense: names of linears inside the model's blocks that are not quantized.
        version: 1 or 2.
    """
    specs = [linear.spec for linear in linears.values()]
    main = max(dict.fromkeys(specs), key=specs.count)
    form = {number: name for name, number in GPTQ_VERSIONS.items()}[version]
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in dense}
    for name, linear in linears.items():
        if linear.spec != main:
            dynamic[f"+:^{re.escape(name)}$"] = _fields(linear.spec)
    return {
        "quant_method": GPTQ,
        "checkpoint_format": form,
        "format": form,
        **_fields(main),
        "desc_act": any(linear.reordered for linear in linears.values()),
        "lm_head": "lm_head" in linears,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _fields(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}

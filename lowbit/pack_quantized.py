"""The compressed-tensors ``pack-quantized`` format as pure data: one layer's tensors, and config.json's section.

For a linear ``m`` with weight (N, K), b bits and G groups per row:

    m.weight_packed       int32  (N, ceil(K*b/32))    codes along K, first code in the low bits
    m.weight_scale        float  (N, G)
    m.weight_shape        int64  (2,)                 [N, K]
    m.weight_zero_point   int32  (ceil(N*b/32), G)    only when asymmetric, packed along N

Source: compressed-tensors 0.20, ``compressors/pack_quantized`` and ``quantization/quant_config.py``; the layout of 2, 4
and 8 bits is the same in every release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .affine import QuantizedWeight
from .packing import pack_codes
from .spec import PACKED_BITS, QuantSpec

__all__ = [
    "FORMAT",
    "QUANT_METHOD",
    "PackedFormat",
    "linear_tensors",
    "parse_quantization_config",
    "quantization_config",
]

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"

# Informational in every reader; the oldest release whose files are written exactly like ours.
_FORMAT_VERSION = "0.17.0"
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip


def linear_tensors(name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one quantized linear as they stand in a file.

    Args:
        name: the layer's name in the checkpoint, without ``.weight``.
        qw: codes ``(N, K)``, scales ``(N, G)`` float32, float16 or bfloat16, zeros ``(N, G)`` or None. Not modified.

    Returns:
        ``name.weight_packed``, ``.weight_scale``, ``.weight_shape`` and, when asymmetric, ``.weight_zero_point``, on
        the codes' device.

    Raises:
        ValueError: the width has no file format, or a scale is of another dtype, not finite or not positive.
    """
    if qw.scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{name}: scales must be one of {_SCALE_DTYPES} to be stored, got {qw.scales.dtype}")
    if qw.scales.numel() and not bool((torch.isfinite(qw.scales) & (qw.scales > 0)).all()):
        raise ValueError(f"{name}: scales must be finite and positive")
    tensors = {
        f"{name}.weight_packed": pack_codes(qw.codes, qw.spec.bits),
        f"{name}.weight_scale": qw.scales.contiguous(),
        f"{name}.weight_shape": torch.tensor(list(qw.codes.shape), dtype=torch.int64, device=qw.codes.device),
    }
    if qw.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = pack_codes(qw.zeros, qw.spec.bits, dim=0)
    return tensors


def quantization_config(specs: Mapping[str, QuantSpec], ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``.

    One spec for all layers targets the class ``Linear``; several make one group each, with the layers' own names as
    targets. Engines quantize every linear that is not ignored, so ``ignore`` has to list each ``nn.Linear`` left dense.

    Args:
        specs: checkpoint name of every packed layer -> its spec.
        ignore: checkpoint names of the linears left dense (``lm_head`` among them).

    Raises:
        ValueError: no layer, a width that has no file format, or a layer both packed and ignored.
    """
    if not specs:
        raise ValueError("a quantized checkpoint needs at least one packed layer, got none")
    both = sorted(set(specs) & set(ignore))
    if both:
        raise ValueError(f"layers are both packed and ignored: {both[:5]}")
    for name, spec in specs.items():
        if spec.bits not in PACKED_BITS:
            raise ValueError(f"{name}: widths with a file format are {PACKED_BITS} bits, got {spec.bits}")
    groups: dict[QuantSpec, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(spec, []).append(name)
    config_groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": _weights_entry(spec),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (spec, names) in enumerate(groups.items())
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": _FORMAT_VERSION,
        "config_groups": config_groups,
        "ignore": list(ignore),
    }


def _weights_entry(spec: QuantSpec) -> dict[str, Any]:
    channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else spec.group_size,
        "dynamic": False,
    }


@dataclass(frozen=True)
class PackedFormat:
    """A ``quantization_config`` that was read and understood.

    Attributes:
        groups: ``(spec, targets)`` per config group; a target is ``Linear``, a layer's name, or ``re:`` and a regex
            that must match from the name's start.
        ignore: names and ``re:`` patterns of linears left dense.
    """

    groups: tuple[tuple[QuantSpec, tuple[str, ...]], ...]
    ignore: tuple[str, ...]

    def spec_for(self, name: str) -> QuantSpec:
        """The spec of the packed layer ``name``; an exact name goes before a pattern, a pattern before ``Linear``.

        Raises:
            ValueError: the layer is ignored, in no group, or in several that differ.
        """
        if self.ignores(name):
            raise ValueError(f"{name} is packed, but quantization_config.ignore lists it")
        by_pattern = {spec for spec, targets in self.groups if _matches_pattern(targets, name)}
        for found in (self._by_name.get(name, set()), by_pattern, self._by_name.get("Linear", set())):
            if len(found) > 1:
                raise ValueError(f"{name} is in several config_groups that differ: {sorted(s.label() for s in found)}")
            if found:
                return next(iter(found))
        raise ValueError(f"{name} is packed, but no config_group of quantization_config targets it")

    def ignores(self, name: str) -> bool:
        """Whether ``name`` is listed as left dense."""
        return name in self._ignored or _matches_pattern(self.ignore, name)

    def named_targets(self) -> list[str]:
        """Targets that are plain names (a class name other than ``Linear`` cannot be told from one)."""
        return [target for target in self._by_name if target != "Linear"]

    @cached_property
    def _by_name(self) -> dict[str, set[QuantSpec]]:
        specs: dict[str, set[QuantSpec]] = {}
        for spec, targets in self.groups:
            for target in targets:
                if not target.startswith("re:"):
                    specs.setdefault(target, set()).add(spec)
        return specs

    @cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(self.ignore)


def _matches_pattern(targets: Sequence[str], name: str) -> bool:
    return any(target.startswith("re:") and re.match(target[3:], name) for target in targets)


def parse_quantization_config(config: object) -> PackedFormat:
    """Read config.json's ``quantization_config``; whatever is not weight-only ``pack-quantized`` is refused.

    Raises:
        ValueError: not compressed-tensors ``pack-quantized``, or a group quantizes activations, reorders columns at run
            time, is dynamic, or has bits, a strategy or a group size outside what lowbit reads. Names what was found.
    """
    top = _mapping(config, "quantization_config")
    if top.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"lowbit reads quant_method {QUANT_METHOD!r}, this checkpoint has {top.get('quant_method')!r}")
    _expect(top, "quantization_config", "format", FORMAT)
    _expect(top, "quantization_config", "quantization_status", "compressed")
    _expect(top, "quantization_config", "kv_cache_scheme", None)
    for key in ("sparsity_config", "transform_config"):
        if top.get(key):
            raise ValueError(f"quantization_config.{key} must be empty, got {top[key]!r}")
    groups = _mapping(top.get("config_groups"), "quantization_config.config_groups")
    if not groups:
        raise ValueError("quantization_config.config_groups must hold at least one group, got none")
    ignore = top.get("ignore")
    return PackedFormat(
        groups=tuple(_parse_group(f"config_groups.{name}", group) for name, group in groups.items()),
        ignore=() if ignore is None else _targets(ignore, "ignore"),
    )


def _parse_group(where: str, config: object) -> tuple[QuantSpec, tuple[str, ...]]:
    group = _mapping(config, where)
    _no_other_keys(group, where, _GROUP_KEYS)
    for key in ("input_activations", "output_activations"):
        _expect(group, where, key, None)
    if group.get("format") is not None:
        _expect(group, where, "format", FORMAT)
    weights = _mapping(group.get("weights"), f"{where}.weights")
    targets = _targets(group.get("targets"), f"{where}.targets")
    if not targets:
        raise ValueError(f"{where}.targets must not be empty")
    return _parse_weights(f"{where}.weights", weights), targets


def _parse_weights(where: str, weights: Mapping[str, Any]) -> QuantSpec:
    _no_other_keys(weights, where, _WEIGHT_KEYS)
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    if type(bits) is not int or bits not in PACKED_BITS:
        raise ValueError(f"{where}.num_bits must be one of {PACKED_BITS}, got {bits!r}")
    if type(symmetric) is not bool:
        raise ValueError(f"{where}.symmetric must be true or false, got {symmetric!r}")
    if weights.get("type", "int") != "int":
        raise ValueError(f"{where}.type must be 'int', got {weights['type']!r}")
    if weights.get("dynamic", False) is not False:
        raise ValueError(f"{where}.dynamic must be false, got {weights['dynamic']!r}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(
            f"{where}.actorder must be null, 'weight' or 'static' (no column order at run time), "
            f"got {weights['actorder']!r}"
        )
    _expect(weights, where, "block_structure", None)
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" and group_size in (None, -1):
        return QuantSpec(bits, -1, symmetric)
    if strategy == "group" and type(group_size) is int and group_size > 0:
        try:
            return QuantSpec(bits, group_size, symmetric)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    raise ValueError(
        f"{where}: strategy must be 'channel' without a group_size or 'group' with one, "
        f"got {strategy!r} with group_size {group_size!r}"
    )


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {value!r}")
    return value


def _targets(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} must be a list of names, got {value!r}")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise ValueError(f"{where}: {item!r} is not a regular expression: {error}") from None
    return tuple(value)


def _expect(mapping: Mapping[str, Any], where: str, key: str, value: object) -> None:
    if mapping.get(key) != value:
        raise ValueError(f"{where}.{key} must be {value!r}, got {mapping.get(key)!r}")


def _no_other_keys(mapping: Mapping[str, Any], where: str, known: set[str]) -> None:
    other = sorted(set(mapping) - known, key=str)
    if other:
        raise ValueError(f"{where} has keys lowbit does not know: {other}; known are {sorted(known)}")

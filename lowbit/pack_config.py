"""``quantization_config`` of the compressed-tensors formats: read, checked and written. Imports no torch.

What each field says about the tensors is in ``pack_quantized.py``. Source: compressed-tensors 0.20,
``quantization/quant_config.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .spec import PACKED_BITS, ActivationSpec, QuantSpec

__all__ = [
    "FORMAT",
    "INT_FORMAT",
    "QUANT_METHOD",
    "PackedFormat",
    "as_mapping",
    "parse_quantization_config",
    "quantization_config",
    "with_merged",
]

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
INT_FORMAT = "int-quantized"
_MIXED_FORMAT = "mixed-precision"  # then every group has a format of its own

# Informational in every reader; the oldest release whose files are written exactly like ours.
_FORMAT_VERSION = "0.17.0"

_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip


def quantization_config(specs: Mapping[str, QuantSpec], ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``.

    One spec for all layers targets the class ``Linear``; several make one group each, with the layers' own names as
    targets. Engines quantize every linear that is not ignored, so ``ignore`` has to list each ``nn.Linear`` left dense.

    Args:
        specs: checkpoint name of every packed layer -> its spec.
        ignore: checkpoint names of the linears left dense (``lm_head`` among them); :func:`with_merged` is written.

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
    formats = [_format_of(spec) for spec in groups]
    mixed = len(set(formats)) > 1
    config_groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": _weights_entry(spec),
            "input_activations": _activations_entry(spec),
            "output_activations": None,
            **({"format": formats[i]} if mixed else {}),
        }
        for i, (spec, names) in enumerate(groups.items())
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": _MIXED_FORMAT if mixed else formats[0],
        "quantization_status": "compressed",
        "version": _FORMAT_VERSION,
        "config_groups": config_groups,
        "ignore": with_merged(ignore),
    }


def with_merged(dense: Iterable[str]) -> list[str]:
    """The names of dense linears, and those of what SGLang merges two of them into.

    SGLang 0.5.23 knows what ``fused_qkv_a_proj_with_mqa`` is made of in DeepSeek's classes; in ``glm4_moe_lite.py`` it
    asks the list for that name, and would leave what is not found there uninitialised.
    """
    names = list(dense)
    known = set(names)
    latent = (name.removesuffix("q_a_proj") for name in names if name.endswith(".q_a_proj"))
    return names + [f"{at}fused_qkv_a_proj_with_mqa" for at in latent if f"{at}kv_a_proj_with_mqa" in known]


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


def _format_of(spec: QuantSpec) -> str:
    return FORMAT if spec.activations is None else INT_FORMAT


def _activations_entry(spec: QuantSpec) -> dict[str, Any] | None:
    if spec.activations is None:
        return None
    dynamic = spec.activations.dynamic
    return {
        "num_bits": spec.activations.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
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

    def targets(self, name: str) -> bool:
        """Whether engines take the linear ``name`` for packed: it is in a group, and not listed as left dense."""
        try:
            self.spec_for(name)
        except ValueError:
            return False
        return True

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
    """Read config.json's ``quantization_config``; whatever is not one of the two formats above is refused.

    Raises:
        ValueError: another format of compressed-tensors, or a group quantizes activations in a way lowbit does not,
            reorders columns at run time, has dynamic weights, or has bits, a strategy or a group size outside what
            lowbit reads. Names what was found.
    """
    top = as_mapping(config, "quantization_config")
    if top.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"lowbit reads quant_method {QUANT_METHOD!r}, this checkpoint has {top.get('quant_method')!r}")
    if top.get("format") not in (FORMAT, INT_FORMAT, _MIXED_FORMAT):
        raise ValueError(
            f"quantization_config.format must be {FORMAT!r}, {INT_FORMAT!r} or {_MIXED_FORMAT!r} of the two, "
            f"got {top.get('format')!r}"
        )
    _expect(top, "quantization_config", "quantization_status", "compressed")
    _expect(top, "quantization_config", "kv_cache_scheme", None)
    sparsity = top.get("sparsity_config") or {}
    if as_mapping(sparsity, "quantization_config.sparsity_config").get("format", "dense") != "dense":  # 2024's had it
        raise ValueError(f"quantization_config.sparsity_config must be empty or dense, got {sparsity!r}")
    if top.get("transform_config"):
        raise ValueError(f"quantization_config.transform_config must be empty, got {top['transform_config']!r}")
    groups = as_mapping(top.get("config_groups"), "quantization_config.config_groups")
    if not groups:
        raise ValueError("quantization_config.config_groups must hold at least one group, got none")
    ignore = top.get("ignore")
    return PackedFormat(
        groups=tuple(_parse_group(f"config_groups.{name}", group, top["format"]) for name, group in groups.items()),
        ignore=() if ignore is None else _targets(ignore, "ignore"),
    )


def _parse_group(where: str, config: object, default_format: str) -> tuple[QuantSpec, tuple[str, ...]]:
    group = as_mapping(config, where)
    _no_other_keys(group, where, _GROUP_KEYS)
    _expect(group, where, "output_activations", None)
    form = default_format if group.get("format") is None else group["format"]
    if form not in (FORMAT, INT_FORMAT):
        raise ValueError(f"{where}.format must be {FORMAT!r} or {INT_FORMAT!r}, got {form!r}")
    weights = as_mapping(group.get("weights"), f"{where}.weights")
    targets = _targets(group.get("targets"), f"{where}.targets")
    if not targets:
        raise ValueError(f"{where}.targets must not be empty")
    spec = _parse_weights(f"{where}.weights", weights)
    if form == FORMAT:
        _expect(group, where, "input_activations", None)
        return spec, targets
    activations = _parse_activations(f"{where}.input_activations", group.get("input_activations"))
    try:
        return replace(spec, activations=activations), targets
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parse_activations(where: str, config: object) -> ActivationSpec:
    fields = as_mapping(config, where)
    _no_other_keys(fields, where, _WEIGHT_KEYS)
    for key, value in (("num_bits", 8), ("type", "int"), ("symmetric", True)):
        _expect(fields, where, key, value)
    for key in ("group_size", "block_structure", "actorder"):
        _expect(fields, where, key, None)
    kind = fields.get("strategy"), fields.get("dynamic")
    if kind not in (("token", True), ("tensor", False)):
        raise ValueError(
            f"{where} must be dynamic with strategy 'token' or static with strategy 'tensor', got strategy {kind[0]!r} "
            f"with dynamic {kind[1]!r}"
        )
    return ActivationSpec(8, dynamic=kind[0] == "token")


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


def as_mapping(value: object, where: str) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        ValueError: something else; names it and where it stands.
    """
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

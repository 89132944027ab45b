"""``quantization_config`` of any format lowbit reads; GPTQ's, AWQ's and AutoRound's are read here. Imports no torch.

Sources: AutoGPTQ 0.7.1 ``nn_modules/qlinear``, GPTQModel 7.7 ``quantization/config.py``, AutoAWQ 0.2.9
``models/_config.py``, AutoRound 0.16.1 ``export/export_to_autoround/export.py`` and ``inference/convert_model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import load_json
from .pack_config import QUANT_METHOD as COMPRESSED_TENSORS
from .pack_config import PackedFormat, as_mapping, parse_quantization_config
from .spec import PACKED_BITS, QuantSpec

__all__ = [
    "AUTO_ROUND",
    "AWQ",
    "GPTQ",
    "GPTQ_VERSIONS",
    "AwqConfig",
    "GptqConfig",
    "GptqSettings",
    "parse_auto_round_config",
    "parse_awq_config",
    "parse_gptq_config",
    "quantization_section",
    "read_section",
]

GPTQ = "gptq"
AWQ = "awq"
AUTO_ROUND = "auto-round"
AWQ_BITS = 4
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}

# AutoRound's own packing is GPTQ's, with zero - 1 as in version 1 or with the zero as in version 2, or AWQ's.
_AUTO_ROUND_PACKINGS = {
    "auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": AWQ,
}  # fmt: skip
_READ = (
    "compressed-tensors (format pack-quantized or int-quantized), gptq (checkpoint_format gptq or gptq_v2), awq "
    "(version gemm) and auto-round (integers in GPTQ's or AWQ's packing)"
)
# Where AutoGPTQ and AutoAWQ kept their configuration before config.json had a place for it.
_LEGACY_SECTIONS = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}
# Each changes what the stored tensors mean or what has to be computed besides them.
_MUST_BE_EMPTY = ("activation", "adapter", "rotation")


def quantization_section(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a model folder, None for a dense model.

    It stands at the top of config.json, in the text model's part of a composite configuration, or, in folders of old
    tools, in a file of its own.

    Raises:
        ValueError: it is not a JSON object.
    """
    text = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(text, Mapping):
        section = text.get("quantization_config")
    for filename, method in _LEGACY_SECTIONS.items():
        if section is None and (folder / filename).is_file():
            section = {"quant_method": method, **load_json(folder / filename)}
    if section is not None and not isinstance(section, Mapping):
        raise ValueError(f"quantization_config must be a JSON object, got {section!r}")
    return section


def read_section(section: Any) -> PackedFormat | GptqConfig | AwqConfig:
    """Recognise and read a ``quantization_config``.

    Raises:
        ValueError: a method, format or version lowbit does not read (says which it reads), or contradictory fields.
    """
    method = as_mapping(section, "quantization_config").get("quant_method")
    if method == COMPRESSED_TENSORS:
        return parse_quantization_config(section)
    if method == GPTQ:
        return parse_gptq_config(section)
    if method == AWQ:
        return parse_awq_config(section)
    if method == AUTO_ROUND:
        return parse_auto_round_config(section)
    raise ValueError(f"lowbit reads the quant_methods {_READ}; this checkpoint has quant_method {method!r}")


@dataclass(frozen=True)
class GptqSettings:
    """Spec and act-order flag of a group of layers."""

    spec: QuantSpec
    desc_act: bool


@dataclass(frozen=True)
class _Rule:
    """One entry of ``dynamic``: layers whose name ``pattern`` matches get ``settings``, or stay dense (None)."""

    pattern: str
    settings: GptqSettings | None


@dataclass(frozen=True)
class GptqConfig:
    """A GPTQ ``quantization_config`` that was read.

    Attributes:
        version: 1 (``zero - 1`` is stored) or 2.
        settings: of layers that no rule names.
        rules: GPTQModel's ``dynamic``, the first that matches counts.
    """

    version: int
    settings: GptqSettings
    rules: tuple[_Rule, ...] = ()

    def settings_for(self, name: str) -> GptqSettings:
        """Settings of a quantized layer.

        Raises:
            ValueError: the configuration says it is not quantized.
        """
        for rule in self.rules:
            if re.match(rule.pattern, name):
                if rule.settings is None:
                    raise ValueError(
                        f"{name} is packed, but quantization_config.dynamic leaves it out ({rule.pattern})"
                    )
                return rule.settings
        return self.settings


@dataclass(frozen=True)
class AwqConfig:
    """An AWQ ``quantization_config`` that was read; ``dense`` has parts of the names of layers that are not packed."""

    spec: QuantSpec
    dense: tuple[str, ...] = ()


def parse_gptq_config(section: Mapping[str, Any]) -> GptqConfig:
    """Read a ``quantization_config`` with ``quant_method: gptq``. Keys without influence on the tensors are skipped.

    Raises:
        ValueError: a version, width, group size or word type lowbit does not read; names it and those it reads.
    """
    # AutoGPTQ and optimum write checkpoint_format, GPTQModel writes both; without either it is version 1.
    form = section.get("checkpoint_format") or section.get("format") or "gptq"
    if not isinstance(form, str) or form not in GPTQ_VERSIONS:
        raise ValueError(
            f"quantization_config: GPTQ checkpoint_format must be one of {list(GPTQ_VERSIONS)}, got {form!r}"
        )
    if section.get("is_marlin_format"):
        raise ValueError("quantization_config: is_marlin_format is true; lowbit reads GPTQ in its own layout only")
    if section.get("pack_dtype") not in (None, "int32"):
        raise ValueError(f"quantization_config.pack_dtype must be 'int32', got {section['pack_dtype']!r}")
    for key in _MUST_BE_EMPTY:
        if section.get(key):
            raise ValueError(f"quantization_config.{key} must be empty, got {section[key]!r}")
    settings = _gptq_settings(section, "quantization_config", None)
    rules = []
    for key, changes in as_mapping(section.get("dynamic") or {}, "quantization_config.dynamic").items():
        where = f"quantization_config.dynamic[{key!r}]"
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: not a regular expression: {error}") from None
        dense = key.startswith("-:")
        rules.append(_Rule(pattern, None if dense else _gptq_settings(as_mapping(changes, where), where, settings)))
    return GptqConfig(GPTQ_VERSIONS[form], settings, tuple(rules))


def _gptq_settings(fields: Mapping[str, Any], where: str, defaults: GptqSettings | None) -> GptqSettings:
    """Read bits, group_size, sym and desc_act; what is missing comes from ``defaults``."""
    spec = None if defaults is None else defaults.spec
    bits = fields.get("bits", spec and spec.bits)
    group_size = fields.get("group_size", 128 if spec is None else spec.group_size)
    symmetric = fields.get("sym", True if spec is None else spec.symmetric)
    desc_act = fields.get("desc_act", False if defaults is None else defaults.desc_act)
    if type(bits) is not int or bits not in PACKED_BITS:
        raise ValueError(f"{where}.bits must be one of {PACKED_BITS} to be read, got {bits!r}")
    for key, value in (("sym", symmetric), ("desc_act", desc_act)):
        if type(value) is not bool:
            raise ValueError(f"{where}.{key} must be true or false, got {value!r}")
    try:
        return GptqSettings(QuantSpec(bits, group_size, symmetric), desc_act)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_awq_config(section: Mapping[str, Any]) -> AwqConfig:
    """Read a ``quantization_config`` with ``quant_method: awq``.

    Raises:
        ValueError: another version than GEMM, another width than 4 bits, or a group size lowbit does not read.
    """
    version = str(section.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"quantization_config: AWQ version must be 'gemm' to be read, got {section['version']!r}")
    if section.get("backend", "autoawq") not in ("autoawq", None):
        raise ValueError(f"quantization_config: AWQ backend must be 'autoawq', got {section['backend']!r}")
    bits = section.get("bits", section.get("w_bit"))
    if type(bits) is not int or bits != AWQ_BITS:
        raise ValueError(f"quantization_config: AWQ weights have {AWQ_BITS} bits, got {bits!r}")
    zero_point = section.get("zero_point", True)
    if type(zero_point) is not bool:
        raise ValueError(f"quantization_config.zero_point must be true or false, got {zero_point!r}")
    dense = section.get("modules_to_not_convert") or []
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise ValueError(f"quantization_config.modules_to_not_convert must be a list of names, got {dense!r}")
    try:
        spec = QuantSpec(AWQ_BITS, section.get("group_size", section.get("q_group_size", 128)), not zero_point)
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None
    return AwqConfig(spec, tuple(dense))


def parse_auto_round_config(section: Mapping[str, Any]) -> GptqConfig | AwqConfig:
    """Read a ``quantization_config`` with ``quant_method: auto-round``: another description of GPTQ's or AWQ's tensors.

    Raises:
        ValueError: another packing or data type, quantized activations, rotations, or what GPTQ's and AWQ's own
            configurations are refused for.
    """
    where = "quantization_config"
    packing = section.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in _AUTO_ROUND_PACKINGS:
        raise ValueError(f"{where}.packing_format must be one of {list(_AUTO_ROUND_PACKINGS)}, got {packing!r}")
    layers = as_mapping(section.get("extra_config") or {}, f"{where}.extra_config")
    own = {key: as_mapping(changes, f"{where}.extra_config[{key!r}]") for key, changes in layers.items()}
    for fields in (section, *own.values()):
        if fields.get("data_type", "int") != "int":
            raise ValueError(f"{where}.data_type must be 'int', got {fields['data_type']!r}")
        if fields.get("act_bits") not in (None, 16, 32):
            raise ValueError(f"{where}.act_bits must be 16, got {fields['act_bits']!r}")
        for key in ("rotation_config", "super_bits"):
            if fields.get(key):
                raise ValueError(f"{where}.{key} must be empty, got {fields[key]!r}")
    dense = [key for key, changes in own.items() if changes.get("bits") in (16, 32)]
    if _AUTO_ROUND_PACKINGS[packing] == AWQ:
        others = sorted(own.keys() - set(dense))
        if others:
            raise ValueError(
                f"{where}.extra_config gives {others[:5]} settings of their own, which AWQ's packing has not"
            )
        zero_point = not section.get("sym", True)
        return parse_awq_config({**section, "zero_point": zero_point, "modules_to_not_convert": dense})
    # A name is a name, anything else a regular expression that may match in the middle; names count first.
    names = sorted(own, key=lambda key: not _is_name(key))
    rules = {("-:" if key in dense else "+:") + (f"{re.escape(key)}$" if _is_name(key) else f".*(?:{key})"):
             {} if key in dense else own[key] for key in names}  # fmt: skip
    form = _AUTO_ROUND_PACKINGS[packing]
    return parse_gptq_config({**section, "checkpoint_format": form, "desc_act": False, "dynamic": rules})


def _is_name(key: str) -> bool:
    return re.fullmatch(r"[\w.-]+", key) is not None and ".*" not in key

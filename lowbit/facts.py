"""What a checkpoint's config.json and headers say, as the facts that decide which engine opens it. Imports no torch.

Headers have no values: that ``g_idx`` really reorders, or that a zero point underflowed, is found by
:func:`~lowbit.checkpoint.read_checkpoint`, not here. A row-wise ``pack-quantized`` weight whose K does not fill its
last word counts with K rounded up to the word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .foreign_config import AUTO_ROUND, AwqConfig, GptqConfig, quantization_section, read_section
from .headers import Header, check_experts, read_config, read_headers
from .pack_config import FORMAT, INT_FORMAT, PackedFormat
from .spec import QuantSpec

__all__ = ["HELD_DENSE", "Checkup", "Kind", "check_up", "of_latent_attention"]

HELD_DENSE = re.compile(
    r"(^|\.)(indexer\.(wk|(scorer\.)?weights_proj)"  # sparse attention: DeepSeek-V3.2 and V4, GLM-5, Hunyuan V4, dots3
    r"|(compressor|indexer)\.(kv_proj|gate_proj)|compressor\.(wkv|wgate)"  # of DeepSeek-V4; its files say wkv and wgate
    r"|input_mix_weight_(down|up)|block_inject_weight)$"  # Qwen4's residual streams
)
"""Names of linears inside decoder blocks that vLLM 0.33 and SGLang 0.5.23 have in the model's dtype, whatever the file
says (``quant_config=None`` in vLLM's ``Indexer``, ``DeepseekCompressor`` and ``GatedResidual``). Most are small, and
decide which tokens are attended to."""

_LATENT = re.compile(r"(^|\.)(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Engines make one matrix of these, so they need one scheme.
_LINEAR = re.compile(r"(^|\.)(\w+_proj|wq|wk|wv|wo|w1|w2|w3)$")
_ROUTER = re.compile(r"(^|\.)(gate|router)$")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PARTS = {
    FORMAT: ("weight_packed", "weight_scale", "weight_shape"),
    INT_FORMAT: ("weight", "weight_scale"),
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
}


@dataclass(frozen=True)
class Kind:
    """Layers that differ in nothing an engine asks about.

    Attributes:
        format: pack-quantized, int-quantized, gptq, gptq-v2, awq or dense.
        spec: None for a dense model.
        act_order: the configuration says that columns are reordered (GPTQ's ``desc_act``).
        experts: whether they are experts of a mixture.
        layers, weights: their number.
        n, k: greatest common divisor of their output sizes N and of their input sizes K.
    """

    format: str
    spec: QuantSpec | None
    act_order: bool
    experts: bool
    layers: int
    weights: int
    n: int
    k: int

    def label(self) -> str:
        """``pack-quantized w4g128sym``, with what else there is."""
        extra = [text for text, said in (("act-order", self.act_order), ("experts", self.experts)) if said]
        return " ".join([self.format, *([] if self.spec is None else [self.spec.label()]), *extra])


@dataclass(frozen=True)
class Checkup:
    """A folder as far as its headers tell.

    Attributes:
        path: the folder, or the id on the hub.
        method: ``quant_method``, empty for a model that is not quantized.
        model_type, architecture, dtype: from config.json; empty where it does not say.
        hidden: ``hidden_size``, or the greatest common divisor of all N where config.json has none.
        kinds: of quantized layers, the one with most weights first; one dense kind for a model that is not quantized.
        fused_differ: layers that engines fuse (q, k, v; gate, up) have different specs.
        packed_held_dense: linears that are packed although engines have them dense: :data:`HELD_DENSE`.
        packed_latent: linears that are packed although SGLang wants them dense: :func:`of_latent_attention`.
        unlisted, unlisted_routers: linears, and routers, which some engines make linears of, that are dense although
            the configuration says that all linears are packed but those it lists (compressed-tensors' ``ignore``).
        own_code: config.json names Python code of the model's own.
        tensor_bytes: of all tensors.
    """

    path: str
    method: str
    model_type: str
    architecture: str
    dtype: str
    hidden: int
    kinds: tuple[Kind, ...]
    fused_differ: bool
    packed_held_dense: tuple[str, ...]
    packed_latent: tuple[str, ...]
    unlisted: tuple[str, ...]
    unlisted_routers: tuple[str, ...]
    own_code: bool
    tensor_bytes: int

    def facts(self, kind: Kind, device: str) -> dict[str, Any]:
        """What the rows of ``engines.json`` ask, for one kind of layers on one device."""
        spec = kind.spec
        activations = None if spec is None else spec.activations
        return {
            "format": kind.format,
            "auto_round": self.method == AUTO_ROUND,
            "bits": 16 if spec is None else spec.bits,
            "group_size": -1 if spec is None else spec.group_size,
            "symmetric": spec is None or spec.symmetric,
            "activations": "none" if activations is None else "dynamic" if activations.dynamic else "static",
            "act_order": kind.act_order,
            "experts": kind.experts,
            "mixed": len({(other.format, other.spec) for other in self.kinds}) > 1,
            "fused_differ": self.fused_differ,
            "packed_held_dense": bool(self.packed_held_dense),
            "packed_latent": bool(self.packed_latent),
            "unlisted": bool(self.unlisted),
            "unlisted_router": bool(self.unlisted_routers),
            "model_type": self.model_type,
            "dtype": self.dtype or "float32",
            "device": device,
            "n": kind.n,
            "k": kind.k,
            "hidden": self.hidden,
        }


@dataclass(frozen=True)
class _Layer:
    format: str
    spec: QuantSpec
    act_order: bool
    n: int
    k: int


def of_latent_attention(name: str, linears: Container[str], mixture: bool) -> bool:
    """Whether SGLang opens a model with this linear dense only.

    Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) multiplies by halves of ``kv_b_proj``, which SGLang
    0.5.23 takes from ``kv_b_proj.weight``. In mixtures of experts it also makes one linear of ``q_a_proj`` and
    ``kv_a_proj_with_mqa``, and of their ``weight_shape`` four numbers where it has room for two. They are 0.3 % of
    DeepSeek-V3; of dense models (MiniCPM3) the last two are more, and not merged.

    Args:
        name: of the linear.
        linears: names of all linears, dense and packed.
        mixture: whether the model has experts.
    """
    if not _LATENT.search(name):
        return False
    attention, _, last = name.rpartition(".")
    if f"{attention}.kv_b_proj" not in linears or f"{attention}.kv_a_proj_with_mqa" not in linears:
        return False
    return last == "kv_b_proj" or (mixture and f"{attention}.q_a_proj" in linears)


def check_up(folder: Path, headers: Mapping[str, Header] | None = None, name: str = "") -> Checkup:
    """Read config.json, the index and the headers of a model folder, and compare them.

    Args:
        folder: with config.json and safetensors.
        headers: the tensors, where they are not read from the folder.
        name: what to call the model; the folder where empty.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights, or a shard of the index is missing.
        ValueError: a format lowbit does not read, a damaged header, or a configuration that contradicts the headers.
    """
    config = read_config(folder)
    section = quantization_section(folder, config)
    settings = None if section is None else read_section(section)
    headers = read_headers(folder) if headers is None else headers
    check_experts(folder, config, headers)
    layers = {} if settings is None else _layers(folder, settings, headers)
    matrices = (name for name, header in headers.items() if name.endswith(".weight") and len(header.shape) == 2)
    dense = dict.fromkeys(name.removesuffix(".weight") for name in matrices)
    linears = {*dense, *layers}
    mixture = any(".experts." in name for name in headers)  # merged ones have no number
    text = config.get("text_config")
    described: Mapping[str, Any] = {**(text if isinstance(text, Mapping) else {}), **config}
    hidden = described.get("hidden_size")
    architectures = described.get("architectures")
    return Checkup(
        path=name or str(folder),
        method=_text(None if section is None else section.get("quant_method")),
        model_type=_text(described.get("model_type")),
        architecture=_text(architectures[0] if isinstance(architectures, list) and architectures else None),
        dtype=_text(described.get("dtype", described.get("torch_dtype"))),
        hidden=hidden if type(hidden) is int and hidden > 0 else math.gcd(*(layer.n for layer in layers.values())),
        kinds=_kinds(layers) if layers else (_dense_kind(headers),),
        fused_differ=_fused_differ({**dense, **{name: layer.spec for name, layer in layers.items()}}),
        packed_held_dense=tuple(name for name in layers if HELD_DENSE.search(name)),
        packed_latent=tuple(name for name in layers if of_latent_attention(name, linears, mixture)),
        unlisted=_unlisted(settings, dense.keys() - layers, _LINEAR),
        unlisted_routers=_unlisted(settings, dense.keys() - layers, _ROUTER),
        own_code=bool(config.get("auto_map")),
        tensor_bytes=sum(header.nbytes for header in headers.values()),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _layers(
    folder: Path, settings: PackedFormat | GptqConfig | AwqConfig, headers: Mapping[str, Header]
) -> dict[str, _Layer]:
    """Every quantized layer, its parts compared with each other and with the configuration."""
    parts: dict[str, dict[str, Header]] = {}
    first = ("weight_packed", "weight_scale") if isinstance(settings, PackedFormat) else ("qweight", "qzeros")
    for name in headers:
        layer, _, part = name.rpartition(".")
        if part in first:
            parts[layer] = {}
    for name, header in headers.items():
        layer, _, part = name.rpartition(".")
        if layer in parts:
            parts[layer][part] = header
    if not parts:
        raise ValueError(f"{folder}: quantization_config says the model is quantized, but no tensor is packed that way")
    return {name: _layer(folder, settings, name, found) for name, found in parts.items()}


def _layer(
    folder: Path, settings: PackedFormat | GptqConfig | AwqConfig, name: str, found: Mapping[str, Header]
) -> _Layer:
    act_order = False
    if isinstance(settings, PackedFormat):
        spec = settings.spec_for(name)
        form = FORMAT if spec.activations is None else INT_FORMAT
        static = spec.activations is not None and not spec.activations.dynamic
        needed = (*_PARTS[form], *([] if spec.symmetric else ["weight_zero_point"]))
        if (spec.symmetric and "weight_zero_point" in found) or static != ("input_scale" in found):
            raise ValueError(f"{folder}: layer {name} has {sorted(found)}, but its config_group says {spec.label()}")
    elif isinstance(settings, GptqConfig):
        of_layer = settings.settings_for(name)
        spec, act_order = of_layer.spec, of_layer.desc_act and of_layer.spec.group_size != -1
        form, needed = "gptq" if settings.version == 1 else "gptq-v2", _PARTS["gptq"]
    else:
        spec, form, needed = settings.spec, "awq", _PARTS["awq"]
    missing = [part for part in needed if part not in found or (part != "weight_shape" and len(found[part].shape) != 2)]
    if missing:
        raise ValueError(f"{folder}: layer {name} has {sorted(found)} but lacks {missing} (matrices)")
    n, k = _shape(form, spec, found)
    if min(n, k) == 0:
        raise ValueError(f"{name} must be a matrix, got the shape {(n, k)}")
    for part, shape in _expected(form, spec, n, k, name).items():
        if found[part].shape != shape:
            raise ValueError(
                f"{name} has {n} rows and {k} columns in {form} {spec.label()}, so its {part} must be {shape}, "
                f"got {found[part].shape}"
            )
    return _Layer(form, spec, act_order, n, k)


def _expected(form: str, spec: QuantSpec, n: int, k: int, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's parts."""
    groups = spec.num_groups(k, name)
    if form == INT_FORMAT:
        return {"weight_scale": (n, 1), **({} if spec.symmetric else {"weight_zero_point": (n, 1)})}
    if form == FORMAT:
        zeros = {} if spec.symmetric else {"weight_zero_point": (-(-n * spec.bits // 32), groups)}
        words = -(-k * spec.bits // 32)
        return {"weight_packed": (n, words), "weight_scale": (n, groups), "weight_shape": (2,), **zeros}
    codes = (k, n // 8) if form == "awq" else (-(-k * spec.bits // 32), n)
    return {"qweight": codes, "qzeros": (groups, n * spec.bits // 32), "scales": (groups, n)}


def _shape(form: str, spec: QuantSpec, found: Mapping[str, Header]) -> tuple[int, int]:
    """(N, K) of a layer."""
    if form == INT_FORMAT:
        n, k = found["weight"].shape
        return n, k
    if form == FORMAT:
        n, words = found["weight_packed"].shape
        groups = found["weight_scale"].shape[1]
        return n, words * (32 // spec.bits) if spec.group_size == -1 else groups * spec.group_size
    rows, columns = found["qweight"].shape
    if form == "awq":
        return columns * 8, rows
    return columns, math.prod(found["g_idx"].shape) if "g_idx" in found else rows * 32 // spec.bits


def _kinds(layers: Mapping[str, _Layer]) -> tuple[Kind, ...]:
    groups: dict[tuple[str, QuantSpec, bool, bool], list[_Layer]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.format, layer.spec, layer.act_order, bool(_EXPERT.search(name))), []).append(layer)
    kinds = []
    for (form, spec, act_order, experts), members in groups.items():
        weights = sum(layer.n * layer.k for layer in members)
        n, k = math.gcd(*(layer.n for layer in members)), math.gcd(*(layer.k for layer in members))
        kinds.append(Kind(form, spec, act_order, experts, len(members), weights, n, k))
    return tuple(sorted(kinds, key=lambda kind: -kind.weights))


def _unlisted(
    settings: PackedFormat | GptqConfig | AwqConfig | None, dense: Iterable[str], kind: re.Pattern[str]
) -> tuple[str, ...]:
    if not isinstance(settings, PackedFormat):
        return ()
    in_blocks = sorted(name for name in dense if kind.search(name) and any(map(str.isdecimal, name.split("."))))
    return tuple(name for name in in_blocks if settings.targets(name))


def _dense_kind(headers: Mapping[str, Header]) -> Kind:
    """The matrices inside numbered blocks: those that quantization would pack."""
    names = (name for name in headers if name.endswith(".weight") and any(map(str.isdecimal, name.split("."))))
    shapes = [headers[name].shape for name in names if len(headers[name].shape) == 2]
    sizes = [math.gcd(*(shape[i] for shape in shapes)) for i in (0, 1)]
    return Kind("dense", None, False, False, len(shapes), sum(n * k for n, k in shapes), sizes[0] or 1, sizes[1] or 1)


def _fused_differ(specs: Mapping[str, QuantSpec | None]) -> bool:
    """Whether parts of one fused matrix have different specs, a dense part among quantized ones included."""

    def differ(parts: Iterable[str]) -> bool:
        present = [specs[part] for part in parts if part in specs]
        return len(set(present)) > 1

    return any(
        name.endswith(f".{group[0]}") and differ(f"{name.removesuffix(group[0])}{part}" for part in group)
        for name in specs
        for group in _FUSED
    )

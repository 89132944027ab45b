"""Converting a packed checkpoint from one format to another, layer by layer, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .checkpoint import (
    Checkpoint,
    CheckpointWriter,
    PackedLinear,
    StoredWeight,
    check_output,
    linear_tensors,
    quantization_config,
    read_checkpoint,
)
from .companions import copy_companions
from .dtypes import DTYPES, dtype_name, parse_dtype
from .expand import DenseLayout, check_experts, dense_tensors, expand, is_merged
from .formats.awq import awq_config, awq_tensors, check_awq
from .formats.compressed import CompressedFormat
from .formats.gptq import check_gptq, gptq_config, gptq_tensors
from .manifest import read_manifest
from .modes import own_modes
from .pack_config import with_merged
from .progress import track

__all__ = ["TARGETS", "ConversionReport", "Target", "convert"]

Target = Literal["compressed-tensors", "gptq", "gptq-v2", "awq", "dense"]
TARGETS: tuple[str, ...] = get_args(Target)

_VERSIONS = {"gptq": 1, "gptq-v2": 2}


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        source, out: the folders.
        read, written: the formats.
        layers: number of packed layers.
        dtype: of floating-point tensors, None where each kept its own.
        scale_error: largest relative change of a scale; 0.0 means codes, scales and zeros are what they were.
        tensor_bytes: of all tensors, before and after.
        notes: what a reader of the output should know.
    """

    source: str
    out: str
    read: str
    written: str
    layers: int
    dtype: str | None
    scale_error: float
    tensor_bytes: tuple[int, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict with the attributes above."""
        return asdict(self)

    def __str__(self) -> str:
        exact = "codes, scales and zero points as they were"
        changed = f"scales changed by at most {self.scale_error:.2e} of themselves, codes and zero points as they were"
        lines = [
            f"{self.out}: {self.layers} layers, {self.read} -> {self.written}",
            f"{self.tensor_bytes[0]:,} -> {self.tensor_bytes[1]:,} bytes of tensors",
        ]
        if self.written != "dense":
            lines.append(changed if self.scale_error else exact)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@own_modes()
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    verbose: bool = True,
) -> ConversionReport:
    """Write a packed checkpoint in another format. Codes, scales and zero points stay what they are.

    Everything the target cannot hold is refused before anything is written. The output appears when it is complete.

    Args:
        source: a folder in any format lowbit reads, or a Hugging Face model id.
        out: folder to write.
        to: ``compressed-tensors``, ``gptq``, ``gptq-v2``, ``awq``, or ``dense``: weights expanded, rounded once.
        dtype: of scales and of everything that is not packed: float32, float16 or bfloat16. ``auto`` keeps each
            tensor's own; the weights of ``dense`` get the dtype config.json names.
        overwrite: replace an existing model folder, at the end.
        verbose: show progress on stderr.

    Raises:
        FileNotFoundError: no such folder or model.
        FileExistsError: the output exists.
        ValueError: an unknown target or dtype, a source that is not packed, damaged or of a format lowbit does not
            read, or something that the target or the dtype cannot hold; names the layer and what it is.
    """
    if to not in TARGETS:
        raise ValueError(f"the target must be one of {', '.join(TARGETS)}, got {to!r}")
    wanted = parse_dtype(dtype)
    folder = _folder(source)
    check_output(out, folder, overwrite)
    checkpoint = read_checkpoint(folder)
    error = _check_target(checkpoint, to, wanted)
    section = _section(checkpoint, to)
    layout = _layout(folder) if to == "dense" else DenseLayout()
    check_experts(layout, checkpoint.linears)
    before = sum(info.nbytes for info in checkpoint.dense.values())
    before += sum(linear.nbytes for linear in checkpoint.linears.values())
    after = 0
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        layers = track(checkpoint.linears.values(), f"writing {to}", enabled=verbose)
        for name, tensor in _tensors(checkpoint, to, wanted, layers, layout):
            writer.add(name, tensor)
            after += tensor.nbytes
        writer.add_json("config.json", _config(checkpoint, section, wanted))
        if to in _VERSIONS:
            writer.add_json("quantize_config.json", section)  # where AutoGPTQ and GPTQModel look first
        copy_companions(folder, writer.path, code=True, also=_listed(folder))
        report = ConversionReport(
            source=str(source),
            out=str(out),
            read=checkpoint.format.label,
            written=to,
            layers=len(checkpoint.linears),
            dtype=None if wanted is None else dtype_name(wanted),
            scale_error=error,
            tensor_bytes=(before, after),
            notes=_notes(checkpoint, to),
        )
        writer.finish({"model": folder.name, **_record(checkpoint, report)})
    return report


def _folder(source: str | os.PathLike[str]) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from .hf import resolve  # only here: a local folder is converted without importing transformers

    return resolve(source, trust_remote_code=True)  # its code is only copied, and compared with lowbit.json


def _listed(folder: Path) -> list[str]:
    """What lowbit.json, where there is one, names beside the weights: vocabularies of any name."""
    manifest = read_manifest(folder) or {"files": {}}
    return [name for name in manifest["files"] if not name.endswith(".safetensors")]


def _record(checkpoint: Checkpoint, report: ConversionReport) -> dict[str, Any]:
    """The source's lowbit.json, where it has one, and what this conversion did."""
    record = {key: value for key, value in (checkpoint.record or {}).items() if key != "lowbit_version"}
    done = {"from": report.read, "to": report.written, "dtype": report.dtype, "scale_error": report.scale_error}
    return {**record, "conversion": done}


def _layout(folder: Path) -> DenseLayout:
    from .hf.dense import dense_layout  # only for dense: the others are converted without importing transformers

    return dense_layout(folder) or DenseLayout()


def _check_target(checkpoint: Checkpoint, to: str, dtype: torch.dtype | None) -> float:
    """Refuse what the target cannot hold; returns the largest relative change of a scale."""
    error = 0.0
    for name, linear in checkpoint.linears.items():
        if to == "compressed-tensors" and linear.reordered:
            raise ValueError(
                f"{name}: compressed-tensors cannot hold reordered columns (act-order, g_idx); gptq, gptq-v2 and dense "
                "can"
            )
        if to not in ("compressed-tensors", "dense") and linear.spec.activations is not None:
            raise ValueError(f"{name}: {to} cannot hold quantized activations; compressed-tensors and dense can")
        if to == "awq":
            check_awq(linear)
        if to in _VERSIONS:
            check_gptq(linear, checkpoint.zeros(name), _VERSIONS[to])
        if to != "dense":
            scales = checkpoint.scales(name)
            error = max(error, _relative_change(name, scales, _stored_scales(name, scales, to, dtype)))
        elif _may_leave_range(checkpoint, linear, wide := dtype or _dense_dtype(checkpoint)):
            _check_range(f"{name}.weight", expand(checkpoint.stored_weight(name)), wide)
    for name, info in checkpoint.dense.items():
        if dtype is not None and info.dtype.is_floating_point and _largest(info.dtype) > _largest(dtype):
            _check_range(name, checkpoint.tensor(name), dtype)
    return error


def _largest(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).max)


def _may_leave_range(checkpoint: Checkpoint, linear: PackedLinear, dtype: torch.dtype) -> bool:
    """Whether a weight of the layer could be too large for ``dtype``, by its scales: ``|code - zero| <= max_code``."""
    return float(checkpoint.scales(linear.name).abs().max()) * linear.spec.max_code > _largest(dtype)


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    lost = tensor[torch.isfinite(tensor) & ~torch.isfinite(tensor.to(dtype))]
    if lost.numel():
        raise ValueError(
            f"{name}: {lost.numel()} of {tensor.numel()} values are out of the range of {dtype_name(dtype)}, such as "
            f"{float(lost[0]):.4g}; choose another dtype"
        )


def _stored_scales(name: str, scales: Tensor, to: str, dtype: torch.dtype | None) -> Tensor:
    """Scales in the dtype they are written in."""
    if dtype is not None:
        return scales.to(dtype)
    if to == "compressed-tensors" or scales.dtype != torch.float32:
        return scales
    halves = scales.to(torch.float16)  # readers of GPTQ and AWQ know 16-bit scales only
    if not torch.equal(halves.float(), scales):
        raise ValueError(
            f"{name}: its scales are float32 and do not fit {to}'s 16 bits as they are; --dtype float16 or bfloat16 "
            "rounds them"
        )
    return halves


def _relative_change(name: str, scales: Tensor, stored: Tensor) -> float:
    if not bool((torch.isfinite(stored) & (stored != 0)).all()):
        raise ValueError(f"{name}: its scales are out of the range of {dtype_name(stored.dtype)}")
    change = (stored.double() - scales.double()).abs() / scales.double().abs()
    return float(change.max())


def _section(checkpoint: Checkpoint, to: str) -> dict[str, Any] | None:
    """The output's ``quantization_config``."""
    linears, dense = checkpoint.linears, with_merged(checkpoint.dense_linears())
    if to == "dense":
        return None
    if to == "compressed-tensors":
        if isinstance(checkpoint.format, CompressedFormat):
            section = checkpoint.lowbit_section()
            unlisted = [name for name in _inside_blocks(dense) if checkpoint.format.config.targets(name)]
            return {**section, "ignore": [*(section.get("ignore") or []), *unlisted]}
        return quantization_config({name: linear.spec for name, linear in linears.items()}, dense)
    if to == "awq":
        return awq_config(linears, _inside_blocks(dense) + _heads(dense))
    return gptq_config(linears, _inside_blocks(dense), _VERSIONS[to])


def _inside_blocks(names: Iterable[str]) -> list[str]:
    """Those a reader would take for quantized otherwise: GPTQ and AWQ readers look at numbered blocks only."""
    return [name for name in names if any(part.isdecimal() for part in name.split("."))]


def _heads(names: Iterable[str]) -> list[str]:
    return [name for name in names if name == "lm_head"]


def _tensors(
    checkpoint: Checkpoint,
    to: str,
    dtype: torch.dtype | None,
    layers: Iterable[PackedLinear],
    layout: DenseLayout,
) -> Iterator[tuple[str, Tensor]]:
    if to == "dense":
        for name, tensor in dense_tensors(checkpoint, layout, dtype or _dense_dtype(checkpoint), layers):
            yield name, tensor if dtype is None else tensor.to(dtype)  # merged experts' biases are not weights
    else:
        write = _WRITERS[to]
        for linear in layers:
            stored = checkpoint.stored_weight(linear.name)
            scales = _stored_scales(linear.name, stored.weight.scales, to, dtype)
            yield from write(linear.name, replace(stored, weight=replace(stored.weight, scales=scales))).items()
    for name in checkpoint.dense:
        if to == "dense" and is_merged(name, layout):
            continue
        tensor = checkpoint.tensor(name)
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


_WRITERS: dict[str, Callable[[str, StoredWeight], dict[str, Tensor]]] = {
    "compressed-tensors": lambda name, stored: linear_tensors(name, stored.weight, stored.input_scale),
    "gptq": lambda name, stored: gptq_tensors(name, stored, 1),
    "gptq-v2": lambda name, stored: gptq_tensors(name, stored, 2),
    "awq": awq_tensors,
}


def _dense_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype config.json names, or the one of the scales."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        named = config.get("dtype", config.get("torch_dtype"))
        if isinstance(named, str) and named in DTYPES:
            return DTYPES[named]
    return next(iter(checkpoint.linears.values())).scale_dtype


def _config(checkpoint: Checkpoint, section: Mapping[str, Any] | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json with another ``quantization_config``, and another dtype where one was asked for."""

    def changed(config: Mapping[str, Any]) -> dict[str, Any]:
        fields = {key: value for key, value in config.items() if key != "quantization_config"}
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in fields:
                fields[key] = dtype_name(dtype)
        return fields

    config = changed(checkpoint.config)
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = changed(config["text_config"])
    return config if section is None else {**config, "quantization_config": dict(section)}


def _notes(checkpoint: Checkpoint, to: str) -> tuple[str, ...]:
    notes = []
    linears = checkpoint.linears.values()
    if to == "awq" and any(linear.spec.symmetric for linear in linears):
        notes.append("awq has no symmetric form: zero points of 8 are written, the weights are the same")
    if to in _VERSIONS and not all(linear.spec.symmetric for linear in linears):
        notes.append("vLLM reads symmetric gptq only")
    if to == "dense" and any(linear.spec.activations is not None for linear in linears):
        notes.append("activations are no longer quantized: the outputs are not quite the source's")
    if to == "dense":
        notes.append("the weights are expanded and rounded once; nothing is packed any more")
    return tuple(notes)

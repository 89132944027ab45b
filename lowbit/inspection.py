"""What a checkpoint folder holds: bits, bytes and, where lowbit.json has them, errors per layer. Reads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint import (
    Checkpoint,
    PackedLinear,
    TensorInfo,
    quantization_section,
    read_checkpoint,
    read_config,
    read_tensor_infos,
)
from .dtypes import dtype_name
from .modes import own_modes

__all__ = ["Inspection", "LayerInfo", "SpecInfo", "inspect_checkpoint"]


@dataclass(frozen=True)
class SpecInfo:
    """All layers of one spec: its label (``w4g128sym``), their number, weights, bytes and bits per weight on disk.

    Bytes and bits count codes, scales, zero points and shapes.
    """

    spec: str
    layers: int
    weights: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class LayerInfo:
    """One packed layer; method and losses are None where lowbit.json does not have them.

    ``spec`` is the spec's label, with ``+order`` where the columns are reordered (GPTQ's act-order).
    """

    name: str
    shape: tuple[int, int]
    spec: str
    bytes: int
    bits_per_weight: float
    method: str | None
    loss: float | None
    rtn_loss: float | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_checkpoint` found.

    Attributes:
        path: the folder.
        packed: False for an unquantized model; then there are no specs and layers.
        format: compressed-tensors, gptq, gptq-v2 or awq; None for an unquantized model.
        hashes_verified: every file agrees with lowbit.json; None where the folder has no lowbit.json.
        specs: one entry per spec, the one with most weights first.
        bits_per_weight: of all packed layers together, None when there are none.
        packed_bytes: of the packed layers, without biases.
        dense_bytes: of every other tensor.
        dense_dtypes: bytes of the other tensors by dtype.
        layers: the packed layers, layer 2 before layer 10.
        skipped: lowbit.json's list of linears left dense, each with its reason.
        record: the rest of lowbit.json (model, method, calibration ...), empty where there is none.
    """

    path: str
    packed: bool
    format: str | None
    hashes_verified: bool | None
    specs: tuple[SpecInfo, ...]
    bits_per_weight: float | None
    packed_bytes: int
    dense_bytes: int
    dense_dtypes: Mapping[str, int]
    layers: tuple[LayerInfo, ...]
    skipped: tuple[Mapping[str, Any], ...]
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict with the attributes above."""
        return asdict(self)

    def __str__(self) -> str:
        total = f"{_size(self.packed_bytes + self.dense_bytes)} of tensors"
        dense = ", ".join(f"{dtype} {_size(count)}" for dtype, count in self.dense_dtypes.items())
        if not self.packed:
            return f"{self.path}: dense, not quantized\n{total}: {dense}"
        hashes = {
            True: "every file agrees with lowbit.json",
            None: "no lowbit.json, so no hashes",
            False: "not checked",
        }
        lines = [
            f"{self.path}: {self.format}, {len(self.layers)} packed layers, "
            f"{self.bits_per_weight:.3f} bits per weight on disk",
            f"{total}: packed {_size(self.packed_bytes)}, dense {dense or '0 B'}",
            f"hashes: {hashes[self.hashes_verified]}",
        ]
        for key in ("model", "method"):
            if isinstance(self.record.get(key), str):
                lines.append(f"{key}: {self.record[key]}")
        lines += ["", *_table(("spec", "layers", "weights", "bits/weight", "size"), map(_spec_row, self.specs))]
        lines += ["", *_table(("layer", "shape", "spec", "method", "loss", "rtn loss"), map(_layer_row, self.layers))]
        if self.skipped:
            rows = ((str(item.get("name")), str(item.get("reason"))) for item in self.skipped)
            lines += ["", *_table(("left dense", "reason"), rows)]
        return "\n".join(lines)


@own_modes()
def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Describe a model folder, packed or dense; a packed one is checked as for loading, hashes included.

    Args:
        path: a folder, or a Hugging Face model id.

    Raises:
        FileNotFoundError: no such folder or model, or it has no config.json or weights.
        ValueError: the checkpoint is damaged, its hashes do not agree, or it is of a format lowbit does not read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from .hf import resolve  # only here: a local folder is described without importing transformers

        folder = resolve(path, trust_remote_code=True)  # its code is only compared with lowbit.json
    if quantization_section(folder, read_config(folder)) is None:
        tensors = read_tensor_infos(folder)
        return Inspection(str(folder), False, None, None, (), None, 0, _bytes(tensors), _dtypes(tensors), (), (), {})
    checkpoint = read_checkpoint(folder)
    record = dict(checkpoint.record or {})
    layers = _layers(checkpoint, record.pop("layers", None))
    packed_bytes = sum(layer.bytes for layer in layers)
    skipped = record.pop("skipped", None)
    return Inspection(
        path=str(folder),
        packed=True,
        format=checkpoint.format.label,
        hashes_verified=None if checkpoint.record is None else checkpoint.hashes_verified,
        specs=_specs(checkpoint.linears.values()),
        bits_per_weight=8 * packed_bytes / sum(layer.shape[0] * layer.shape[1] for layer in layers),
        packed_bytes=packed_bytes,
        dense_bytes=_bytes(checkpoint.dense),
        dense_dtypes=_dtypes(checkpoint.dense),
        layers=layers,
        skipped=tuple(item for item in skipped if isinstance(item, Mapping)) if isinstance(skipped, list) else (),
        record=record,
    )


def _layers(checkpoint: Checkpoint, records: object) -> tuple[LayerInfo, ...]:
    known = {item.get("name"): item for item in records if isinstance(item, dict)} if isinstance(records, list) else {}
    layers = []
    for linear in checkpoint.linears.values():
        record: Mapping[str, Any] = known.get(linear.name, {})
        bits = 8 * linear.nbytes / (linear.shape[0] * linear.shape[1])
        loss, rtn_loss, method = record.get("loss"), record.get("rtn_loss"), record.get("method")
        label = linear.spec.label() + ("+order" if linear.reordered else "")
        layers.append(LayerInfo(linear.name, linear.shape, label, linear.nbytes, bits, method, loss, rtn_loss))
    return tuple(layers)


def _specs(linears: Iterable[PackedLinear]) -> tuple[SpecInfo, ...]:
    groups: dict[str, list[PackedLinear]] = {}
    for linear in linears:
        groups.setdefault(linear.spec.label(), []).append(linear)
    infos = []
    for label, members in groups.items():
        weights = sum(linear.shape[0] * linear.shape[1] for linear in members)
        size = sum(linear.nbytes for linear in members)
        infos.append(SpecInfo(label, len(members), weights, size, 8 * size / weights))
    return tuple(sorted(infos, key=lambda info: -info.weights))


def _bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors.values())


def _dtypes(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for info in tensors.values():
        name = dtype_name(info.dtype)
        sizes[name] = sizes.get(name, 0) + info.nbytes
    return sizes


def _spec_row(info: SpecInfo) -> tuple[str, ...]:
    return info.spec, str(info.layers), f"{info.weights:,}", f"{info.bits_per_weight:.3f}", _size(info.bytes)


def _layer_row(layer: LayerInfo) -> tuple[str, ...]:
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return layer.name, shape, layer.spec, layer.method or "-", _loss(layer.loss), _loss(layer.rtn_loss)


def _loss(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, with a rule under the head."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]

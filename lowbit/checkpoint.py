"""Checkpoint folders: reading and checking one before any module is built. Writing is in ``writer.py``.

A folder is a normal Hugging Face model folder whose linears are quantized in one of the formats of ``formats/``; ours
is ``pack_quantized.py``'s. Nothing is taken on trust: :func:`read_checkpoint` compares config.json, the index, the
shards' headers, the small tensors (shapes, scales, zero points, column orders, padding) and, where ``lowbit.json``
exists, every file's sha256.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .affine import QuantizedWeight
from .foreign_config import quantization_section
from .formats import parse_section
from .formats.base import (
    LayerTensors,
    PackedLinear,
    SourceFormat,
    StoredWeight,
    disk_tensor,
    disk_tensors,
    read_weight,
)
from .formats.compressed import CompressedFormat
from .headers import check_experts
from .manifest import MANIFEST, read_manifest, verify_files
from .pack_config import PackedFormat, parse_quantization_config, quantization_config
from .pack_quantized import linear_tensors
from .shards import LazyTensor, ShardReader, TensorInfo, open_shard, read_config, read_tensor_infos
from .writer import CheckpointWriter, check_output

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "PackedFormat",
    "PackedLinear",
    "StoredWeight",
    "TensorInfo",
    "check_output",
    "linear_tensors",
    "parse_quantization_config",
    "quantization_config",
    "quantization_section",
    "read_checkpoint",
    "read_config",
    "read_tensor_infos",
]


@dataclass(frozen=True)
class Checkpoint:
    """A packed folder that passed every check.

    Attributes:
        path: the folder.
        config: config.json.
        format: its ``quantization_config``, read.
        linears: packed layers by name, layer 2 before layer 10.
        dense: every other tensor by name.
        record: lowbit.json without the table of files, or None where there is no lowbit.json.
        hashes_verified: whether every file was compared with its sha256.
    """

    path: Path
    config: Mapping[str, Any]
    format: SourceFormat
    linears: Mapping[str, PackedLinear]
    dense: Mapping[str, TensorInfo]
    record: Mapping[str, Any] | None
    hashes_verified: bool
    _parts: Mapping[str, Mapping[str, TensorInfo]]

    @property
    def in_lowbit_layout(self) -> bool:
        """Whether the files hold the tensors of QuantLinear as they are, so that they can be loaded by name."""
        return isinstance(self.format, CompressedFormat)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its shard."""
        info = self.dense.get(name)
        if info is None:
            layer, _, part = name.rpartition(".")
            info = self._parts[layer][part]
        return _read(self.path, name, info)

    def stored_weight(self, name: str) -> StoredWeight:
        """One packed layer, unpacked: codes ``(N, K)``, scales and zeros ``(N, G)``, and the order of its columns."""
        return read_weight(self.format, self._layer(name), self.linears[name])

    def scales(self, name: str) -> Tensor:
        """Scales ``(N, G)`` of one packed layer."""
        return self.format.scales(self._layer(name), self.linears[name])

    def zeros(self, name: str) -> Tensor | None:
        """Zero points ``(N, G)`` uint8 of one packed layer, None when it is symmetric."""
        linear = self.linears[name]
        return None if linear.spec.symmetric else self.format.zeros(self._layer(name), linear)

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """:meth:`stored_weight` of a layer whose columns are in order.

        Raises:
            ValueError: they are not (GPTQ's act-order).
        """
        stored = self.stored_weight(name)
        if stored.order is not None:
            raise ValueError(f"{name} has reordered columns; stored_weight() gives their order too")
        return stored.weight

    def lowbit_tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the model, packed layers in QuantLinear's layout (a layer that is reordered has a
        ``column_order`` too). Nothing is read or converted before it is asked for; each by itself."""
        stored = dict(self.dense)
        if self.in_lowbit_layout:
            stored |= {f"{name}.{part}": info for name, infos in self._parts.items() for part, info in infos.items()}
        tensors = {name: LazyTensor(info.dtype, info.shape, _reading(self.path, name, info))
                   for name, info in stored.items()}  # fmt: skip
        for name, linear in () if self.in_lowbit_layout else self.linears.items():
            layer = self._layer(name)
            for part, (dtype, shape) in disk_tensors(linear).items():
                tensors[f"{name}.{part}"] = LazyTensor(dtype, shape, _converting(self.format, layer, linear, part))
        return tensors

    def lowbit_section(self) -> dict[str, Any]:
        """``quantization_config`` for :meth:`lowbit_tensors`: the folder's own, or one of compressed-tensors."""
        if self.in_lowbit_layout:
            return copy.deepcopy(dict(quantization_section(self.path, self.config) or {}))
        specs = {name: linear.spec for name, linear in self.linears.items()}
        return quantization_config(specs, self.dense_linears())

    def dense_linears(self) -> list[str]:
        """Layers left dense, as far as the files tell: every matrix called ``weight``, embeddings among them.

        lm_head is always one of them unless it is packed: where it is tied to the embeddings it has no tensor.
        """
        names = [name.removesuffix(".weight") for name, info in self.dense.items()
                 if name.endswith(".weight") and len(info.shape) == 2]  # fmt: skip
        return list(dict.fromkeys([*names, *([] if "lm_head" in self.linears else ["lm_head"])]))

    def _layer(self, name: str) -> LayerTensors:
        infos = self._parts[name]
        return LayerTensors(name, infos, lambda part: _read(self.path, f"{name}.{part}", infos[part]))


def _read(folder: Path, name: str, info: TensorInfo) -> Tensor:
    with open_shard(folder / info.shard) as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor


def _reading(folder: Path, name: str, info: TensorInfo) -> Any:
    return lambda: _read(folder, name, info)


def _converting(form: SourceFormat, layer: LayerTensors, linear: PackedLinear, part: str) -> Any:
    return lambda: disk_tensor(form, layer, linear, part)


def read_checkpoint(path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Checkpoint:
    """Check a packed folder and describe it. Reads headers, scales and zero points; weights only to hash them.

    Args:
        path: a folder with config.json and safetensors.
        verify_hashes: compare every file with lowbit.json, where the folder has one.

    Raises:
        FileNotFoundError: no such folder, no config.json, or no weights in it.
        ValueError: not a checkpoint lowbit reads, or a damaged one; names the file, layer or field and what was found.
    """
    folder = Path(path)
    config = read_config(folder)
    section = quantization_section(folder, config)
    if section is None:
        raise ValueError(f"{folder} is not quantized: its config.json has no quantization_config")
    form = parse_section(section)
    manifest = read_manifest(folder)
    if manifest is not None and verify_hashes:
        verify_files(folder, manifest)
    tensors = read_tensor_infos(folder)
    if manifest is not None:
        used = {"config.json", *(info.shard for info in tensors.values())}
        unlisted = sorted(used - set(manifest["files"]))
        if unlisted:
            raise ValueError(f"{folder}: {MANIFEST} does not list {unlisted}, so they are not from the same checkpoint")
    check_experts(folder, config, tensors)
    parts, dense = _sort_tensors(folder, tensors, form)
    with ShardReader(folder) as reader:
        linears = {
            name: form.check(LayerTensors(name, parts[name], _views(reader, name, parts[name])))
            for name in sorted(parts, key=_natural)
        }
    _check_targets(folder, form, linears, dense)
    record = None if manifest is None else {key: value for key, value in manifest.items() if key != "files"}
    return Checkpoint(folder, config, form, linears, dense, record, manifest is not None and verify_hashes, parts)


def _views(reader: ShardReader, name: str, infos: Mapping[str, TensorInfo]) -> Any:
    return lambda part: reader.view(f"{name}.{part}", infos[part])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _sort_tensors(
    folder: Path, tensors: Mapping[str, TensorInfo], form: SourceFormat
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Packed layers as ``{layer: {part: info}}``, and the dense tensors."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    dense: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in form.parts:
            parts.setdefault(layer, {})[part] = info
        else:
            dense[name] = info
    if not parts:
        raise ValueError(f"{folder}: config.json says {form.label}, but no tensor is packed that way")
    for layer, found in parts.items():
        required = form.required(layer)
        if "weight" in required and f"{layer}.weight" in dense:
            found["weight"] = dense.pop(f"{layer}.weight")
        missing = [part for part in required if part not in found]
        if missing:
            raise ValueError(f"{folder}: layer {layer} has {sorted(found)} but lacks {missing}")
        if f"{layer}.weight" in dense:
            raise ValueError(f"{folder}: packed layer {layer} must not have a tensor 'weight', but it does")
    return parts, dense


def _check_targets(
    folder: Path, form: SourceFormat, linears: Mapping[str, PackedLinear], dense: Mapping[str, TensorInfo]
) -> None:
    if not isinstance(form, CompressedFormat):
        return
    for target in form.config.named_targets():
        if target not in linears and ("." in target or f"{target}.weight" in dense):
            raise ValueError(f"{folder}: quantization_config targets {target}, which is not packed")

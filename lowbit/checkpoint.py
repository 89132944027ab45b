"""Checkpoint folders: reading and checking one before any module is built. Writing is in ``writer.py``.

A folder is a normal Hugging Face model folder whose linears are packed as ``pack_quantized.py`` describes. Nothing is
taken on trust: :func:`read_checkpoint` compares config.json, the index, the shards' headers, the small tensors (shapes,
scales, zero points, padding) and, where ``lowbit.json`` exists, every file's sha256.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .affine import QuantizedWeight
from .manifest import MANIFEST, load_json, parse_json_object, read_manifest, verify_files
from .pack_quantized import PackedFormat, linear_tensors, parse_quantization_config, quantization_config
from .packing import packed_width, unpack_codes
from .spec import QuantSpec
from .writer import INDEX, SINGLE_SHARD, CheckpointWriter, check_output

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "PackedFormat",
    "PackedLinear",
    "TensorInfo",
    "check_output",
    "linear_tensors",
    "parse_quantization_config",
    "quantization_config",
    "read_checkpoint",
    "read_tensor_infos",
]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_FOREIGN_PARTS = ("weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale")
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says about one tensor: dtype, shape, and the shard's file name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class PackedLinear:
    """One packed layer: its name in the checkpoint, weight shape ``(N, K)``, spec, dtype of the scales, bytes of its
    packed tensors (codes, scales, zeros and shape; not the bias)."""

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    scale_dtype: torch.dtype
    nbytes: int


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
    format: PackedFormat
    linears: Mapping[str, PackedLinear]
    dense: Mapping[str, TensorInfo]
    record: Mapping[str, Any] | None
    hashes_verified: bool
    _tensors: Mapping[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its shard."""
        with _open_shard(self.path / self._tensors[name].shard) as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """One packed layer, unpacked: codes ``(N, K)``, scales and zeros ``(N, G)``."""
        linear = self.linears[name]
        (n, k), bits = linear.shape, linear.spec.bits
        zeros = None
        if not linear.spec.symmetric:
            zeros = unpack_codes(self.tensor(f"{name}.weight_zero_point"), bits, n, dim=0)
        codes = unpack_codes(self.tensor(f"{name}.weight_packed"), bits, k)
        return QuantizedWeight(codes, self.tensor(f"{name}.weight_scale"), zeros, linear.spec)


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
    if config.get("quantization_config") is None:
        raise ValueError(f"{folder} is not quantized: its config.json has no quantization_config")
    packed_format = parse_quantization_config(config["quantization_config"])
    manifest = read_manifest(folder)
    if manifest is not None and verify_hashes:
        verify_files(folder, manifest)
    tensors = read_tensor_infos(folder)
    if manifest is not None:
        used = {"config.json", *(info.shard for info in tensors.values())}
        unlisted = sorted(used - set(manifest["files"]))
        if unlisted:
            raise ValueError(f"{folder}: {MANIFEST} does not list {unlisted}, so they are not from the same checkpoint")
    parts, dense = _sort_tensors(folder, tensors)
    with _ShardReader(folder) as reader:
        linears = {
            name: _check_linear(name, parts[name], packed_format.spec_for(name), reader)
            for name in sorted(parts, key=_natural)
        }
    for target in packed_format.named_targets():
        if target not in linears and ("." in target or f"{target}.weight" in dense):
            raise ValueError(f"{folder}: quantization_config targets {target}, which is not packed")
    record = None if manifest is None else {key: value for key, value in manifest.items() if key != "files"}
    return Checkpoint(
        folder, config, packed_format, linears, dense, record, manifest is not None and verify_hashes, tensors
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: it is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such model folder: {folder}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model folder")
    return load_json(folder / "config.json")


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Name, dtype, shape and shard of every tensor of a model folder, from the shards' headers.

    Raises:
        FileNotFoundError: neither model.safetensors nor an index, or a shard of the index is missing.
        ValueError: a shard is truncated or not safetensors, or index and shards disagree.
    """
    index_path, single = folder / INDEX, folder / SINGLE_SHARD
    if index_path.is_file() and single.is_file():
        raise ValueError(f"{folder} has both {SINGLE_SHARD} and {INDEX}; which one holds the weights is unclear")
    if single.is_file():
        return _shard_infos(folder, SINGLE_SHARD)
    if not index_path.is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE_SHARD} nor {INDEX}")
    weight_map = load_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map must be a table of tensor names and shard names")
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index_path} names the shard {shard!r}, which is not a file name in the folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder}: the shard {shard} named by {INDEX} is missing")
        infos.update(_shard_infos(folder, shard))
    wrong = sorted(name for name in infos.keys() | weight_map.keys()
                   if name not in infos or weight_map.get(name) != infos[name].shard)  # fmt: skip
    if wrong:
        raise ValueError(f"{index_path} and the shards disagree about the tensors {wrong[:5]}")
    return infos


def _shard_infos(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = folder / shard
    _check_header(path)
    infos = {}
    with _open_shard(path) as file:
        for name in file.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
            view = file.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise ValueError(f"{path}: tensor {name} has the dtype {view.get_dtype()}, which lowbit does not read")
            infos[name] = TensorInfo(dtype, tuple(view.get_shape()), shard)
    return infos


def _check_header(path: Path) -> None:
    """Refuse a header that names a tensor twice: safetensors takes the last one without a word."""
    with path.open("rb") as file:
        size_bytes = file.read(8)
        size = struct.unpack("<Q", size_bytes)[0] if len(size_bytes) == 8 else 0
        header = file.read(size) if 0 < size <= _MAX_HEADER else b""
    try:
        parse_json_object(header)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt or truncated: its safetensors header is not readable: {error}") from None


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


class _ShardReader:
    """Keeps the shards it has opened, so that reading many small tensors opens each file once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def view(self, name: str, info: TensorInfo) -> Any:
        """A lazily read tensor; indexing it reads that part."""
        if info.shard not in self._open:
            self._open[info.shard] = self._stack.enter_context(_open_shard(self._folder / info.shard))
        return self._open[info.shard].get_slice(name)


def _sort_tensors(
    folder: Path, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Packed layers as ``{layer: {part: info}}``, and the dense tensors."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    dense: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in _PARTS:
            parts.setdefault(layer, {})[part] = info
        else:
            dense[name] = info
    if not parts:
        raise ValueError(f"{folder}: config.json says pack-quantized, but no tensor is packed")
    for layer, found in parts.items():
        missing = [part for part in _PARTS[:3] if part not in found]
        if missing:
            raise ValueError(f"{folder}: layer {layer} has {sorted(found)} but lacks {missing}")
        for part in ("weight", *_FOREIGN_PARTS):
            if f"{layer}.{part}" in dense:
                raise ValueError(f"{folder}: packed layer {layer} must not have a tensor {part!r}, but it does")
    return parts, dense


def _check_linear(name: str, parts: Mapping[str, TensorInfo], spec: QuantSpec, reader: _ShardReader) -> PackedLinear:
    """Compare the tensors of one layer with each other and with its spec."""
    _expect(name, "weight_shape", parts["weight_shape"], (torch.int64,), (2,))
    n, k = reader.view(f"{name}.weight_shape", parts["weight_shape"])[:].tolist()
    if n <= 0 or k <= 0:
        raise ValueError(f"{name}.weight_shape must be two positive sizes, got {[n, k]}")
    groups = spec.num_groups(k, name)
    _expect(name, "weight_packed", parts["weight_packed"], (torch.int32,), (n, packed_width(k, spec.bits)))
    _expect(name, "weight_scale", parts["weight_scale"], _SCALE_DTYPES, (n, groups))
    if ("weight_zero_point" in parts) == spec.symmetric:
        have = "has" if spec.symmetric else "has no"
        raise ValueError(f"{name} {have} weight_zero_point, but its config_group says symmetric: {spec.symmetric}")
    scales = reader.view(f"{name}.weight_scale", parts["weight_scale"])[:]
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"{name}.weight_scale must be finite and positive, got {_first_bad(scales)}")
    _check_padding(
        name, "weight_packed", k * spec.bits, reader.view(f"{name}.weight_packed", parts["weight_packed"]), 1
    )
    if not spec.symmetric:
        zero = parts["weight_zero_point"]
        _expect(name, "weight_zero_point", zero, (torch.int32,), (packed_width(n, spec.bits), groups))
        _check_padding(name, "weight_zero_point", n * spec.bits, reader.view(f"{name}.weight_zero_point", zero), 0)
    return PackedLinear(name, (n, k), spec, parts["weight_scale"].dtype, sum(info.nbytes for info in parts.values()))


def _expect(name: str, part: str, info: TensorInfo, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}.{part} must be {allowed} {shape}, got {info.dtype} {info.shape}")


def _first_bad(scales: Tensor) -> str:
    row, group = (~(torch.isfinite(scales) & (scales > 0))).nonzero()[0].tolist()
    return f"{float(scales[row, group])} at row {row}, group {group}"


def _check_padding(name: str, part: str, bits: int, view: Any, dim: int) -> None:
    """Bits after the last code of a packed row (``dim`` 1) or column (``dim`` 0) are zero in every file."""
    used = bits % 32
    if used:
        last = view[:, -1:] if dim == 1 else view[-1:, :]
        if bool(((last.to(torch.int64) & 0xFFFFFFFF) >> used).any()):
            raise ValueError(f"{name}.{part} has bits set after its last code, so it was not packed as its config says")

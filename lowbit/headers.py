"""config.json and the safetensors headers of a model folder, read without torch and without any tensor's data.

A safetensors file is ``N (u64, little end first), N bytes of JSON, data``; the JSON names every tensor with its dtype,
shape and place. Source: safetensors 0.8 ``tensor.rs``.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .manifest import load_json, parse_json_object

__all__ = [
    "INDEX",
    "SINGLE_SHARD",
    "Header",
    "check_experts",
    "read_config",
    "read_header",
    "read_headers",
    "read_indexed",
]

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16,
    "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)\.\w+")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class InShard(Protocol):
    """Something that is in a shard, by its file name."""

    @property
    def shard(self) -> str:
        """File name of the shard, in the checkpoint's folder."""


T = TypeVar("T", bound=InShard)


@dataclass(frozen=True)
class Header:
    """What a shard says about one tensor: dtype as safetensors spells it (``BF16``), shape, bytes, file name."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: str


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


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a model folder. Reads the index and each shard's header, whatever the shards' size.

    Raises:
        FileNotFoundError: neither model.safetensors nor an index, or a shard of the index is missing.
        ValueError: a shard is truncated or not safetensors, or index and shards disagree.
    """
    return read_indexed(folder, _shard_headers)


def read_indexed(folder: Path, read_shard: Callable[[Path, str], Mapping[str, T]]) -> dict[str, T]:
    """What ``read_shard(folder, file name)`` finds in every shard of a folder, compared with the index.

    Raises:
        FileNotFoundError: neither model.safetensors nor an index, or a shard of the index is missing.
        ValueError: index and shards disagree.
    """
    index_path, single = folder / INDEX, folder / SINGLE_SHARD
    if index_path.is_file() and single.is_file():
        raise ValueError(f"{folder} has both {SINGLE_SHARD} and {INDEX}; which one holds the weights is unclear")
    if single.is_file():
        return dict(read_shard(folder, SINGLE_SHARD))
    if not index_path.is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*") if path.suffix in (".bin", ".json"))
        also = f"; lowbit reads no pickled weights ({pickled[0]}), save them as safetensors first" if pickled else ""
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE_SHARD} nor {INDEX}{also}")
    weight_map = load_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map must be a table of tensor names and shard names")
    found: dict[str, T] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index_path} names the shard {shard!r}, which is not a file name in the folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder}: the shard {shard} named by {INDEX} is missing")
        found.update(read_shard(folder, shard))
    wrong = sorted(name for name in found.keys() | weight_map.keys()
                   if name not in found or weight_map.get(name) != found[name].shard)  # fmt: skip
    if wrong:
        raise ValueError(f"{index_path} and the shards disagree about the tensors {wrong[:5]}")
    return found


def check_experts(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare the experts of a mixture with each other and with the number config.json has, by their tensors' names.

    Raises:
        ValueError: an expert is missing, or lacks a projection that others of its block have; names it.
    """
    found: dict[str, dict[str, set[int]]] = {}
    for name in names:
        match = _EXPERT.match(name)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    text = config.get("text_config")
    described = {**(text if isinstance(text, Mapping) else {}), **config}
    counts = {described[key] for key in _EXPERT_COUNTS if type(described.get(key)) is int}
    for block, parts in found.items():
        present = set.union(*parts.values())
        count = counts.copy().pop() if len(counts) == 1 else max(present) + 1
        for part, experts in parts.items():
            missing = sorted(set(range(count)) - experts)
            if missing:
                lacks = f"{part} of {missing[:5]} is missing"
                raise ValueError(f"{folder}: {block} must hold experts 0 to {count - 1}, but {lacks}")


def read_header(path: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file. A tensor named twice is an error, which safetensors lets pass.

    Raises:
        ValueError: truncated, too large or not JSON; names the file.
    """
    with path.open("rb", buffering=0) as file:
        size_bytes = file.read(8)
        size = struct.unpack("<Q", size_bytes)[0] if len(size_bytes) == 8 else 0
        header = file.read(size) if 0 < size <= _MAX_HEADER else b""
    try:
        return parse_json_object(header)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt or truncated: its safetensors header is not readable: {error}") from None


def _shard_headers(folder: Path, shard: str) -> dict[str, Header]:
    path = folder / shard
    fields = read_header(path)
    fields.pop("__metadata__", None)
    headers, spans = {}, []
    for name, entry in fields.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if dtype in _BITS and (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{path} is corrupt: tensor {name} is {dtype} {shape}, but has {end - begin} bytes")
        headers[name] = Header(dtype, shape, end - begin, shard)
        spans.append((begin, end))
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise ValueError(f"{path} is corrupt: its tensors overlap or leave a gap at byte {min(begin, place)}")
        place = end
    with path.open("rb", buffering=0) as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
    if path.stat().st_size != start + place:
        raise ValueError(
            f"{path} is corrupt or truncated: its header says {start + place} bytes, the file has {path.stat().st_size}"
        )
    return headers


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's entry: dtype, shape, first byte, byte after the last."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if isinstance(dtype, str) and isinstance(shape, list) and isinstance(place, list) and len(place) == 2:
        numbers = (*shape, *place)
        if all(type(number) is int and number >= 0 for number in numbers):
            return dtype, tuple(shape), place[0], place[1]
    raise ValueError(f"{path} is corrupt: the header's entry of tensor {name} is not one: {entry!r}")

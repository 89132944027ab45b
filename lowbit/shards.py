"""The safetensors files of a model folder: which tensors there are, checked headers, and reading one tensor.

Nothing here knows what a tensor means.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .manifest import load_json, parse_json_object
from .writer import INDEX, SINGLE_SHARD

__all__ = ["LazyTensor", "ShardReader", "TensorInfo", "open_shard", "read_config", "read_tensor_infos"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
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
    with open_shard(path) as file:
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
def open_shard(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading; damage is a ValueError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from None


class ShardReader:
    """Keeps the shards it has opened, so that reading many small tensors opens each file once; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def view(self, name: str, info: TensorInfo) -> Any:
        """A lazily read tensor; indexing it reads that part."""
        if info.shard not in self._open:
            self._open[info.shard] = self._stack.enter_context(open_shard(self._folder / info.shard))
        return self._open[info.shard].get_slice(name)


class LazyTensor:
    """A tensor that is made when it is indexed; has the methods of a safetensors slice, which loaders rely on.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        make: reads or computes it; called at each indexing.

    Raises:
        ValueError: from indexing, when ``make`` gives another dtype or shape.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.dtype, self.shape, self._make = dtype, tuple(shape), make

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._make()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise ValueError(f"expected {self.dtype} {self.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        return tensor[index]

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, such as ``BF16``."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """As of a torch tensor."""
        return self.dtype.is_floating_point

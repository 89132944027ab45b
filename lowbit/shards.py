"""The safetensors files of a model folder: which tensors there are, checked headers, and reading one tensor.

Nothing here knows what a tensor means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .headers import read_config, read_header, read_indexed

__all__ = ["LazyTensor", "ShardReader", "TensorInfo", "open_shard", "read_config", "read_tensor_infos"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says about one tensor: dtype, shape, and the shard's file name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Name, dtype, shape and shard of every tensor of a model folder, from the shards' headers.

    Raises:
        FileNotFoundError: neither model.safetensors nor an index, or a shard of the index is missing.
        ValueError: a shard is truncated or not safetensors, or index and shards disagree.
    """
    return read_indexed(folder, _shard_infos)


def _shard_infos(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = folder / shard
    read_header(path)  # safetensors takes the last of two tensors of one name without a word
    infos = {}
    with open_shard(path) as file:
        for name in file.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
            view = file.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise ValueError(f"{path}: tensor {name} has the dtype {view.get_dtype()}, which lowbit does not read")
            infos[name] = TensorInfo(dtype, tuple(view.get_shape()), shard)
    return infos


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

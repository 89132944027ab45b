"""Reading tensors of safetensors files without mapping the files into memory, some rows at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..headers import read_header

__all__ = ["PlainReader", "StoredTensor"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I8": torch.int8}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; ``stored[a:b]`` reads those entries of its first dimension and nothing else."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        """A new tensor on the CPU. Steps other than 1 are an error."""
        first, end, step = rows.indices(self.shape[0])
        assert step == 1
        shape = (max(0, end - first), *self.shape[1:])
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray(shape[0] * row_bytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin + first * row_bytes)
            done = file.readinto(data)
            while 0 < done < len(data):  # one call reads 2 GB at most
                more = file.readinto(memoryview(data)[done:])
                done = done + more if more else 0
        if done != len(data):
            raise OSError(f"{self.path} is shorter than its header says; it changed while it was read")
        return torch.frombuffer(data, dtype=self.dtype).view(shape)


class PlainReader:
    """Reads tensors of safetensors files with plain reads.

    A page of a mapped file that was touched counts as memory of the process until the whole file is unmapped, and
    safetensors, when it does not map, reads a whole tensor for every slice of it.

    Args:
        files: their paths; None, or files of another kind, hold nothing.

    Raises:
        ValueError: a file whose header is not readable.
    """

    def __init__(self, files: Iterable[str] | None) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in (Path(file) for file in files or () if file.endswith(".safetensors")):
            header = read_header(path)
            with path.open("rb", buffering=0) as file:
                start = 8 + int(struct.unpack("<Q", file.read(8))[0])
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] in _DTYPES and entry["shape"]:
                    begin, dtype, shape = start + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"]
                    self._tensors[name] = StoredTensor(path, begin, dtype, tuple(shape))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

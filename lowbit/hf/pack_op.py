"""What happens to one dense tensor of a checkpoint while a model is quantized on the fly.

transformers hands a tensor over as soon as it is read. Here its matrices are searched for their grids and packed a few
rows at a time, read from the file in pieces where that can be; the dense model never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from ..affine import dequantize
from ..calib.rtn import rtn_quantize
from ..experts import Experts
from ..heap import return_free_memory
from ..pack_quantized import linear_tensors
from ..report import LayerRecord
from ..spec import QuantSpec
from .plain_reader import PlainReader, StoredTensor

__all__ = ["Matrix", "PackOp", "Slot", "expert_slots", "linear_slot", "pack"]

_ROWS_AT_A_TIME = 2**17
"""Weights whose grid is searched for at once: temporaries of a few MB."""

_WORD_ROWS = 16
"""Rows are cut at multiples of this, so that packed zero points (at most 16 to a word) are not cut within a word."""


@dataclass(frozen=True)
class Matrix:
    """A weight ``(N, K)`` somewhere in a stored tensor, or a bias ``(N,)``.

    Attributes:
        name: of the parameter it becomes, ``....weight`` or ``....bias``.
        shape: as above.
        expert: index into the stored tensor's first dimension, None for a tensor that has no such dimension.
        transposed: stored as (K, N).
        rows: of the stored ones, which; all when None.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    rows: slice | None = None

    def reader(self, source: Tensor | StoredTensor) -> Callable[[int, int], Tensor]:
        """Reads rows a..b from ``source``, a tensor or one in a file."""
        if self.expert is None and not self.transposed and self.rows is None:
            return lambda a, b: source[a:b]
        stored: Tensor = source[:] if self.expert is None else source[self.expert : self.expert + 1][0]
        stored = stored.t() if self.transposed else stored
        stored = stored if self.rows is None else stored[self.rows]
        return lambda a, b: stored[a:b]


@dataclass(frozen=True)
class Slot:
    """A tensor a checkpoint may hold: its shape there, and the matrices in it."""

    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...]


def linear_slot(name: str, n: int, k: int, *, transposed: bool) -> Slot:
    """The weight of a linear of its own; ``transposed`` is GPT-2's Conv1D."""
    matrix = Matrix(f"{name}.weight", (n, k), transposed=transposed)
    return Slot((k, n) if transposed else (n, k), (matrix,))


def expert_slots(name: str, experts: Experts) -> dict[str, Slot]:
    """The merged tensors that a checkpoint may hold for experts which are linears of their own here, by name."""
    merged: Any = experts._merged[0]
    first: Any = experts[0]
    parts = {"gate_up_proj": ("gate_proj", "up_proj")} if merged.has_gate else {"up_proj": ("up_proj",)}
    slots: dict[str, Slot] = {}
    for stored, linears in {**parts, "down_proj": ("down_proj",)}.items():
        layer = getattr(first, linears[0])
        n, k, halves = layer.out_features, layer.in_features, len(linears)
        weights, biases = [], []
        for e in range(len(experts)):
            for i, linear in enumerate(linears):
                rows = None
                if halves == 2:
                    rows = slice(i * n, (i + 1) * n) if merged.is_concatenated else slice(i, None, 2)
                at = f"{name}.{e}.{linear}"
                weights.append(Matrix(f"{at}.weight", (n, k), e, merged.is_transposed, rows))
                biases.append(Matrix(f"{at}.bias", (n,), e, False, rows))
        shape = (k, halves * n) if merged.is_transposed else (halves * n, k)
        slots[f"{name}.{stored}"] = Slot((len(experts), *shape), tuple(weights))
        if merged.has_bias:
            slots[f"{name}.{stored}_bias"] = Slot((len(experts), halves * n), tuple(biases))
    return slots


def pack(
    read: Callable[[int, int], Tensor], n: int, k: int, spec: QuantSpec, scale_dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Quantize ``(N, K)`` by round to nearest on the best grid, some rows at a time.

    Args:
        read: rows a..b of the weight, floating point.
        n, k: the shape.
        spec: the grid.
        scale_dtype: of the scales.
        device: to work on and to put the result.

    Returns:
        the tensors of the layer's module, without prefix, and ``|Q - W|^2 / |W|^2``.

    Raises:
        ValueError: a weight that is not finite.
    """
    step = max(_WORD_ROWS, _ROWS_AT_A_TIME // k // _WORD_ROWS * _WORD_ROWS)
    pieces: list[dict[str, Tensor]] = []
    error = total = 0.0
    for a in range(0, n, step):
        dense = read(a, min(a + step, n)).to(device=device, dtype=torch.float32)
        if not bool(torch.isfinite(dense).all()):
            raise ValueError("its weight contains NaN or infinite values")
        qw = rtn_quantize(dense, spec, scale_dtype=scale_dtype)
        error += float((dequantize(qw) - dense).square().sum())
        total += float(dense.square().sum())
        pieces.append(linear_tensors("", qw))
    parts = {
        part.removeprefix("."): torch.cat([piece[part] for piece in pieces])
        for part in pieces[0]
        if part != ".weight_shape"
    }
    if ".weight_shape" in pieces[0]:
        parts["weight_shape"] = torch.tensor([n, k], dtype=torch.int64, device=device)
    return parts, error / max(total, 1e-30)


class PackOp(ConversionOps):
    """Dense tensors in, packed ones out.

    A problem is kept for later: transformers would make a log message of an exception.

    Args:
        slots: by the name of the parameter that a stored tensor would be loaded into.
        spec: the grid.
        scale_dtypes: of each linear's scales.
        reader: of the checkpoint's files, see :class:`~lowbit.hf.plain_reader.PlainReader`.

    Attributes:
        records: one for each weight that was packed.
        problems: why others were not.
        placeholders: names of parameters that only give a stored tensor a place to go; removed when it has come.
    """

    def __init__(
        self, slots: dict[str, Slot], spec: QuantSpec, scale_dtypes: dict[str, torch.dtype], reader: PlainReader
    ) -> None:
        self.slots, self.spec, self.scale_dtypes, self.reader = slots, spec, scale_dtypes, reader
        self.records: dict[str, LayerRecord] = {}
        self.filled: set[str] = set()
        self.problems: list[str] = []
        self.placeholders: set[str] = set()

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """See ConversionOps. ``input_dict`` holds one tensor, or what the model's own conversions made of some."""
        out: dict[str, Any] = {}
        key = source_patterns[0] if len(input_dict) == 1 and len(source_patterns) == 1 else ""
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            slot = self.slots.get(name)
            if slot is None:
                out[name] = tensors
                continue
            if missing_keys is not None:
                missing_keys.discard(name)
            if name in self.placeholders:
                self.placeholders.discard(name)
                owner, _dot, part = name.rpartition(".")
                delattr(model.get_submodule(owner), part)  # now: accelerate, which comes next, would look for its value
            if tuple(tensor.shape) != slot.shape:
                self.problems.append(
                    f"{name} must have the shape {slot.shape}, the checkpoint's is {tuple(tensor.shape)}"
                )
                continue
            for target, value in self._fill(slot, self._source(tensor, key), tensor.device):
                out[target] = value
        return_free_memory()
        return out

    def _source(self, tensor: Tensor, key: str) -> Tensor | StoredTensor:
        """What to read from: the file, where ``tensor`` is no more than what it maps from there, else ``tensor``."""
        if tensor.device.type == "cpu" and key in self.reader:
            stored = self.reader[key]
            if stored.shape == tuple(tensor.shape):
                return stored
        return tensor

    def _fill(self, slot: Slot, source: Tensor | StoredTensor, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        for matrix in slot.matrices:
            name, _, part = matrix.name.rpartition(".")
            if matrix.name in self.filled:
                self.problems.append(f"the checkpoint has two tensors for {matrix.name}")
                continue
            self.filled.add(matrix.name)
            read = matrix.reader(source)
            if part == "bias":
                yield matrix.name, read(0, matrix.shape[0]).to(self.scale_dtypes[name], copy=True)
                continue
            n, k = matrix.shape
            try:
                parts, loss = pack(read, n, k, self.spec, self.scale_dtypes[name], device)
            except ValueError as error:
                self.problems.append(f"{name}: {error}")
                continue
            self.records[name] = LayerRecord(name, (n, k), self.spec, "rtn", loss, loss, "weights")
            yield from ((f"{name}.{stored}", value) for stored, value in parts.items())

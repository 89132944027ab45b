"""The dense checkpoint of a packed one: weights expanded and laid out as the architecture's own files have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .affine import dequantize
from .checkpoint import Checkpoint, PackedLinear, StoredWeight

__all__ = ["DenseLayout", "MergedExperts", "check_experts", "dense_tensors", "expand", "is_merged"]

_EXPERT = re.compile(r"(.*)\.(\d+)\.(gate_proj|up_proj|down_proj)$")
_ANY_EXPERT = re.compile(r".*\bexperts\.\d+\.")


@dataclass(frozen=True)
class MergedExperts:
    """How a module's 3-D parameters hold its experts: the flags that transformers leaves on it.

    ``gate_up_proj`` (``up_proj`` when not ``gated``) is ``(count, 2I, H)`` and ``down_proj`` ``(count, H, I)``; each
    expert's matrix is the other way round when ``transposed``. Gate and up stand one after the other when
    ``concatenated``, else row by row in turn. ``module`` is the module's name in the model.
    """

    module: str
    count: int
    gated: bool
    biased: bool
    transposed: bool
    concatenated: bool


@dataclass(frozen=True)
class DenseLayout:
    """What differs from one ``(N, K)`` matrix per layer.

    Attributes:
        transposed: layers stored as ``(K, N)`` (GPT-2's Conv1D).
        merged: experts stored as 3-D tensors, by what a packed checkpoint calls them: ``X`` of ``X.0.down_proj``.
        joined: experts that files hold in one with those of another module (Ernie 4.5 VL), by the same names.
        stored: tensors of merged experts as the model holds them, by their names in it -> as its files hold them.
    """

    transposed: frozenset[str] = frozenset()
    merged: Mapping[str, MergedExperts] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()
    stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def expand(stored: StoredWeight) -> Tensor:
    """``(N, K)`` float32, columns in the layer's order."""
    weight = dequantize(stored.weight, torch.float32)
    return weight if stored.order is None else torch.zeros_like(weight).index_copy_(1, stored.order, weight)


def dense_tensors(
    checkpoint: Checkpoint, layout: DenseLayout, dtype: torch.dtype, layers: Iterable[PackedLinear]
) -> Iterator[tuple[str, Tensor]]:
    """Every packed weight, expanded: float32 arithmetic, rounded to ``dtype`` once. One layer, or the merged experts of
    one block, in memory at a time.

    Args:
        layers: the checkpoint's, in its order.

    Raises:
        ValueError: an expert, or its bias, is missing.
    """
    done: set[str] = set()
    for linear in layers:
        found = _EXPERT.match(linear.name)
        if found is None or found[1] not in layout.merged:
            weight = expand(checkpoint.stored_weight(linear.name)).to(dtype)
            yield f"{linear.name}.weight", weight.t().contiguous() if linear.name in layout.transposed else weight
        elif found[1] not in done:
            done.add(found[1])
            how = layout.merged[found[1]]
            for name, tensor in _merge(checkpoint, found[1], how, dtype):
                yield from layout.stored({f"{how.module}.{name}": tensor}).items()


def check_experts(layout: DenseLayout, layers: Iterable[str]) -> None:
    """Refuse packed experts that could not be written as the architecture's dense files hold them.

    Args:
        layers: names of the packed layers.

    Raises:
        ValueError: the architecture merges its experts, and a packed one belongs to none of the merged, or is in files
            with those of another module; names it.
    """
    for name in layers if layout.merged or layout.joined else ():
        found = _EXPERT.match(name)
        if not _ANY_EXPERT.match(name) or (found is not None and found[1] in layout.merged):
            continue
        if found is not None and found[1] in layout.joined:
            raise ValueError(
                f"{name}: the architecture's dense files hold these experts together with those of another module, "
                "which a conversion to dense cannot write"
            )
        known = min([*layout.merged, *layout.joined])
        raise ValueError(
            f"{name}: the architecture's dense files hold all experts of a block in one tensor, and this one cannot be "
            f"put there: it would have to be called as in {known}.0.down_proj, with gate_proj, up_proj or down_proj"
        )


def is_merged(name: str, layout: DenseLayout) -> bool:
    """Whether a tensor of the packed checkpoint goes into one of the merged ones: an expert's bias."""
    layer, _, _ = name.rpartition(".")
    found = _EXPERT.match(layer)
    return found is not None and found[1] in layout.merged


def _merge(checkpoint: Checkpoint, name: str, how: MergedExperts, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters, by their names in it."""
    parts = ("gate_proj", "up_proj") if how.gated else ("up_proj",)
    first = "gate_up_proj" if how.gated else "up_proj"

    def weight(layer: str) -> Tensor:
        if layer in checkpoint.linears:
            return expand(checkpoint.stored_weight(layer)).to(dtype)
        return _dense(checkpoint, f"{layer}.weight").to(dtype)

    def bias(layer: str) -> Tensor:
        return _dense(checkpoint, f"{layer}.bias")

    def all_of(read: Callable[[str], Tensor], names: tuple[str, ...]) -> Tensor:
        rows = (_join([read(f"{name}.{e}.{part}") for part in names], how) for e in range(how.count))
        return torch.stack(list(rows))

    for part, names in ((first, parts), ("down_proj", ("down_proj",))):
        merged = all_of(weight, names)
        yield part, merged.mT.contiguous() if how.transposed else merged
        if how.biased:
            yield f"{part}_bias", all_of(bias, names)


def _join(rows: list[Tensor], how: MergedExperts) -> Tensor:
    """Gate and up, or the one there is."""
    if len(rows) == 1:
        return rows[0]
    return torch.cat(rows) if how.concatenated else torch.stack(rows, 1).flatten(0, 1)


def _dense(checkpoint: Checkpoint, name: str) -> Tensor:
    if name not in checkpoint.dense:
        raise ValueError(f"{checkpoint.path}: the tensor {name} is missing, which every expert of its block must have")
    return checkpoint.tensor(name)

"""Rows sorted by expert, as the grouped operators (grouped.py, grouped_int8.py) take them.

| argument | shape and dtype                                                                                     |
|----------|-----------------------------------------------------------------------------------------------------|
| x        | (T, K): rows sorted by expert                                                                       |
| ends     | (E,) int32 or int64, not decreasing, 0 .. T: as ``offs`` of ``torch.nn.functional.grouped_mm``      |
| slots    | (E,) int32, or None: which of the S weights expert e has, -1: none of them. None: S is E, in order   |

Row i is expert e's for ``ends[e - 1] <= i < ends[e]``. T may be 0, and any expert may have no rows. Rows that no weight
of the operator is for come out as zeros: those of an expert without one, and those from ``ends[E - 1]`` on. So experts
of several kinds are as many calls with the same x and ends, each with its own slots, whose results add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["assemble", "check_rows", "of", "ranges", "row_experts"]

_INTEGERS = (torch.int32, torch.int64)


def check_rows(x: Tensor, ends: Tensor, slots: Tensor | None, stacks: dict[str, Tensor | None]) -> None:
    """Compare x, ends and slots with the table, and first axes of ``stacks``. ValueError names what is wrong."""
    if x.ndim != 2:
        raise ValueError(f"x must be (T, K), rows sorted by expert, got {tuple(x.shape)}")
    if ends.ndim != 1 or not len(ends) or ends.dtype not in _INTEGERS:
        raise ValueError(f"ends must be (E,) int32 or int64 with E at least 1, got {tuple(ends.shape)} {ends.dtype}")
    if slots is not None and (slots.shape != ends.shape or slots.dtype != torch.int32):
        raise ValueError(f"slots must be {tuple(ends.shape)} int32 as ends, got {tuple(slots.shape)} {slots.dtype}")
    for name, tensor in (("ends", ends), ("slots", slots)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; move one of them")
    first = next(tensor for tensor in stacks.values() if tensor is not None)
    count = ends.shape[0] if slots is None else max(1, first.shape[0] if first.ndim else 0)
    whose = "experts of ends" if slots is None else "weights of the stack"
    for name, tensor in stacks.items():
        if tensor is not None and (tensor.ndim == 0 or tensor.shape[0] != count):
            raise ValueError(f"{name} must hold the {count} {whose}, got {tuple(tensor.shape)}")


def of(tensor: Tensor | None, weight: int) -> Tensor | None:
    """One weight's part of a stack that may not be there."""
    return None if tensor is None else tensor[weight]


def ranges(ends: Tensor, slots: Tensor | None, rows: int, weights: int) -> list[tuple[int, slice]]:
    """(weight, rows) of every expert that has both, copied to the host.

    Raises:
        ValueError: ends decrease or lie outside of 0 .. rows, or a slot is no weight.
    """
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    if any(a > b for a, b in zip(starts, stops, strict=True)) or stops[-1] > rows:
        raise ValueError(f"ends must not decrease and lie in 0 .. {rows}, the rows of x, got {stops[:16]}")
    whose = list(range(len(stops))) if slots is None else slots.tolist()
    if not all(-1 <= weight < weights for weight in whose):
        raise ValueError(f"slots must be from -1 to {weights - 1}, the last weight of the stack, got {whose[:16]}")
    return [(w, slice(a, b)) for w, a, b in zip(whose, starts, stops, strict=True) if w >= 0 and a < b]


def assemble(
    found: Sequence[tuple[int, slice]], x: Tensor, width: int, product: Callable[[int, slice], Tensor]
) -> Tensor:
    """``(T, width)`` in x's dtype: ``product(weight, rows)`` for every one of :func:`ranges`, zeros for other rows."""
    reached = sum(rows.stop - rows.start for _, rows in found)
    out = (x.new_empty if reached == x.shape[0] else x.new_zeros)(x.shape[0], width)
    for weight, rows in found:
        out[rows] = product(weight, rows)
    return out


def row_experts(ends: Tensor, rows: int) -> Tensor:
    """``(rows,)`` int64: the expert of each row; E for nobody's."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)

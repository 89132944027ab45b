"""Which rows of x and which weight a program of the grouped kernels has: rows sorted by expert, one grid for all.

| tensor | shape | dtype         |                                                                                     |
|--------|-------|---------------|-------------------------------------------------------------------------------------|
| ends   | (E,)  | int32         | contiguous; rows ends[e - 1] .. ends[e] are expert e's                              |
| slots  | (E,)  | int32 or None | contiguous; the weight of expert e among the S that there are, -1: none             |

Without slots S is E and expert e has weight e. Rows whose expert has none, and those from ends[E - 1] on, come out as
zeros. Both tensors stay on the device: nothing waits for them, so a CUDA graph can hold the launch and replay it with
others. They are taken as they should be (ends not decreasing, within 0 .. M; slots below S). Other values leave rows of
out unset or take another weight, but no memory outside of the tensors is touched.

Every expert's rows are cut into tiles of BLOCK_M, and the tiles of all experts numbered one after the other; the rows
past the last expert's are one group more. There are at most ``(M + (BLOCK_M - 1) * min(E + 1, M)) / BLOCK_M`` tiles,
and so many the grid has, whatever the ends are. A program counts the tiles of all experts itself (E numbers, one scan),
which takes about as long as one step of the main loop; programs past the last tile do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase

__all__ = [
    "check_routing",
    "routed_case",
    "routing_constants",
    "rows_by_weight",
    "tile_of_rows",
    "token_tiles",
    "weight_of_rows",
]


@triton.jit
def tile_of_rows(
    ends_ptr, slots_ptr, tile, M, EXPERTS: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(weight, first row of the tile, end of its expert's rows); weight -1: the rows are zeros, -2: no tile."""
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + experts, mask=experts < EXPERTS, other=2147483647)
    begins = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts <= EXPERTS), other=0)
    ends = tl.minimum(tl.maximum(ends, 0), M)
    begins = tl.where(experts <= EXPERTS, tl.minimum(tl.maximum(begins, 0), M), M)
    tiles = tl.maximum(ends - begins + (BLOCK_M - 1), 0) // BLOCK_M
    through = tl.cumsum(tiles, 0)
    before = through <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    mine = experts == expert
    begin = tl.sum(tl.where(mine, begins, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    within = tile - tl.sum(tl.where(before, tiles, 0), 0)
    weight = expert
    if HAS_SLOTS:
        weight = tl.minimum(tl.load(slots_ptr + expert, mask=expert < EXPERTS, other=-1), WEIGHTS - 1)
        weight = tl.maximum(weight, -1)
    weight = tl.where(expert < EXPERTS, weight, tl.where(expert == EXPERTS, -1, -2))
    return weight, (begin + within * BLOCK_M).to(tl.int64), end


def token_tiles(rows: int, experts: int, block_m: int) -> int:
    """Tiles of ``block_m`` rows at most, however the rows are spread over the experts and the group of nobody's."""
    return (rows + (block_m - 1) * min(experts + 1, rows)) // block_m


def routing_constants(experts: int, weights: int, has_slots: bool) -> dict[str, Any]:
    """Constexpr arguments of :func:`tile_of_rows`. BLOCK_E is a power of two above ``experts``: nobody's rows too."""
    return {"EXPERTS": experts, "WEIGHTS": weights, "BLOCK_E": 1 << experts.bit_length(), "HAS_SLOTS": has_slots}


def weight_of_rows(ends: Tensor, slots: Tensor | None, rows: int) -> Tensor:
    """``(rows,)`` int64 on the device of ends: the weight of each row's expert; any for a row that has none."""
    experts = torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)
    experts = experts.clamp_(max=len(ends) - 1)
    return experts if slots is None else slots[experts].long().clamp_(min=0)


def rows_by_weight(ends: Tensor, slots: Tensor | None) -> Iterator[tuple[int, slice]]:
    """(weight, rows) of every expert that has a weight, on the host: what the references go through."""
    begin = 0
    weights = range(len(ends)) if slots is None else slots.tolist()
    for weight, end in zip(weights, ends.tolist(), strict=True):
        if weight >= 0:
            yield weight, slice(begin, end)
        begin = end


def check_routing(x: Tensor, ends: Tensor, slots: Tensor | None, stacks: Mapping[str, Tensor | None]) -> int:
    """Compare shapes, dtypes and strides with the table, and the first axes of ``stacks`` with each other.

    Returns:
        S, the number of weights.

    Raises:
        ValueError: names the first contradiction. Values are not looked at.
    """
    given = {"ends": ends} if slots is None else {"ends": ends, "slots": slots}
    for name, one in given.items():
        shaped = one.ndim == 1 and len(one) and len(one) == len(ends)
        if not shaped or one.dtype != torch.int32 or one.device != x.device or not one.is_contiguous():
            raise ValueError(
                f"{name} must be (E,) int32 and contiguous on {x.device} with E at least 1, got {tuple(one.shape)} "
                f"{one.dtype} on {one.device} with strides {one.stride()}"
            )
    first = next(tensor for tensor in stacks.values() if tensor is not None)
    weights = len(ends) if slots is None else first.shape[0] if first.ndim else 0
    for name, tensor in stacks.items():
        if tensor is not None and (
            tensor.ndim == 0 or weights < 1 or tensor.shape[0] != weights or not tensor.is_contiguous()
        ):
            whose = f"the {weights} experts of ends" if slots is None else "one weight per slot, as all of them"
            raise ValueError(
                f"{name} must be contiguous and hold {whose}, got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    return weights


def routed_case(case: CompileCase, kernel: Any, kind: str, *, has_slots: bool) -> CompileCase:
    """The ``case`` of a kernel for one weight as ``kernel``, its grouped form for 128 experts, is compiled.

    Args:
        has_slots: only 120 of them have a weight.
    """
    pointers = {"ends_ptr": "*i32", "slots_ptr": "*i32"}
    split_k_only = ("partials_ptr", "counters_ptr")
    types = {key: t for key, t in case.signature.items() if t != "constexpr" and key not in split_k_only}
    signature = {"x_ptr": types["x_ptr"], **pointers, **types, "TOKEN_TILES": "i32"}
    constexprs = {**routing_constants(128, 120 if has_slots else 128, has_slots), **case.constexprs}
    return replace(
        case,
        kernel=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, *(key for key in case.divisible if key in signature)),
        kind=kind,
    )

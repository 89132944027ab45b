"""Output tiles that several programs share, for scaled_kernel.py and int8_hopper_kernel.py, whose programs stay.

Who has which part is scaled_plan.py's; here the parts' sums, fp32 or int32, are published and added. Importing this
needs triton.experimental.gluon.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import scaled_plan
from .gluon_names import barrier

__all__ = ["banded_tile", "last_of", "segment_of", "segments_of", "sum_of"]

segments_of, segment_of = gluon.jit(scaled_plan.segments_of), gluon.jit(scaled_plan.segment_of)
banded_tile = gluon.jit(scaled_plan.banded_tile)
_share_of, _first_sharer = gluon.jit(scaled_plan.share_of), gluon.jit(scaled_plan.first_sharer)


@gluon.jit
def last_of(
    accs, partials_ptr, counters_ptr, p, left, left_steps, steps, sharers, WARPGROUP: gl.constexpr,
    BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Publish a warpgroup's sums of left tile ``left``; whether all its sharers', of whom p is one, are published."""
    SIZE: gl.constexpr = BLOCKS * 64 * BLOCK_M
    second = left - _share_of(p, left_steps, sharers) // steps
    base = partials_ptr + ((2 * p + second) * 2 + WARPGROUP).to(gl.int64) * SIZE
    place = _places(BLOCK_M, MMA)
    for block in gl.static_range(BLOCKS):
        gl.store(base + block * 64 * BLOCK_M + place, accs[block])
    first, last = (
        _first_sharer(left * steps, left_steps, sharers),
        _first_sharer(left * steps + steps - 1, left_steps, sharers),
    )
    # all stores of the warpgroup, then the one thread that releases them (cumulatively) and acquires the others'
    barrier()
    arrived = gl.atomic_add(counters_ptr + left * 2 + WARPGROUP, 1, sem="acq_rel", scope="gpu")
    barrier()
    return arrived == last - first


@gluon.jit
def _places(BLOCK_M: gl.constexpr, MMA: gl.constexpr):
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    return (lanes * BLOCK_M)[:, None] + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))[None, :]


@gluon.jit
def sum_of(
    partials_ptr, left, left_steps, steps, sharers, block, WARPGROUP: gl.constexpr, BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """All sharers' sums of 64 rows of a left tile, added in the order of k."""
    SIZE: gl.constexpr = BLOCKS * 64 * BLOCK_M
    acc = gl.zeros((64, BLOCK_M), partials_ptr.dtype.element_ty, layout=MMA)
    place = _places(BLOCK_M, MMA)
    first, last = (
        _first_sharer(left * steps, left_steps, sharers),
        _first_sharer(left * steps + steps - 1, left_steps, sharers),
    )
    for p in range(first, last + 1):
        second = left - _share_of(p, left_steps, sharers) // steps
        base = partials_ptr + ((2 * p + second) * 2 + WARPGROUP).to(gl.int64) * SIZE
        # past the first-level cache, which may hold what was here before
        acc += gl.load(base + block * 64 * BLOCK_M + place, cache_modifier=".cg")
    return acc

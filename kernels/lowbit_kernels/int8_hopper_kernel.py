"""The Gluon kernel of int8_hopper.py. Importing this needs triton.experimental.gluon; int8_hopper.py does so.

P programs stay on the GPU; each works through its segments (scaled_plan.py), ranges of steps of 128 columns of one
output tile of 128 weight rows by BLOCK_M tokens. A producer fills a ring with both operands by the copy engine; two
consumer warpgroups have 64 rows each, by 128 tokens once or twice. As in hopper_kernel.py, which says why it is free of
races; both operands are read out of shared memory here, so a product is waited for when the next one has been issued,
and its slot is handed back then:

    issue step i    wait for step i - 1    hand back the slot of step i - 1    issue step i + 1    ...
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import async_load
from .hopper_ring import prefetch, slot_of, slot_phase, store_rows
from .overlap import let_next_begin, wait_for_previous
from .shared_tiles import banded_tile, last_of, segment_of, segments_of, sum_of

__all__ = ["int8_hopper_kernel"]


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, sharers, STAGES: gl.constexpr, BLOCK_M: gl.constexpr
):  # fmt: skip
    """Fill the ring with the steps of all segments, one after the other."""
    p, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, 128), gl.cdiv(K, 128)
    i = 0
    for s in range(segments_of(p, programs, tiles_m * tiles_n, steps, sharers)):
        tile, first, count = segment_of(p, s, programs, tiles_m * tiles_n, steps, sharers)
        token_tile, row_tile = banded_tile(tile, tiles_m, tiles_n)
        for step in range(first, first + count):
            slot = slot_of(i, STAGES)
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), slot_phase(i, STAGES) ^ 1)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            async_load(w_desc, [row_tile * 128, step * 128], bar, w_ring.index(slot))
            async_load(x_desc, [token_tile * BLOCK_M, step * 128], bar, x_ring.index(slot))
            i += 1


@gluon.jit
def _consume(
    x_ring, w_ring, full, empty, done, steps, WARPGROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    COLUMNS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """``steps`` steps of one warpgroup, of which ``done`` came before in the ring: PARTS sums (64, COLUMNS)."""
    accs = ()
    for _ in gl.static_range(PARTS):
        accs = accs + (gl.zeros((64, COLUMNS), gl.int32, layout=MMA),)  # noqa: RUF005
    for i in range(done, done + steps):
        slot = slot_of(i, STAGES)
        mbarrier.wait(full.index(slot), slot_phase(i, STAGES))
        w = w_ring.index(slot).slice(WARPGROUP * 64, 64, dim=0)
        issued = ()
        for part in gl.static_range(PARTS):
            x = x_ring.index(slot).slice(part * COLUMNS, COLUMNS, dim=0).permute((1, 0))
            issued = issued + (warpgroup_mma(w, x, accs[part], use_acc=True, is_async=True),)  # noqa: RUF005
        accs = _waited(issued, PARTS, PARTS)
        mbarrier.arrive(empty.index(slot_of(i + STAGES - 1, STAGES)), pred=i > done)
    accs = _waited(accs, 0, PARTS)
    mbarrier.arrive(empty.index(slot_of(done + steps - 1, STAGES)))
    return accs


@gluon.jit
def _waited(accs, OUTSTANDING: gl.constexpr, PARTS: gl.constexpr):
    """The sums once all products but OUTSTANDING are done."""
    if PARTS == 1:
        return (warpgroup_mma_wait(OUTSTANDING, deps=[accs[0]]),)
    else:
        return warpgroup_mma_wait(OUTSTANDING, deps=[accs[0], accs[1]])


@gluon.jit
def _halves(acc, BLOCK_M: gl.constexpr):
    """Sums (64, BLOCK_M) of the first half of the tokens and of the second: registers, nothing moves."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M // 2, 32]
    )
    low, high = gl.split(gl.permute(gl.reshape(acc, (64, 2, BLOCK_M // 2)), (0, 2, 1)))
    low = gl.convert_layout(low, HALF, assert_trivial=True)
    return low, gl.convert_layout(high, HALF, assert_trivial=True)


@gluon.jit
def _store(
    acc, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, token, first, M, N, HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """The numbers that sums (64, COLUMNS) of rows ``first ..`` stand for, rounded once: 2 KiB per warp at a time."""
    if COLUMNS * out_ptr.dtype.element_ty.primitive_bitwidth > 64 * 16:
        low, high = _halves(acc, COLUMNS)
        _store(
            low, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, token, first, M, N, HAS_ZEROS,
            HAS_BIAS, COLUMNS // 2,
        )  # fmt: skip
        _store(
            high, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, token + COLUMNS // 2, first, M, N,
            HAS_ZEROS, HAS_BIAS, COLUMNS // 2,
        )  # fmt: skip
    else:
        MMA: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
        )
        rows = gl.minimum(first + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)), N - 1)
        tokens = gl.minimum(token + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA)), M - 1)
        if HAS_ZEROS:
            acc -= gl.load(zero_ptr + rows).to(gl.int32)[:, None] * gl.load(sums_ptr + tokens)[None, :]
        out = acc.to(gl.float32) * gl.load(x_scale_ptr + tokens)[None, :]
        out *= gl.load(w_scale_ptr + rows).to(gl.float32)[:, None]
        if HAS_BIAS:
            out += gl.load(bias_ptr + rows).to(gl.float32)[:, None]
        store_rows(out, out_ptr, token, first, M, N)


@gluon.jit
def _warpgroup(
    x_ring, w_ring, full, empty, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, partials_ptr,
    counters_ptr, M, N, K, sharers, WARPGROUP: gl.constexpr, STAGES: gl.constexpr, HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """A consumer: the sums of each of the program's segments, and its rows of out where it has them all."""
    COLUMNS: gl.constexpr = min(BLOCK_M, 128)
    PARTS: gl.constexpr = BLOCK_M // COLUMNS
    p, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, 128), gl.cdiv(K, 128)
    tiles = tiles_m * tiles_n
    whole = tiles // programs * programs
    left_steps = (tiles - whole) * steps
    done = 0
    for s in range(segments_of(p, programs, tiles, steps, sharers)):
        tile, _, count = segment_of(p, s, programs, tiles, steps, sharers)
        token_tile, row_tile = banded_tile(tile, tiles_m, tiles_n)
        row = row_tile * 128 + WARPGROUP * 64
        accs = _consume(x_ring, w_ring, full, empty, done, count, WARPGROUP, STAGES, PARTS, COLUMNS, MMA)
        done += count
        complete = count == steps
        if count != steps:
            complete = last_of(
                accs, partials_ptr, counters_ptr, p, tile - whole, left_steps, steps, sharers, WARPGROUP, PARTS,
                COLUMNS, MMA,
            )  # fmt: skip
        if complete:
            for part in gl.static_range(PARTS):
                acc = accs[part]
                if count != steps:
                    acc = sum_of(
                        partials_ptr, tile - whole, left_steps, steps, sharers, part, WARPGROUP, PARTS, COLUMNS, MMA
                    )
                _store(
                    acc, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr,
                    token_tile * BLOCK_M + part * COLUMNS, row, M, N, HAS_ZEROS, HAS_BIAS, COLUMNS,
                )  # fmt: skip
            if count != steps:
                gl.store(counters_ptr + (tile - whole) * 2 + WARPGROUP, 0)


@gluon.jit(do_not_specialize=["M", "sharers"])
def int8_hopper_kernel(
    x_desc,  # (M, K) int8 in blocks of (BLOCK_M, 128)
    w_desc,  # (N, K) int8 in blocks of (128, 128)
    w_ptr,  # the weight again, to prefetch it if PDL
    x_scale_ptr,  # (M,) fp32
    w_scale_ptr,  # (N,)
    zero_ptr,  # (N,) int8, unused unless HAS_ZEROS
    sums_ptr,  # (M,) int32, likewise
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    partials_ptr,  # (2 * programs, 2, 64 * BLOCK_M) int32, unused unless tiles are shared
    counters_ptr,  # (left tiles * 2,) int32 zeros, likewise; zeros again afterwards
    M,
    N,
    K,
    sharers,  # programs that share the left tiles, at least as many as those; any positive number where there are none
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """All segments of one of gl.num_programs(0) programs; num_warps is 4."""
    # triton 3.6 knows products of bytes with up to 224 tokens: 256 are two
    COLUMNS: gl.constexpr = min(BLOCK_M, 128)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32])
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, 128, 128], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    if PDL:
        p, programs, tiles_m, tiles_n = gl.program_id(0), gl.num_programs(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, 128)
        tile, first, _ = segment_of(p, 0, programs, tiles_m * tiles_n, gl.cdiv(K, 128), sharers)
        _, row_tile = banded_tile(tile, tiles_m, tiles_n)
        prefetch(w_ptr, row_tile * 128, N - 1, K, first * 128, K - 1, 128, 512)
        wait_for_previous()
        let_next_begin()
    # tuples of constexpr are written out in place: a variable would turn them into tensors
    gl.warp_specialize([
        (_produce, (x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, sharers, STAGES, BLOCK_M)),
        (_warpgroup, (
            x_ring, w_ring, full, empty, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, partials_ptr,
            counters_ptr, M, N, K, sharers, 0, STAGES, HAS_ZEROS, HAS_BIAS, BLOCK_M, MMA,
        )),
        (_warpgroup, (
            x_ring, w_ring, full, empty, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, out_ptr, partials_ptr,
            counters_ptr, M, N, K, sharers, 1, STAGES, HAS_ZEROS, HAS_BIAS, BLOCK_M, MMA,
        )),
    ], [4, 4], [232, 232])  # fmt: skip

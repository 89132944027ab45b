"""The Gluon kernel of hopper.py. Importing this needs triton.experimental.gluon; hopper.py does so when it is called.

One program computes ``REPS * 64`` weight rows per consumer warpgroup by BLOCK_M tokens, over its share of the columns,
128 columns per step. Warps and what they share:

    producer (1 warp)              ring of STAGES                          consumers (CONSUMERS warpgroups)
    wait empty[s]      <---------------------------------------------------  arrive empty[s]   once per warpgroup
    expect full[s]                 x_ring[s]     (BLOCK_M, 128)              wait full[s]
    TMA x, TMA words   ----------> w_ring[s, ..] units of 1 KiB     ------>  LDS.128 -> lop3 -> wgmma -> scale

Why it is free of races; the simulation in tests/test_kernels_hopper.py runs the same index functions:

* A slot is filled only after ``empty[s]`` completed the phase of its previous use. Each warpgroup arrives on it once
  per use, after ``warpgroup_mma_wait(0)``: the tensor cores have read x. Its loads of words, scales and zeros come
  before. Gluon's barrier insertion synchronises the warpgroup before the one thread that arrives, so it arrives for
  all its warps (the tests look for the ``bar.sync`` before each ``mbarrier.arrive`` of the PTX).
* A slot is read only after ``full[s]``: one arrival (the producer's expect) and the bytes of every copy into it. The
  copies write through the async proxy, whose writes the mbarrier's completion makes visible to whoever waited.
* Nothing writes to the ring but the copy engine, so no proxy fence is needed between loads and refills (the reads are
  ordered before the refill by the mbarrier). The barriers themselves are initialised by ordinary stores: one fence.
* Wgmma reads registers until it is waited for. The next fragment is other registers (the compiler keeps both alive,
  and ptxas says C7515 when it cannot), and the accumulator is not touched before the wait.
* Consumers read words two pieces ahead and make fragments one ahead, from the next slot after ``full`` of that slot.
  Past the last step there is nothing to wait for; what is read then is never multiplied, and no copy is under way.
* That wait comes before the last product but one of a step is issued, so the ring needs two slots at least: with one,
  its refill would wait for a release that waits for the refill.
"""

# A tuple that grows in a jit function changes its type, which Triton unrolls and mypy cannot follow.
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import hopper_plan
from .gluon_names import barrier
from .hopper_ring import (
    fill_slot,
    piece_fragment,
    piece_words,
    prefetch_weight,
    rows_of,
    runs_of_step,
    slot_of,
    slot_phase,
    store_rows,
)
from .overlap import let_next_begin, wait_for_previous

__all__ = ["hopper_kernel"]

_first_step = gluon.jit(hopper_plan.first_step)


@gluon.jit
def _produce(
    x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, token, row, N, K, begin, steps,
    STAGES: gl.constexpr, UNITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr,
):  # fmt: skip
    """Fill the ring: per step a tile of x, UNITS units of each 16 rows, and scales and zeros of every run."""
    for i in range(steps):
        fill_slot(
            x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, i, begin + i, token, row, N, K,
            STAGES, UNITS, GROUP, HAS_ZEROS,
        )  # fmt: skip


@gluon.jit
def _consume(
    x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, row, N, steps, WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr, REPS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr, BLOCK_M: gl.constexpr, PIECE_COLUMNS: gl.constexpr, MMA: gl.constexpr, UNIT: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """All steps of one warpgroup: REPS accumulators (64, BLOCK_M) of its rows, scaled.

    A *piece* is one wgmma chain: columns of 64 rows that share a scale and lie in one unit, at most PIECE_COLUMNS, and
    at least two in a step. While it runs, the next piece's fragment is made, of words that were loaded one piece
    earlier: had they to come first, ptxas would make most of it behind the wait. Columns that share a scale (a run)
    start from a fresh accumulator, scaled in fp32; with one scale for the whole row the instruction accumulates across
    steps, scaled at the end.
    """
    DTYPE: gl.constexpr = x_ring.dtype
    RUNS: gl.constexpr = runs_of_step(GROUP)
    RUN: gl.constexpr = 128 // max(RUNS, 1)
    COLUMNS: gl.constexpr = min(512 // BITS, RUN, PIECE_COLUMNS)
    PIECES: gl.constexpr = 128 // COLUMNS  # of 64 rows in a step
    FIRST: gl.constexpr = WARPGROUP * REPS

    fresh = gl.zeros((64, BLOCK_M), gl.float32, layout=MMA)
    accs, row_zeros = (), ()
    for rep in gl.static_range(REPS):
        accs = accs + (fresh,)  # noqa: RUF005
        if RUNS == 0 and HAS_ZEROS:
            lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
            zeros = gl.load(zeros_ptr + gl.minimum(row + (FIRST + rep) * 64 + lanes, N - 1))
            row_zeros = row_zeros + (zeros,)  # noqa: RUF005
    mbarrier.wait(full.index(0), 0)
    words = piece_words(w_ring, 0, 0, 0, 0, FIRST, BITS, COLUMNS, UNIT, WORDS)
    ahead = piece_words(w_ring, 0, words, 0, 1, FIRST, BITS, COLUMNS, UNIT, WORDS)
    fragment, centre, _ = piece_fragment(
        words, 0, 0, s_ring, z_ring, 0, row_zeros, (), 0, 0, FIRST, BITS, GROUP, COLUMNS, DTYPE, HAS_ZEROS, False, MMA,
        WORDS,
    )  # fmt: skip
    for i in range(steps):
        slot = slot_of(i, STAGES)
        after = slot_of(i + 1, STAGES)
        new_accs = ()
        for rep in gl.static_range(REPS):
            acc = accs[rep]
            dot = acc
            for piece in gl.static_range(PIECES):
                # the next piece becomes a fragment while the tensor cores work, and the words of the one after it come
                words = ahead
                if rep * PIECES + piece == PIECES * REPS - 2:
                    mbarrier.wait(full.index(after), slot_phase(i + 1, STAGES), pred=i + 1 < steps)
                loaded_from, source = slot, slot
                if rep * PIECES + piece >= PIECES * REPS - 2:
                    loaded_from = after
                if rep * PIECES + piece == PIECES * REPS - 1:
                    source = after
                ahead = piece_words(
                    w_ring, loaded_from, ahead, (rep + (piece + 2) // PIECES) % REPS, (piece + 2) % PIECES, FIRST,
                    BITS, COLUMNS, UNIT, WORDS,
                )  # fmt: skip
                x = x_ring.index(slot).slice(piece * COLUMNS, COLUMNS, dim=1).permute((1, 0))
                if RUNS == 0 or piece * COLUMNS % RUN != 0:
                    dot = warpgroup_mma(fragment, x, dot, use_acc=True, is_async=True)
                else:
                    dot = warpgroup_mma(fragment, x, fresh, use_acc=False, is_async=True)
                fragment, centre, _ = piece_fragment(
                    words, centre, words, s_ring, z_ring, source, row_zeros, (), (rep + (piece + 1) // PIECES) % REPS,
                    (piece + 1) % PIECES, FIRST, BITS, GROUP, COLUMNS, DTYPE, HAS_ZEROS, False, MMA, WORDS,
                )  # fmt: skip
                dot = warpgroup_mma_wait(0, deps=[dot])
                if RUNS == 0:
                    acc = dot
                elif (piece + 1) * COLUMNS % RUN == 0:
                    scale = rows_of(s_ring, slot * RUNS + piece * COLUMNS // RUN, FIRST + rep, MMA)
                    acc = acc + dot * scale.to(gl.float32)[:, None]
            new_accs = new_accs + (acc,)  # noqa: RUF005
        accs = new_accs
        mbarrier.arrive(empty.index(slot))
    if RUNS == 0:
        new_accs = ()
        for rep in gl.static_range(REPS):
            lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
            scale = gl.load(scales_ptr + gl.minimum(row + (FIRST + rep) * 64 + lanes, N - 1))
            new_accs = new_accs + (accs[rep] * scale.to(gl.float32)[:, None],)  # noqa: RUF005
        accs = new_accs
    return accs


@gluon.jit
def _finish(
    accs, bias_ptr, out_ptr, partials_ptr, counters_ptr, tile, split, token, row, M, N, WARPGROUP: gl.constexpr,
    CONSUMERS: gl.constexpr, REPS: gl.constexpr, SPLIT_K: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Store one warpgroup's rows, after adding those of the other splits when this is the last of them to arrive.

    Warpgroups of one tile count on their own, so none waits for another. Every split adds in the order of k.
    """
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    store = True
    if SPLIT_K > 1:
        own = tile * CONSUMERS + WARPGROUP
        place = (lanes * BLOCK_M)[:, None] + columns[None, :]
        SIZE: gl.constexpr = REPS * 64 * BLOCK_M
        base = partials_ptr + own.to(gl.int64) * (SPLIT_K * SIZE)
        for rep in gl.static_range(REPS):
            gl.store(base + (split * SIZE + rep * 64 * BLOCK_M) + place, accs[rep])
        # all stores of the warpgroup, then the one thread that releases them (cumulatively) and acquires the others'
        barrier()
        store = gl.atomic_add(counters_ptr + own, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
        barrier()
    if store:
        for rep in gl.static_range(REPS):
            acc = accs[rep]
            if SPLIT_K > 1:
                acc = gl.zeros((64, BLOCK_M), gl.float32, layout=MMA)
                for other in range(SPLIT_K):
                    # past the first-level cache, which may hold what was here before
                    acc += gl.load(base + (other * SIZE + rep * 64 * BLOCK_M) + place, cache_modifier=".cg")
            first = row + (WARPGROUP * REPS + rep) * 64
            if HAS_BIAS:
                acc += gl.load(bias_ptr + gl.minimum(first + lanes, N - 1)).to(gl.float32)[:, None]
            store_rows(acc, out_ptr, token, first, M, N)
        if SPLIT_K > 1:
            gl.store(counters_ptr + own, 0)


@gluon.jit
def _warpgroup(
    x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partials_ptr, counters_ptr,
    tile, split, token, row, M, N, steps, WARPGROUP: gl.constexpr, CONSUMERS: gl.constexpr, REPS: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr, HAS_BIAS: gl.constexpr,
    SPLIT_K: gl.constexpr, BLOCK_M: gl.constexpr, PIECE_COLUMNS: gl.constexpr, MMA: gl.constexpr, UNIT: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """A consumer from its first step to its rows of out."""
    accs = _consume(
        x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, row, N, steps, WARPGROUP, CONSUMERS * REPS,
        REPS, STAGES, BITS, GROUP, HAS_ZEROS, BLOCK_M, PIECE_COLUMNS, MMA, UNIT, WORDS,
    )  # fmt: skip
    _finish(
        accs, bias_ptr, out_ptr, partials_ptr, counters_ptr, tile, split, token, row, M, N, WARPGROUP, CONSUMERS, REPS,
        SPLIT_K, HAS_BIAS, BLOCK_M, MMA,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(
    x_desc,  # (M, K) in blocks of (BLOCK_M, 128)
    w_desc,  # (ceil(N / 16), 8 * units along K, 32) int32 in blocks of (BLOCK_N / 16, 8 * UNITS, 32)
    s_desc,  # (G * N,) scales in blocks of BLOCK_N
    z_desc,  # (G * N,) zeros likewise; the scales' again unless HAS_ZEROS
    tiles_ptr,  # the words again, to prefetch them if PDL
    scales_ptr,  # (G, N); read only when GROUP is -1
    zeros_ptr,  # (G, N) likewise, unused unless HAS_ZEROS
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    partials_ptr,  # (output tiles * CONSUMERS, SPLIT_K, REPS * 64, BLOCK_M) fp32, unused unless SPLIT_K > 1
    counters_ptr,  # (output tiles * CONSUMERS,) int32 zeros, likewise; zeros again afterwards
    M,
    N,
    K,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REPS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    PIECE_COLUMNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    UNIT: gl.constexpr,
    WORDS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Columns [split] of one (BLOCK_M, CONSUMERS * REPS * 64) tile of out per program; num_warps is 4."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    WARPGROUPS: gl.constexpr = CONSUMERS * REPS
    BLOCK_N: gl.constexpr = WARPGROUPS * 64
    UNITS: gl.constexpr = BITS // 4
    ROWS: gl.constexpr = STAGES * max(runs_of_step(GROUP), 1)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N // 16, 8 * UNITS, 32], w_desc.layout)
    s_ring = gl.allocate_shared_memory(s_desc.dtype, [ROWS, BLOCK_N], s_desc.layout)
    z_ring = s_ring
    if HAS_ZEROS:
        z_ring = gl.allocate_shared_memory(z_desc.dtype, [ROWS, BLOCK_N], z_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=CONSUMERS)
    fence_async_shared()

    tile, split = gl.program_id(0), gl.program_id(1)
    tiles_m = gl.cdiv(M, BLOCK_M)
    # token tiles of the same weight rows are neighbours: they read those words together, from the L2 but once
    token, row = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
    begin = _first_step(split, K, SPLIT_K)
    steps = _first_step(split + 1, K, SPLIT_K) - begin
    if PDL:
        prefetch_weight(tiles_ptr, scales_ptr, zeros_ptr, row, begin, N, K, UNITS, GROUP, HAS_ZEROS, BLOCK_N)
        wait_for_previous()
        let_next_begin()
    # tuples of constexpr are written out in place: a variable would turn them into tensors
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_warpgroup, (
                x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partials_ptr,
                counters_ptr, tile, split, token, row, M, N, steps, 0, CONSUMERS, REPS, STAGES, BITS, GROUP, HAS_ZEROS,
                HAS_BIAS, SPLIT_K, BLOCK_M, PIECE_COLUMNS, MMA, UNIT, WORDS,
            )),
            (_produce, (
                x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, token, row, N, K, begin,
                steps, STAGES, UNITS, GROUP, HAS_ZEROS,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_warpgroup, (
                x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partials_ptr,
                counters_ptr, tile, split, token, row, M, N, steps, 0, CONSUMERS, REPS, STAGES, BITS, GROUP, HAS_ZEROS,
                HAS_BIAS, SPLIT_K, BLOCK_M, PIECE_COLUMNS, MMA, UNIT, WORDS,
            )),
            (_warpgroup, (
                x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partials_ptr,
                counters_ptr, tile, split, token, row, M, N, steps, 1, CONSUMERS, REPS, STAGES, BITS, GROUP, HAS_ZEROS,
                HAS_BIAS, SPLIT_K, BLOCK_M, PIECE_COLUMNS, MMA, UNIT, WORDS,
            )),
            (_produce, (
                x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, token, row, N, K, begin,
                steps, STAGES, UNITS, GROUP, HAS_ZEROS,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip

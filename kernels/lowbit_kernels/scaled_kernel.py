"""The Gluon kernel of scaled.py. Importing this needs triton.experimental.gluon; scaled.py does so when it is called.

P programs stay on the GPU; each works through its segments (scaled_plan.py), ranges of steps of one output tile of
``BLOCKS * 128`` weight rows by BLOCK_M tokens. A producer and two consumer warpgroups share a ring as in
hopper_kernel.py, which says why that is free of races; the ring runs on from one segment to the next, so the first
steps of a tile are on their way while the one before is stored.

What differs in the consumers: the scale is in the register operand, so wgmma adds up a whole segment and its sums are
touched once, at the end. Per piece (64 rows by at most 64 or 128 columns):

    load words of piece i + LOOK    issue piece i    make fragment i + 1 while it runs    wait for piece i    ...

With LOOK 2 the words are there when the fragment is made, so that all of it is made while piece i runs, if there are
registers for them; with 1 most of a step's last fragment is made behind the wait. Between a wait and the next issue
the tensor cores have the other warpgroup's piece. Waiting one piece later would leave no gap at all, and ptxas
serialises it (C7512, kernels/README.md). A slot is handed back after the last piece that reads its x. The next words
are read out of the ring before that: of the next slot, or, where a segment ends, of this one again, as the next is
being filled for another tile.
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

from .hopper_ring import (
    fill_slot,
    piece_fragment,
    piece_words,
    prefetch_weight,
    runs_of_step,
    slot_of,
    slot_phase,
    store_rows,
)
from .overlap import let_next_begin, wait_for_previous
from .shared_tiles import banded_tile, last_of, segment_of, segments_of, sum_of

__all__ = ["scaled_kernel"]


@gluon.jit
def _produce(
    x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, M, N, K, sharers, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the steps of all segments, one after the other."""
    p, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, 128)
    i = 0
    for s in range(segments_of(p, programs, tiles_m * tiles_n, steps, sharers)):
        tile, first, count = segment_of(p, s, programs, tiles_m * tiles_n, steps, sharers)
        token_tile, row_tile = banded_tile(tile, tiles_m, tiles_n)
        for step in range(first, first + count):
            fill_slot(
                x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, i, step,
                token_tile * BLOCK_M, row_tile * BLOCK_N, N, K, STAGES, BITS // 4, GROUP, HAS_ZEROS,
            )  # fmt: skip
            i += 1


@gluon.jit
def _rows(ptr, first, N, MMA: gl.constexpr):
    """64 values from row ``first`` on, as the lanes of the accumulator own them."""
    return gl.load(ptr + gl.minimum(first + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)), N - 1))


@gluon.jit
def _consume(
    x_ring, w_ring, s_ring, z_ring, full, empty, zeros_ptr, rows_ptr, done, row, N, steps, WARPGROUP: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr,
    BLOCK_M: gl.constexpr, PIECE_COLUMNS: gl.constexpr, LOOK: gl.constexpr, MMA: gl.constexpr, UNIT: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """``steps`` steps of one warpgroup, of which ``done`` came before in the ring: its BLOCKS sums (64, BLOCK_M)."""
    DTYPE: gl.constexpr = x_ring.dtype
    RUNS: gl.constexpr = runs_of_step(GROUP)
    SCALED: gl.constexpr = RUNS > 0
    COLUMNS: gl.constexpr = min(512 // BITS, 128 // max(RUNS, 1), PIECE_COLUMNS)
    PIECES: gl.constexpr = 128 // COLUMNS  # of 64 rows in a step
    FIRST: gl.constexpr = WARPGROUP * BLOCKS
    accs, zeros, factors = (), (), ()
    for block in gl.static_range(BLOCKS):
        accs = accs + (gl.zeros((64, BLOCK_M), gl.float32, layout=MMA),)  # noqa: RUF005
        if HAS_ZEROS and not SCALED:
            zeros = zeros + (_rows(zeros_ptr, row + block * 64, N, MMA),)  # noqa: RUF005
        if SCALED:
            factors = factors + (_rows(rows_ptr, row + block * 64, N, MMA),)  # noqa: RUF005
    slot = slot_of(done, STAGES)
    mbarrier.wait(full.index(slot), slot_phase(done, STAGES))
    words = piece_words(w_ring, slot, 0, 0, 0, FIRST, BITS, COLUMNS, UNIT, WORDS)
    ahead = words
    if LOOK == 2:
        ahead = piece_words(w_ring, slot, words, 1 // PIECES, 1 % PIECES, FIRST, BITS, COLUMNS, UNIT, WORDS)
    fragment, centre, factor = piece_fragment(
        words, 0, 0, s_ring, z_ring, slot, zeros, factors, 0, 0, FIRST, BITS, GROUP, COLUMNS, DTYPE, HAS_ZEROS, SCALED,
        MMA, WORDS,
    )  # fmt: skip
    for i in range(done, done + steps):
        slot, after = slot_of(i, STAGES), slot_of(i + 1, STAGES)
        behind = slot
        for piece in gl.static_range(PIECES * BLOCKS):
            words = ahead
            if piece == PIECES * BLOCKS - LOOK:
                # past the last step of this slot again: the one behind it is being filled for the next tile
                more = i + 1 < done + steps
                mbarrier.wait(full.index(after), slot_phase(i + 1, STAGES), pred=more)
                behind = gl.where(more, after, slot)
            ahead = piece_words(
                w_ring, behind, ahead, (piece + LOOK) // PIECES % BLOCKS, (piece + LOOK) % PIECES, FIRST, BITS, COLUMNS,
                UNIT, WORDS,
            )  # fmt: skip
            if LOOK == 1:
                words = ahead
            source = slot
            if piece == PIECES * BLOCKS - 1:
                source = behind
            x = x_ring.index(slot).slice(piece % PIECES * COLUMNS, COLUMNS, dim=1).permute((1, 0))
            new = ()
            for block in gl.static_range(BLOCKS):
                if block == piece // PIECES:
                    new = new + (warpgroup_mma(fragment, x, accs[block], use_acc=True, is_async=True),)  # noqa: RUF005
                else:
                    new = new + (accs[block],)  # noqa: RUF005
            # while the tensor cores work
            fragment, centre, factor = piece_fragment(
                words, centre, factor, s_ring, z_ring, source, zeros, factors, (piece + 1) // PIECES % BLOCKS,
                (piece + 1) % PIECES, FIRST, BITS, GROUP, COLUMNS, DTYPE, HAS_ZEROS, SCALED, MMA, WORDS,
            )  # fmt: skip
            if BLOCKS == 1:
                accs = (warpgroup_mma_wait(0, deps=[new[0]]),)
            else:
                accs = warpgroup_mma_wait(0, deps=[new[0], new[1]])
        mbarrier.arrive(empty.index(slot))
    return accs


@gluon.jit
def _store(
    acc, scales_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr, token, first, M, N, SCALED: gl.constexpr,
    HAS_TOKENS: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Sums (64, BLOCK_M) of rows ``first ..`` over what x and weights were multiplied by, plus bias, rounded once."""
    if SCALED:
        acc *= _rows(rows_ptr + N, first, N, MMA)[:, None]
    else:
        acc *= _rows(scales_ptr, first, N, MMA).to(gl.float32)[:, None]
    if HAS_TOKENS:
        acc *= gl.load(tokens_ptr + token + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA)))[None, :]
    if HAS_BIAS:
        acc += _rows(bias_ptr, first, N, MMA).to(gl.float32)[:, None]
    store_rows(acc, out_ptr, token, first, M, N)


@gluon.jit
def _warpgroup(
    x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr,
    partials_ptr, counters_ptr, M, N, K, sharers, WARPGROUP: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr, HAS_TOKENS: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, PIECE_COLUMNS: gl.constexpr, LOOK: gl.constexpr, MMA: gl.constexpr, UNIT: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """A consumer: the sums of each of the program's segments, and its rows of out where it has them all."""
    p, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCKS * 128), gl.cdiv(K, 128)
    tiles = tiles_m * tiles_n
    whole = tiles // programs * programs
    left_steps = (tiles - whole) * steps
    done = 0
    for s in range(segments_of(p, programs, tiles, steps, sharers)):
        tile, _, count = segment_of(p, s, programs, tiles, steps, sharers)
        token_tile, row_tile = banded_tile(tile, tiles_m, tiles_n)
        row = (row_tile * 2 + WARPGROUP) * (BLOCKS * 64)
        accs = _consume(
            x_ring, w_ring, s_ring, z_ring, full, empty, zeros_ptr, rows_ptr, done, row, N, count, WARPGROUP, BLOCKS,
            STAGES, BITS, GROUP, HAS_ZEROS, BLOCK_M, PIECE_COLUMNS, LOOK, MMA, UNIT, WORDS,
        )  # fmt: skip
        done += count
        if count == steps:
            for block in gl.static_range(BLOCKS):
                _store(
                    accs[block], scales_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr, token_tile * BLOCK_M,
                    row + block * 64, M, N, GROUP != -1, HAS_TOKENS, HAS_BIAS, BLOCK_M, MMA,
                )  # fmt: skip
        else:
            left = tile - whole
            if last_of(
                accs, partials_ptr, counters_ptr, p, left, left_steps, steps, sharers, WARPGROUP, BLOCKS, BLOCK_M, MMA
            ):
                for block in gl.static_range(BLOCKS):
                    acc = sum_of(partials_ptr, left, left_steps, steps, sharers, block, WARPGROUP, BLOCKS, BLOCK_M, MMA)
                    _store(
                        acc, scales_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr, token_tile * BLOCK_M,
                        row + block * 64, M, N, GROUP != -1, HAS_TOKENS, HAS_BIAS, BLOCK_M, MMA,
                    )  # fmt: skip
                gl.store(counters_ptr + left * 2 + WARPGROUP, 0)


@gluon.jit(do_not_specialize=["M", "sharers"])
def scaled_kernel(
    x_desc,  # (M, K) fp16 in blocks of (BLOCK_M, 128)
    w_desc,  # (ceil(N / 16), 8 * units along K, 32) int32 in blocks of (BLOCK_N / 16, 2 * BITS, 32)
    s_desc,  # (G * N,) scales in blocks of BLOCK_N
    z_desc,  # (G * N,) zeros likewise; the scales' again unless HAS_ZEROS
    tiles_ptr,  # the words again, to prefetch them if PDL
    scales_ptr,  # (G, N); read only when GROUP is -1
    zeros_ptr,  # (G, N) likewise, unused unless HAS_ZEROS
    rows_ptr,  # (2, N) fp32: what the weights' rows are multiplied by, and its reciprocal; unused when GROUP is -1
    tokens_ptr,  # (M padded to BLOCK_M) fp32: reciprocal of what x's rows were multiplied by, unused unless HAS_TOKENS
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N)
    partials_ptr,  # (2 * programs, 2, BLOCKS * 64, BLOCK_M) fp32, unused unless tiles are shared
    counters_ptr,  # (left tiles * 2,) int32 zeros, likewise; zeros again afterwards
    M,
    N,
    K,
    sharers,  # programs that share the left tiles, at least as many as those; any positive number where there are none
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_TOKENS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    PIECE_COLUMNS: gl.constexpr,
    LOOK: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    UNIT: gl.constexpr,
    WORDS: gl.constexpr,
    PDL: gl.constexpr,
):
    """All segments of one of gl.num_programs(0) programs; num_warps is 4."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    BLOCK_N: gl.constexpr = BLOCKS * 128
    ROWS: gl.constexpr = STAGES * max(runs_of_step(GROUP), 1)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N // 16, 2 * BITS, 32], w_desc.layout)
    s_ring = gl.allocate_shared_memory(s_desc.dtype, [ROWS, BLOCK_N], s_desc.layout)
    z_ring = s_ring
    if HAS_ZEROS:
        z_ring = gl.allocate_shared_memory(z_desc.dtype, [ROWS, BLOCK_N], z_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    if PDL:
        p, programs, tiles_m, tiles_n = gl.program_id(0), gl.num_programs(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
        tile, first, _ = segment_of(p, 0, programs, tiles_m * tiles_n, gl.cdiv(K, 128), sharers)
        _, row_tile = banded_tile(tile, tiles_m, tiles_n)
        prefetch_weight(
            tiles_ptr, scales_ptr, zeros_ptr, row_tile * BLOCK_N, first, N, K, BITS // 4, GROUP, HAS_ZEROS, BLOCK_N
        )
        wait_for_previous()
        let_next_begin()
    # tuples of constexpr are written out in place: a variable would turn them into tensors
    gl.warp_specialize([
        (_produce, (
            x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, M, N, K, sharers, STAGES,
            BLOCK_M, BLOCK_N, BITS, GROUP, HAS_ZEROS,
        )),
        (_warpgroup, (
            x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr,
            partials_ptr, counters_ptr, M, N, K, sharers, 0, BLOCKS, STAGES, BITS, GROUP, HAS_ZEROS, HAS_TOKENS,
            HAS_BIAS, BLOCK_M, PIECE_COLUMNS, LOOK, MMA, UNIT, WORDS,
        )),
        (_warpgroup, (
            x_ring, w_ring, s_ring, z_ring, full, empty, scales_ptr, zeros_ptr, rows_ptr, tokens_ptr, bias_ptr, out_ptr,
            partials_ptr, counters_ptr, M, N, K, sharers, 1, BLOCKS, STAGES, BITS, GROUP, HAS_ZEROS, HAS_TOKENS,
            HAS_BIAS, BLOCK_M, PIECE_COLUMNS, LOOK, MMA, UNIT, WORDS,
        )),
    ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip

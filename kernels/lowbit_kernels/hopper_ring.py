"""The ring in shared memory of hopper_kernel.py and scaled_kernel.py: filling and reading it; how results are stored.

How these kernels, and int8_hopper_kernel.py's, begin before the one before them has ended: overlap.py, whose
prefetching is here once more, as Gluon wants a layout for it.

A slot holds a step of 128 columns: x (BLOCK_M, 128), BITS / 4 units of each 16 weight rows, scales and zeros of every
run of columns with a scale of its own (none when one scale is for the whole row). hopper_kernel.py says why this is
free of races. Importing this needs triton.experimental.gluon.
"""

# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import hopper_plan
from .gluon_names import async_load
from .hopper_operand import centre_of, factor_of, fragment_of, load_words
from .overlap import to_l2

__all__ = [
    "fill_slot",
    "piece_fragment",
    "piece_words",
    "prefetch",
    "prefetch_weight",
    "rows_of",
    "runs_of_step",
    "slot_of",
    "slot_phase",
    "store_rows",
]

runs_of_step = gluon.constexpr_function(hopper_plan.runs_of_step)
slot_of, slot_phase = gluon.jit(hopper_plan.slot_of), gluon.jit(hopper_plan.slot_phase)
_group_of = gluon.jit(hopper_plan.group_of)


@gluon.jit
def fill_slot(
    x_desc, w_desc, s_desc, z_desc, x_ring, w_ring, s_ring, z_ring, full, empty, i, step, token, row, N, K,
    STAGES: gl.constexpr, UNITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZEROS: gl.constexpr,
):  # fmt: skip
    """Ask for step ``step`` of a tile, the program's i-th, once its slot is free."""
    RUNS: gl.constexpr = runs_of_step(GROUP)
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes
        + w_desc.block_type.nbytes
        + RUNS * s_desc.block_type.nbytes
        + (RUNS * z_desc.block_type.nbytes if HAS_ZEROS else 0)
    )
    slot = slot_of(i, STAGES)
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), slot_phase(i, STAGES) ^ 1)
    mbarrier.expect(bar, BYTES)
    async_load(w_desc, [row // 16, step * UNITS * 8, 0], bar, w_ring.index(slot))
    async_load(x_desc, [token, step * 128], bar, x_ring.index(slot))
    for run in gl.static_range(RUNS):
        at = _group_of(step, run, K, GROUP, RUNS) * N + row
        async_load(s_desc, [at], bar, s_ring.index(slot * RUNS + run))
        if HAS_ZEROS:
            async_load(z_desc, [at], bar, z_ring.index(slot * RUNS + run))


@gluon.jit
def rows_of(ring, index, WARPGROUP: gl.constexpr, MMA: gl.constexpr):
    """Scales or zeros of 64 rows out of a run's BLOCK_N, as the lanes of the accumulator own them."""
    return ring.index(index).slice(WARPGROUP * 64, 64).load(gl.SliceLayout(1, MMA))


@gluon.jit
def piece_words(
    w_ring, slot, words, REP: gl.constexpr, PIECE: gl.constexpr, FIRST: gl.constexpr, BITS: gl.constexpr,
    COLUMNS: gl.constexpr, UNIT: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Words that piece PIECE of the REP-th 64 rows is made of: loaded where a unit begins, else still ``words``."""
    if PIECE * COLUMNS % (512 // BITS) == 0:
        words = load_words(w_ring, slot, FIRST + REP, PIECE * COLUMNS // (512 // BITS), UNIT, WORDS)
    return words


@gluon.jit
def piece_fragment(
    words, centre, factor, s_ring, z_ring, slot, row_zeros, row_factors, REP: gl.constexpr, PIECE: gl.constexpr,
    FIRST: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr,
    HAS_ZEROS: gl.constexpr, SCALED: gl.constexpr, MMA: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """That piece's fragment, and the centre and the factor (if SCALED) that the pieces of one run share.

    row_zeros: zeros of each 64 rows, where one is for the whole row. row_factors: of each 64 rows, if SCALED.
    """
    COLUMN: gl.constexpr = PIECE * COLUMNS
    RUNS: gl.constexpr = runs_of_step(GROUP)
    if not HAS_ZEROS:
        centre = words
    elif RUNS == 0:
        if COLUMN == 0:
            centre = centre_of(row_zeros[REP], words, BITS, DTYPE, WORDS)
    elif COLUMN * RUNS % 128 == 0:
        zeros = rows_of(z_ring, slot * RUNS + COLUMN * RUNS // 128, FIRST + REP, MMA)
        centre = centre_of(zeros, words, BITS, DTYPE, WORDS)
    if not SCALED:
        factor = words
    elif COLUMN * RUNS % 128 == 0:
        scales = rows_of(s_ring, slot * RUNS + COLUMN * RUNS // 128, FIRST + REP, MMA)
        factor = factor_of(scales, row_factors[REP], words, WORDS)
    first: gl.constexpr = COLUMN % (512 // BITS) // 32
    fragment = fragment_of(words, centre, factor, first, COLUMNS // 32, BITS, DTYPE, HAS_ZEROS, SCALED, MMA)
    return fragment, centre, factor


@gluon.jit
def store_rows(values, out_ptr, token, first, M, N):
    """values (64, tokens) of rows ``first ..`` and tokens ``token ..``, rounded once, to out (M, N).

    Through shared memory: a lane holds two rows of two tokens, and out wants rows side by side.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])  # 64 rows of four tokens per warp
    out = gl.convert_layout(values.to(out_ptr.dtype.element_ty), LAYOUT)
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    tokens = token + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    ptrs = out_ptr + tokens.to(gl.int64)[None, :] * N + rows[:, None]
    gl.store(ptrs, out, mask=(rows < N)[:, None] & (tokens < M)[None, :])


@gluon.jit
def prefetch(
    ptr, first_row, last_row, stride, first_column, last_column, ROWS: gl.constexpr, BYTES: gl.constexpr
):  # fmt: skip
    """overlap.py's, by the four warps that a program begins with."""
    LINES: gl.constexpr = max(1, BYTES // 128)
    LINE: gl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = min(LINES, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    rows = gl.minimum(first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), last_row).to(gl.int64)
    columns = gl.minimum(first_column + gl.arange(0, LINES, layout=gl.SliceLayout(0, LAYOUT)) * LINE, last_column)
    to_l2(ptr + rows[:, None] * stride + columns[None, :])


@gluon.jit
def prefetch_weight(
    tiles_ptr, scales_ptr, zeros_ptr, row, step, N, K, UNITS: gl.constexpr, GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What a program reads of the weight in its first steps of 128 columns, UNITS units each, from ``step`` on."""
    units = gl.cdiv(K * UNITS, 128)
    prefetch(
        tiles_ptr, row // 16, gl.cdiv(N, 16) - 1, units * 256, step * UNITS * 256, units * 256 - 1, BLOCK_N // 16, 4096
    )
    RUNS: gl.constexpr = runs_of_step(GROUP)
    WIDTH: gl.constexpr = scales_ptr.dtype.element_ty.primitive_bitwidth // 8
    if RUNS > 0:
        prefetch(scales_ptr, step * RUNS, K // GROUP - 1, N, row, N - 1, 4 * RUNS, BLOCK_N * WIDTH)
        if HAS_ZEROS:
            prefetch(zeros_ptr, step * RUNS, K // GROUP - 1, N, row, N - 1, 4 * RUNS, BLOCK_N)

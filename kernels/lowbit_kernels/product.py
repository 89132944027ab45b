"""The main loop of the Triton family: one (BLOCK_N, BLOCK_M) tile of ``W @ x.T`` over a share of the columns.

What it multiplies and in which order it adds: weight_only.py, whose kernel and grouped.py's call it. Where the loop
wants the sums of x from memory, run_sums.py adds them up beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import (
    end_of_run,
    load_x,
    of_run,
    right_operand,
    run_of_x,
    run_sums,
    step_scales,
    word_offsets,
    x_offsets,
)
from .unpack import unpack_columns

__all__ = ["tile_product"]


@triton.jit
def tile_product(
    x_ptr,  # (M, K)
    tiles_ptr,  # (ceil(N / 16), UNITS, 16, 16)
    scales_ptr,  # (G, N)
    zeros_ptr,  # (G, N), unused unless HAS_ZEROS
    sums_ptr,  # (steps * RUNS, M) fp32, unused unless SUMS is SUMS_LOADED
    token,  # the tile's first token and weight row, int64
    row,
    tokens_left,  # tokens of the tile that exist, int32; the others are zero
    split,  # which of the SPLIT_K shares of the columns
    M,
    N,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PART: tl.constexpr,  # columns of x that are loaded at once: a run, or for mma.sync all of the step
    RAW: tl.constexpr,
    PTX: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FOR_MMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(BLOCK_N, BLOCK_M) fp32; one unit of every weight row per step. Rows past N repeat others and mean nothing."""
    COLUMNS: tl.constexpr = 512 // BITS
    RUNS: tl.constexpr = COLUMNS // RUN
    SCALES: tl.constexpr = 1 if GROUP == -1 else RUNS
    LAST: tl.constexpr = 0 if GROUP == -1 else K // GROUP - 1
    STEPS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    MINE: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    EVEN: tl.constexpr = K % COLUMNS == 0
    MIDDLE: tl.constexpr = 1 << (BITS - 1)

    begin = split * MINE
    word_ptrs = tiles_ptr + word_offsets(row, N, UNITS, BLOCK_N) + begin.to(tl.int64) * 256
    x_ptrs = x_ptr + x_offsets(token, K, PART, BLOCK_M, FOR_MMA) + begin.to(tl.int64) * COLUMNS
    sums_ptrs = sums_ptr + begin.to(tl.int64) * RUNS * M + token + tl.arange(0, BLOCK_M)
    next_scales = step_scales(scales_ptr, begin, N, row, LAST, GROUP, RUN, SCALES, BLOCK_N)
    next_zeros = next_scales
    if HAS_ZEROS:
        next_zeros = step_scales(zeros_ptr, begin, N, row, LAST, GROUP, RUN, SCALES, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # a constant number of steps would be unrolled, which a short kernel pays for in instruction fetches; but the
    # interpreter wants one, and then does nothing in the steps past the last
    for i in tl.range(0, MINE if PTX == "" else tl.minimum(MINE, STEPS - begin), num_stages=STAGES):
        step = begin + i
        if PTX == "":
            words = tl.load(word_ptrs, mask=step < STEPS, other=0)
            tokens_left = tl.where(step < STEPS, tokens_left, 0)
        else:
            words = tl.load(word_ptrs, eviction_policy="evict_first")
        # one step ahead: their latency is the memory's, and they are too narrow for the asynchronous copies
        scales, zeros = next_scales, next_zeros
        if GROUP != -1:
            next_scales = step_scales(scales_ptr, step + 1, N, row, LAST, GROUP, RUN, SCALES, BLOCK_N)
            if HAS_ZEROS:
                next_zeros = step_scales(zeros_ptr, step + 1, N, row, LAST, GROUP, RUN, SCALES, BLOCK_N)
        first = load_x(x_ptrs, tokens_left, K - step * COLUMNS, PART, BLOCK_M, EVEN, FOR_MMA)
        for run in tl.static_range(RUNS):
            if PART == COLUMNS:
                x = run_of_x(first, run, RUNS, BLOCK_M)
            elif run == 0:
                x = first
            else:
                left = K - step * COLUMNS - run * RUN
                x = load_x(x_ptrs + run * RUN, tokens_left, left, RUN, BLOCK_M, EVEN, FOR_MMA)
            values = unpack_columns(words, run * (RUN // 32), RUN // 32, BITS, x.dtype, RAW, PTX, FOR_MMA)
            dot = tl.dot(values, right_operand(x, RUN, BLOCK_M, FOR_MMA), input_precision="ieee")
            if SUMS != 0:
                sums = run_sums(x, sums_ptrs + run * M, tokens_left, BLOCK_N, BLOCK_M, SUMS, FOR_MMA)
                if HAS_ZEROS:
                    dot -= (of_run(zeros, run if SCALES > 1 else 0, SCALES) + RAW)[:, None] * sums
                else:
                    dot -= (RAW + MIDDLE) * sums
            acc += dot * of_run(scales, run if SCALES > 1 else 0, SCALES)[:, None]
            if FOR_MMA and PART < COLUMNS and PTX != "":
                end_of_run()
        word_ptrs += 256
        x_ptrs += COLUMNS
        if SUMS == 3:
            sums_ptrs += RUNS * M
    return acc

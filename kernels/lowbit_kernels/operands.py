"""Device helpers of the fused kernels: where their operands lie, and how they come into the order of the tensor cores.

Offsets that grow with the size of a tensor are int64. Rows past the last are clamped, not masked, where what is read
for them is never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .releases import LANE_COLUMNS

__all__ = [
    "NO_SUMS",
    "SUMS_BY_ADDS",
    "SUMS_BY_DOT",
    "SUMS_LOADED",
    "end_of_run",
    "load_x",
    "of_run",
    "right_operand",
    "run_of_x",
    "run_sums",
    "scale_rows",
    "step_scales",
    "word_offsets",
    "x_offsets",
]

NO_SUMS, SUMS_BY_DOT, SUMS_BY_ADDS, SUMS_LOADED = 0, 1, 2, 3
"""Where S comes from: not needed; a dot with ones beside the weights' own; additions in the loop; a kernel before."""


@triton.jit
def scale_rows(ptr, group, N, first_row, BLOCK_N: tl.constexpr):
    """Elements [group, first_row .. first_row + BLOCK_N) of a (G, N) tensor; rows from N on repeat row N - 1.

    Two loads of the rows that one lane of the tensor core owns, r and r + 8 of 16, joined: with fewer elements than
    threads each, Triton loads them where they are needed instead of passing them through shared memory and a barrier.
    """
    half = tl.arange(0, BLOCK_N // 2)
    rows = first_row + half // 8 * 16 + half % 8
    base = ptr + group.to(tl.int64) * N
    low = tl.load(base + tl.minimum(rows, N - 1))
    high = tl.load(base + tl.minimum(rows + 8, N - 1))
    both = tl.reshape(tl.join(low, high), (BLOCK_N // 16, 8, 2))
    return tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK_N,))


@triton.jit
def _one_run(ptr, run, N, first_row, LAST: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr):
    return scale_rows(ptr, tl.minimum(run * RUN // GROUP, LAST), N, first_row, BLOCK_N)


@triton.jit
def _two_runs(ptr, i, N, first_row, LAST: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr):
    low = _one_run(ptr, i * 2, N, first_row, LAST, GROUP, RUN, BLOCK_N)
    return tl.join(low, _one_run(ptr, i * 2 + 1, N, first_row, LAST, GROUP, RUN, BLOCK_N))


@triton.jit
def _four_runs(ptr, i, N, first_row, LAST: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr):
    low = _two_runs(ptr, i * 2, N, first_row, LAST, GROUP, RUN, BLOCK_N)
    return tl.join(low, _two_runs(ptr, i * 2 + 1, N, first_row, LAST, GROUP, RUN, BLOCK_N))


@triton.jit
def step_scales(
    ptr, step, N, first_row, LAST: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of every run of one step: (BLOCK_N,), or with a trailing axis of 2 per doubling of RUNS.

    Run j of 2n is element (j % n, j // n): of_run takes the last axis off first. (No recursion: Triton 3.4.)
    """
    tl.static_assert(RUNS <= 8)
    if GROUP == -1:
        return scale_rows(ptr, step * 0, N, first_row, BLOCK_N)
    elif RUNS == 1:
        return _one_run(ptr, step, N, first_row, LAST, GROUP, RUN, BLOCK_N)
    elif RUNS == 2:
        return _two_runs(ptr, step, N, first_row, LAST, GROUP, RUN, BLOCK_N)
    elif RUNS == 4:
        return _four_runs(ptr, step, N, first_row, LAST, GROUP, RUN, BLOCK_N)
    else:
        low = _four_runs(ptr, step * 2, N, first_row, LAST, GROUP, RUN, BLOCK_N)
        return tl.join(low, _four_runs(ptr, step * 2 + 1, N, first_row, LAST, GROUP, RUN, BLOCK_N))


@triton.jit
def of_run(values, INDEX: tl.constexpr, RUNS: tl.constexpr):
    """Run INDEX of what step_scales gave: (BLOCK_N,) fp32."""
    for level in tl.static_range(3):
        if RUNS >> level > 1:
            low, high = tl.split(values)
            values = low if INDEX % (RUNS >> level) < (RUNS >> level) // 2 else high
    return values.to(tl.float32)


@triton.jit
def word_offsets(first_row, N, UNITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the words of rows first_row .. lie in unit 0, (BLOCK_N, 16) int64; rows past the last unit repeat it."""
    rows = tl.arange(0, BLOCK_N)
    unit = tl.minimum(first_row // 16 + rows // 16, (N - 1) // 16).to(tl.int64)
    return (unit * (UNITS * 256) + rows % 16 * 16)[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def x_offsets(first_token, K: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, FOR_MMA: tl.constexpr):
    """Offsets of tokens first_token .. and columns 0 .. RUN: (BLOCK_M, RUN), or for mma.sync (BLOCK_M * RUN / 8, 8).

    There a row is eight columns 8c .. of token 8v + u, and rows are in the order (v, c, u). Lanes copy rows one after
    the other into contiguous shared memory, where eight tokens of one c are 128 bytes: no bank conflict in copies nor
    in ldmatrix. In global memory four lanes copy 64 contiguous bytes of a token.
    """
    if FOR_MMA:
        tokens, columns = _rows_of_x(BLOCK_M, RUN)
        return (first_token + tokens).to(tl.int64) * K + columns
    else:
        tokens = (first_token + tl.arange(0, BLOCK_M)).to(tl.int64) * K
        return tokens[:, None] + tl.arange(0, RUN)[None, :]


@triton.jit
def _rows_of_x(BLOCK_M: tl.constexpr, RUN: tl.constexpr):
    """Token (rows, 1) and column (rows, 8) of the elements of a run of x for mma.sync."""
    rows = tl.arange(0, BLOCK_M * RUN // 8)[:, None]
    return rows // RUN * 8 + rows % 8, rows % RUN // 8 * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def load_x(
    ptrs, tokens_left, columns_left, RUN: tl.constexpr, BLOCK_M: tl.constexpr, EVEN: tl.constexpr, FOR_MMA: tl.constexpr
):
    """One run of x, zero where there is no token or column."""
    if FOR_MMA:
        tokens, columns = _rows_of_x(BLOCK_M, RUN)
        mask = tokens < tokens_left
        if not EVEN:
            mask = mask & (columns < columns_left)
    else:
        mask = tl.arange(0, BLOCK_M)[:, None] < tokens_left
        if not EVEN:
            mask = mask & (tl.arange(0, RUN)[None, :] < columns_left)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def right_operand(x, RUN: tl.constexpr, BLOCK_M: tl.constexpr, FOR_MMA: tl.constexpr):
    """A run of x as (RUN, BLOCK_M), its columns in the order in which unpack_columns gives the weights'."""
    if FOR_MMA:
        parts = tl.reshape(x, (BLOCK_M // 8, RUN // 16, 2, 8, 4, 2))  # token / 8, (i, b), u, token % 8, t, h
        FOUR: tl.constexpr = LANE_COLUMNS == 4
        return tl.reshape(tl.permute(parts, (1, 4, 2, 5, 0, 3) if FOUR else (1, 2, 4, 5, 0, 3)), (RUN, BLOCK_M))
    else:
        return tl.trans(x)


@triton.jit
def run_of_x(x, INDEX: tl.constexpr, RUNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Run INDEX of a whole step of x for mma.sync, rows (v, c, u) of eight columns: registers only."""
    for level in tl.static_range(3):
        if RUNS >> level > 1:
            parts = tl.reshape(x, (BLOCK_M // 8, 2, x.shape[0] // 2 // BLOCK_M, 8, 8))
            low, high = tl.split(tl.permute(parts, (0, 2, 3, 4, 1)))
            half = low if INDEX % (RUNS >> level) < (RUNS >> level) // 2 else high
            x = tl.reshape(half, (x.shape[0] // 2, 8))
    return x


@triton.jit
def end_of_run():
    """Nothing is loaded from shared memory before this that the program loads after it: an order for ptxas, which
    otherwise loads the x of all runs of a step first and spills it. In machine code a warp's barrier with itself.
    """
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def run_sums(
    x, sums_ptrs, tokens_left, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SUMS: tl.constexpr, FOR_MMA: tl.constexpr
):
    """S of one run in fp32, something that broadcasts to (BLOCK_N, BLOCK_M). See NO_SUMS .. SUMS_LOADED."""
    RUN: tl.constexpr = x.shape[0] * 8 // BLOCK_M if FOR_MMA else x.shape[1]
    if SUMS == 1:
        if FOR_MMA:  # ones are not joined: never four columns per lane. Nor is it right_operand's value where that is
            # the same: 3.8 stores a tensor that two dots share to shared memory again, another view of it not
            parts = tl.reshape(x, (BLOCK_M // 8, RUN // 8, 8, 8))  # token / 8, c, token % 8, column % 8
            x = tl.reshape(tl.permute(parts, (1, 3, 0, 2)), (RUN, BLOCK_M))
        else:
            x = tl.trans(x)
        return tl.dot(tl.full((BLOCK_N, RUN), 1.0, x.dtype), x, input_precision="ieee")
    elif SUMS == 2:
        tl.static_assert(not FOR_MMA, "sums by additions are for wgmma, which reads x from shared memory")
        return tl.sum(x.to(tl.float32), axis=1)[None, :]
    else:
        return tl.load(sums_ptrs, mask=tl.arange(0, BLOCK_M) < tokens_left, other=0.0)[None, :]

"""The main loop of the int8 matmuls and what turns its sums into numbers, for int8.py and grouped_int8.py.

What the tensors hold and why no order of the sums shows in them: int8.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["int8_product", "scaled"]


@triton.jit
def int8_product(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    token,  # the tile's first token and weight row, int64
    row,
    end,  # of the tokens: those from here on repeat the one before and mean nothing
    split,  # which of the SPLIT_K shares of the columns
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(BLOCK_N, BLOCK_M) int32 of ``W @ x.T``. Rows past N repeat the last one and mean nothing."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    MINE: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    columns = tl.arange(0, BLOCK_K)
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1)
    tokens = tl.minimum(token + tl.arange(0, BLOCK_M), end - 1)
    begin = split * MINE
    w_ptrs = w_ptr + (rows * K)[:, None] + columns[None, :] + begin.to(tl.int64) * BLOCK_K
    x_ptrs = x_ptr + (tokens * K)[:, None] + columns[None, :] + begin.to(tl.int64) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in tl.range(begin, tl.minimum(begin + MINE, STEPS), num_stages=STAGES):
        if K % BLOCK_K == 0:
            w, x = tl.load(w_ptrs), tl.load(x_ptrs)
        else:
            left = K - step * BLOCK_K
            w = tl.load(w_ptrs, mask=(columns < left)[None, :], other=0)
            x = tl.load(x_ptrs, mask=(columns < left)[None, :], other=0)
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def scaled(
    total, x_scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, token, row, end, N, HAS_ZEROS: tl.constexpr
):  # fmt: skip
    """Sums (BLOCK_N, BLOCK_M) int32 -> the products that they stand for, fp32. What is past end or N is not stored."""
    rows = tl.minimum(row + tl.arange(0, total.shape[0]), N - 1)
    tokens = tl.minimum(token + tl.arange(0, total.shape[1]), end - 1)
    if HAS_ZEROS:
        total -= tl.load(zero_ptr + rows).to(tl.int32)[:, None] * tl.load(sums_ptr + tokens)[None, :]
    by_token = total.to(tl.float32) * tl.load(x_scale_ptr + tokens)[None, :]
    return by_token * tl.load(w_scale_ptr + rows).to(tl.float32)[:, None]

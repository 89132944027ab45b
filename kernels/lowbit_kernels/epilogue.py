"""Output tiles of the fused kernels: which one a program has, how it is stored, and how programs share one.

``split_k`` programs that share the columns of a tile each store fp32 partial sums and count themselves; the last adds
them all in the order of k. So the result depends on no timing. The counters are int32 and zero between launches:
whoever is last sets its tile's back to zero.

A device has one tensor of counters, half for calls that run at once and half for calls that a CUDA graph captures, and
every call takes the next part of its half. A graph replays with the part it was captured with. Two calls share a part
only when more than COUNTERS / 2 tiles lie between them; two such graphs must not replay at the same time.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["COUNTERS", "last_to_arrive", "prepare", "store_tile", "sum_of_partials", "tile_origin", "workspace"]

COUNTERS = 1 << 20
"""Counters of a device: 4 MiB."""

_counters: dict[torch.device, Tensor] = {}
_next: dict[tuple[torch.device, bool], int] = {}
_one_at_a_time = threading.Lock()


def prepare(device: torch.device, *, reset: bool = False) -> None:
    """Make the counters of ``device``. A first call inside a CUDA graph's memory pool would come too late for this.

    Args:
        reset: set them to zero where there are some, whose memory may have been given away and taken back (vLLM's sleep
            mode). No kernel may be running.
    """
    if device.type != "cuda":
        return
    if device not in _counters:
        _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    elif reset:
        _counters[device].zero_()


def workspace(tiles: int, split_k: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums ``(tiles, split_k, block)`` fp32, not initialised, and ``tiles`` counters, zero.

    Raises:
        RuntimeError: a CUDA graph is captured before there are counters, which would be zero only once it replays.
    """
    partials = torch.empty(tiles, split_k, block, dtype=torch.float32, device=device)
    if device.type != "cuda":
        return partials, torch.zeros(tiles, dtype=torch.int32, device=device)
    captured = torch.cuda.is_current_stream_capturing()
    size = -(-tiles // 4) * 4  # 16 bytes: an aligned pointer is another compilation than one that is not
    with _one_at_a_time:
        if device not in _counters:
            if captured:
                raise RuntimeError(f"{device}: call lowbit_kernels.epilogue.prepare, or the matmul, before a capture")
            prepare(device)
        begin = _next.get((device, captured), 0)
        begin = 0 if begin + size > COUNTERS // 2 else begin
        _next[device, captured] = begin + size
    begin += COUNTERS // 2 if captured else 0
    return partials, _counters[device][begin : begin + tiles]


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token and first weight row of an output tile, int64. Sixteen token tiles share their weights in the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tile // (16 * tiles_n)
    height = tl.minimum(tiles_m - band * 16, 16)
    within = tile % (16 * tiles_n)
    return (band * 16 + within % height).to(tl.int64) * BLOCK_M, (within // height).to(tl.int64) * BLOCK_N


@triton.jit
def store_tile(acc, bias_ptr, out_ptr, token, row, M, N, HAS_BIAS: tl.constexpr):
    """acc (BLOCK_N, BLOCK_M) fp32, plus bias, rounded once, to out[token .., row ..]."""
    rows = row + tl.arange(0, acc.shape[0])
    tokens = token + tl.arange(0, acc.shape[1])
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    ptrs = out_ptr + tokens[:, None] * N + rows[None, :]
    tl.store(ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


@triton.jit
def last_to_arrive(acc, partials_ptr, counters_ptr, tile, split, SPLIT_K: tl.constexpr):
    """Publish this program's (BLOCK_N, BLOCK_M) partial sums; whether all SPLIT_K of its tile are published.

    Every thread's stores happen before the barrier, the barrier before the one thread's atomic, which releases them
    (release is cumulative) and acquires what the programs before it released (PTX ISA, "Memory Consistency Model").
    """
    place = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    base = partials_ptr + (tile.to(tl.int64) * SPLIT_K + split) * (acc.shape[0] * acc.shape[1])
    tl.store(base + place, acc)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == SPLIT_K - 1


@triton.jit
def sum_of_partials(
    partials_ptr, counters_ptr, tile, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """All partial sums of a tile, added in the order of k; its counter is 0 again for the next launch."""
    place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    base = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for split in tl.range(0, SPLIT_K):
        # past the first-level cache, which may hold what was here before
        total += tl.load(base + split * (BLOCK_N * BLOCK_M) + place, cache_modifier=".cg")
    tl.store(counters_ptr + tile, 0)
    return total

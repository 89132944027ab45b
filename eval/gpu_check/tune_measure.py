"""Times of every candidate tile on one problem, beside the dense layer; used by tune_main.py on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from check_correct import LIMITS, ROUNDED_WEIGHTS, CheckFailed
from check_layers import dense_weight, random_packed, reference, relative_rms
from check_measure import free_memory
from check_stats import copies_for, interleaved
from check_time import GraphTimer

from lowbit_kernels.tiles import Problem, Tile

__all__ = ["measure_case"]

CHECKED_TOKENS = 4
DEVICE = torch.device("cuda")


def measure_case(problem: Problem, tiles: Sequence[Tile], rounds: int) -> tuple[dict[Tile, float], float]:
    """Median seconds of each tile, and of the dense layer. CheckFailed when a tile's result is wrong."""
    torch.manual_seed(0)
    device, n, k = DEVICE, problem.n, problem.k
    first = random_packed(n, k, problem.bits, problem.group_size, problem.dtype, device)
    copies = copies_for(first.bytes(), free_memory() // 8)
    weights = [first]
    weights += [random_packed(n, k, problem.bits, problem.group_size, problem.dtype, device) for _ in range(copies - 1)]
    x = torch.randn(problem.m, k, device=device).to(problem.dtype)
    expected = reference(x[:CHECKED_TOKENS], first)
    timers: dict[str, Callable[[], float]] = {}
    for tile in tiles:
        error = relative_rms(first(x, tile=tile)[:CHECKED_TOKENS], expected)
        limit = LIMITS[problem.dtype] * (ROUNDED_WEIGHTS if tile.family == "dequant" else 1.0)
        if not error <= limit:
            raise CheckFailed(f"{problem}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}")
        timers[repr(tile)] = GraphTimer([partial(weight, x, tile=tile) for weight in weights])
    dense = [torch.cat([dense_weight(first, problem.dtype, slice(row, row + 4096)) for row in range(0, n, 4096)])]
    for _ in range(copies_for(2 * n * k, free_memory() // 4) - 1):
        dense.append((0.1 * torch.randn(n, k, device=device)).to(problem.dtype))
    timers["dense"] = GraphTimer([partial(torch.nn.functional.linear, x, weight) for weight in dense])
    timings = interleaved(timers, rounds)
    return {tile: timings[repr(tile)].median for tile in tiles}, timings["dense"].median

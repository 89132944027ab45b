"""Times of every candidate tile on one problem, beside the dense layer; used by tune_main.py on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from check_correct import CheckFailed, limit_of
from check_layers import dense_weight, random_packed, reference, relative_rms
from check_measure import free_memory
from check_stats import copies_for, interleaved
from check_time import GraphTimer

from lowbit_kernels.int8 import int8_matmul
from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.tiles import Problem, Tile

__all__ = ["measure_case", "measure_int8_case"]

CHECKED_TOKENS = 4
DEVICE = torch.device("cuda")


def measure_case(
    problem: Problem, tiles: Sequence[Tile], rounds: int, *, pdl: bool = False
) -> tuple[dict[Tile, float], float, float | None]:
    """Median seconds of each tile, and of the dense layer; and the fastest tile's with launches that overlap over its
    own without, if ``pdl`` and that tile is fused. CheckFailed when a tile's result is wrong.
    """
    torch.manual_seed(0)
    device, n, k = DEVICE, problem.n, problem.k
    first = random_packed(n, k, problem.bits, problem.group_size, problem.dtype, device)
    copies = copies_for(first.bytes(), free_memory() // 8)
    weights = [first]
    weights += [random_packed(n, k, problem.bits, problem.group_size, problem.dtype, device) for _ in range(copies - 1)]
    x = torch.randn(problem.m, k, device=device).to(problem.dtype)
    expected = reference(x[:CHECKED_TOKENS], first)

    def timer(tile: Tile) -> Callable[[], float]:
        error = relative_rms(first(x, tile=tile)[:CHECKED_TOKENS], expected)
        limit = limit_of(problem.dtype, expected.numel(), tile)
        if not error <= limit:
            raise CheckFailed(f"{problem}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}")
        return GraphTimer([partial(weight, x, tile=tile) for weight in weights])

    timers: dict[str, Callable[[], float]] = {repr(tile): timer(tile) for tile in tiles}
    dense = [torch.cat([dense_weight(first, problem.dtype, slice(row, row + 4096)) for row in range(0, n, 4096)])]
    for _ in range(copies_for(2 * n * k, free_memory() // 4) - 1):
        dense.append((0.1 * torch.randn(n, k, device=device)).to(problem.dtype))
    timers["dense"] = GraphTimer([partial(torch.nn.functional.linear, x, weight) for weight in dense])
    timings = interleaved(timers, rounds)
    times, over = {tile: timings[repr(tile)].median for tile in tiles}, None
    best = min(times, key=lambda tile: times[tile])
    if pdl and best.family != "dequant":
        both = interleaved({"alone": timers[repr(best)], "pdl": timer(replace(best, pdl=True))}, rounds)
        over = both["pdl"].median / both["alone"].median
    return times, timings["dense"].median, over


def measure_int8_case(
    m: int, n: int, k: int, dtype: torch.dtype, tiles: Sequence[Int8Tile], rounds: int
) -> dict[Int8Tile, float]:
    """Median seconds of the int8 matmul with each tile. CheckFailed when a tile's result is wrong."""
    torch.manual_seed(0)
    copies = copies_for(n * k, free_memory() // 4)
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE) for _ in range(copies)]
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=DEVICE)
    # sums of products of codes reach millions, which float16 has not
    x_scale, scales = (0.001 + 0.001 * torch.rand(size, device=DEVICE) for size in (m, n))
    rows = slice(0, CHECKED_TOKENS)
    expected = x[rows].double() @ weights[0].double().t() * x_scale[rows].double()[:, None] * scales.double()
    timers: dict[str, Callable[[], float]] = {}
    for tile in tiles:
        calls = [partial(int8_matmul, x, x_scale, w, scales, None, out_dtype=dtype, tile=tile) for w in weights]
        error = relative_rms(calls[0]()[rows], expected)
        limit = limit_of(dtype, expected.numel())
        if not error <= limit:
            raise CheckFailed(f"W8A8 {m}x{n}x{k}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}")
        timers[repr(tile)] = GraphTimer(calls)
    timings = interleaved(timers, rounds)
    return {tile: timings[repr(tile)].median for tile in tiles}

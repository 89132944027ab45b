"""Times of every candidate tile on one problem, beside the dense layer; used by tune_main.py on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from check_correct import CheckFailed, limit_of
from check_layers import dense_weight, random_packed, reference, relative_rms
from check_measure import free_memory
from check_stats import copies_for, interleaved
from check_time import GraphTimer

from lowbit_kernels.int8 import int8_matmul
from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.tiles import Problem, Tile

__all__ = ["Attempt", "measure_case", "measure_int8_case", "median_times"]

Attempt = Callable[..., "Callable[[], float] | None"]
"""Of a tile and what makes its timer, the timer; None where it raised, or did so in an earlier run."""

CHECKED_TOKENS = 4
DEVICE = torch.device("cuda")


def measure_case(
    problem: Problem, tiles: Sequence[Tile], rounds: int, attempt: Attempt, *, pdl: bool = False
) -> tuple[dict[Tile, float], float, float | None]:
    """Median seconds of each tile, and of the dense layer; and the fastest tile's with launches that overlap over its
    own without, if ``pdl`` and that tile is fused. Tiles whose result is wrong, or that cannot run, are left out.
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
            raise CheckFailed(f"relative RMS error {error:.2e}, allowed {limit:.1e}")
        return GraphTimer([partial(weight, x, tile=tile) for weight in weights])

    def dense_layer() -> Callable[[], float]:
        dense = [torch.cat([dense_weight(first, problem.dtype, slice(row, row + 4096)) for row in range(0, n, 4096)])]
        for _ in range(copies_for(2 * n * k, free_memory() // 4) - 1):
            dense.append((0.1 * torch.randn(n, k, device=device)).to(problem.dtype))
        return GraphTimer([partial(torch.nn.functional.linear, x, weight) for weight in dense])

    timers = _timers(tiles, timer, attempt)
    timings = interleaved({**timers, "dense": dense_layer()}, rounds)
    times = {tile: timings[repr(tile)].median for tile in tiles if repr(tile) in timings}
    best, over = min(times, key=lambda tile: times[tile], default=None), None
    if pdl and best is not None and best.family != "dequant":
        overlapping = replace(best, pdl=True)
        other = attempt(overlapping, partial(timer, overlapping))
        if other is not None:
            both = interleaved({"alone": timers[repr(best)], "pdl": other}, rounds)
            over = both["pdl"].median / both["alone"].median
    return times, timings["dense"].median, over


def measure_int8_case(
    m: int, n: int, k: int, dtype: torch.dtype, tiles: Sequence[Int8Tile], rounds: int, attempt: Attempt
) -> dict[Int8Tile, float]:
    """Median seconds of the int8 matmul with each tile. Tiles whose result is wrong, or cannot run, are left out."""
    torch.manual_seed(0)
    copies = copies_for(n * k, free_memory() // 4)
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE) for _ in range(copies)]
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=DEVICE)
    # sums of products of codes reach millions, which float16 has not
    x_scale, scales = (0.001 + 0.001 * torch.rand(size, device=DEVICE) for size in (m, n))
    rows = slice(0, CHECKED_TOKENS)
    expected = x[rows].double() @ weights[0].double().t() * x_scale[rows].double()[:, None] * scales.double()
    limit = limit_of(dtype, expected.numel())

    def timer(tile: Int8Tile) -> Callable[[], float]:
        calls = [partial(int8_matmul, x, x_scale, w, scales, None, out_dtype=dtype, tile=tile) for w in weights]
        error = relative_rms(calls[0]()[rows], expected)
        if not error <= limit:
            raise CheckFailed(f"relative RMS error {error:.2e}, allowed {limit:.1e}")
        return GraphTimer(calls)

    return median_times(tiles, timer, attempt, rounds)


def median_times(
    tiles: Sequence[Any], timer: Callable[[Any], Callable[[], float]], attempt: Attempt, rounds: int
) -> dict[Any, float]:
    """Median seconds of each tile whose timer could be made. ValueError when none could."""
    timers = _timers(tiles, timer, attempt)
    if not timers:
        raise ValueError(f"none of {len(tiles)} tiles can be measured")
    timings = interleaved(timers, rounds)
    return {tile: timings[repr(tile)].median for tile in tiles if repr(tile) in timings}


def _timers(
    tiles: Sequence[Any], timer: Callable[[Any], Callable[[], float]], attempt: Attempt
) -> dict[str, Callable[[], float]]:
    made = {repr(tile): attempt(tile, partial(timer, tile)) for tile in tiles}
    return {name: timer for name, timer in made.items() if timer is not None}

"""Timing on a GPU: graphs that rotate over cold weights, single cold calls, host time, the chip's own limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GraphTimer", "chip_limits", "cold_call", "host_seconds"]

GRAPH_S = 1.5e-3
"""About how long one replay should take, so that the events' own time does not matter."""
MOST_LAUNCHES = 400
QUEUED_CYCLES = 1_000_000
"""Clock cycles, about half a millisecond, that the GPU is kept busy while the host puts a graph on its queue: else the
time to launch the graph would count, divided by fewer launches the slower the contestant's own launches are."""


class GraphTimer:
    """A CUDA graph of calls in a rotation: call i uses weight i modulo their number.

    Args:
        calls: one per copy of the weight; together they touch more memory than the L2 holds.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        for call in calls[:2]:  # compile, allocate workspaces, choose algorithms
            call()
        self._capture(calls, 1)
        rounds = max(1, min(MOST_LAUNCHES, int(GRAPH_S / max(self(), 1e-7))) // len(calls))
        if rounds > 1:
            self._capture(calls, rounds)

    def __call__(self) -> float:
        """Seconds per launch of one replay."""
        torch.cuda._sleep(QUEUED_CYCLES)
        return _seconds(self._graph.replay) / self.launches

    def _capture(self, calls: Sequence[Callable[[], object]], rounds: int) -> None:
        """Capture so many rotations and replay them once, which uploads the graph."""
        torch.cuda.synchronize()
        self.launches = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        # results are not kept: the pool reuses their memory, as a model's decoding does
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        self._graph.replay()
        torch.cuda.synchronize()


def cold_call(call: Callable[[], object], repeats: int = 11) -> float:
    """Median seconds of one call on its own, with the L2 full of something else before each."""
    junk = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    call()
    seconds = []
    for _ in range(repeats):
        junk.bitwise_not_()
        torch.cuda.synchronize()
        seconds.append(_seconds(call))
    return statistics.median(seconds)


def host_seconds(call: Callable[[], object], calls: int = 300, rounds: int = 5) -> float:
    """Median host seconds to issue one call: the clock stops before the GPU is waited for."""
    call()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(seconds)


def chip_limits(n: int = 8192) -> dict[str, float]:
    """Bytes per second of a copy (read and written), bf16 FLOP/s and int8 OP/s of the libraries, on random data.

    Args:
        n: rows and columns of the matrices; the copy is of 64 of them, 4 GiB at 8192.
    """
    bandwidth = _copy_bandwidth(64 * n * n)
    a, b = (torch.randn(n, n, device="cuda").to(torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / _median_seconds(lambda: a @ b)
    limits = {"copy_bytes_per_s": bandwidth, "bf16_flops": bf16}
    p, q = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    limits["int8_ops"] = 2 * n**3 / _median_seconds(lambda: torch._int_mm(p, q.t()))
    return limits


def _copy_bandwidth(size: int) -> float:
    free = torch.cuda.mem_get_info()[0]
    source = torch.randint(0, 256, (min(size, free // 4),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))


def _median_seconds(call: Callable[[], Tensor], repeats: int = 12) -> float:
    for _ in range(3):
        call()
    return statistics.median(_seconds(call) for _ in range(repeats))


def _seconds(call: Callable[[], object]) -> float:
    """The GPU's time for what one call puts on its queue."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3

"""Statistics of repeated measurements, and how a case is measured so that they mean something. Plain Python, no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["COLD_BYTES", "Timing", "copies_for", "geometric_mean", "interleaved", "median", "quantile", "ratio_text"]

COLD_BYTES = 128 << 20
"""Bytes of distinct weights that a rotation walks over before it comes back: more than twice the largest L2 (60 MB)."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call over rounds.

    Attributes:
        median, low, high: of the rounds; low and high are the 20th and 80th percentile.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """ValueError for no rounds, or a time that is not a positive number."""
        if not seconds or not all(0 < value < math.inf for value in seconds):
            raise ValueError(f"a timing needs rounds of positive seconds, got {list(seconds)}")
        return cls(median(seconds), quantile(seconds, 0.2), quantile(seconds, 0.8), len(seconds))


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values. ValueError when there are none or q is not in [0, 1]."""
    if not values or not 0 <= q <= 1:
        raise ValueError(f"a quantile needs values and 0 <= q <= 1, got {len(values)} values and q = {q}")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def geometric_mean(values: Sequence[float]) -> float:
    """ValueError unless there are values and all are positive."""
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean needs positive values, got {list(values)}")
    return math.exp(sum(map(math.log, values)) / len(values))


def copies_for(weight_bytes: int, free_bytes: int, cold: int = COLD_BYTES) -> int:
    """Distinct weights to rotate over: together more than ``cold`` bytes, at least 2, as memory allows.

    Raises:
        ValueError: not even two fit.
    """
    wanted = max(2, cold // max(1, weight_bytes) + 1)
    possible = free_bytes // max(1, weight_bytes)
    if possible < 2:
        raise ValueError(f"two weights of {weight_bytes} bytes do not fit in {free_bytes} free bytes")
    return min(wanted, possible)


def interleaved(run: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Time contestants in turn, A B C A B C ..., every other round backwards, so that drifting clocks hit all alike.

    Args:
        run: by name, a function that runs once and returns its seconds.
        rounds: at least 5.
    """
    if rounds < 5:
        raise ValueError(f"a median needs at least 5 rounds, got {rounds}")
    names, seconds = list(run), {name: [] for name in run}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(run[name]())
    return {name: Timing.of(values) for name, values in seconds.items()}


def ratio_text(ours: float | None, theirs: float | None) -> str:
    """``theirs / ours`` as a speed-up such as ``3.21x``; ``-`` when one of them is missing."""
    if ours is None or theirs is None:
        return "-"
    return f"{theirs / ours:.2f}x"

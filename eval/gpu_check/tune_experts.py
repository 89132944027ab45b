"""Times of the experts' tiles, for scripts/tune: one mixture's first projection, by the rows an expert has in the mean.

A case rotates over several random routings of the same weights, all experts among them, so that the L2 holds few of the
words that a call reads. Every tile's result is compared with float64, on the rows of the experts with the fewest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from check_correct import CheckFailed, limit_of
from check_layers import relative_rms
from check_store import Store
from check_time import GraphTimer
from check_warm import Job
from torch import Tensor
from tune_measure import Attempt, median_times
from tune_table import shipped_tiles

from lowbit_kernels.grouped import grouped_matmul
from lowbit_kernels.grouped_int8 import grouped_int8_matmul, grouped_int8_reference
from lowbit_kernels.grouped_tiles import MIN_ARCH
from lowbit_kernels.int8_tiles import Int8Tile, fitting
from lowbit_kernels.layout import tiles_shape
from lowbit_kernels.tiles import Problem, Tile, fits
from lowbit_kernels.weight_only import weight_only_reference

__all__ = ["BUCKETS", "Attempt", "ExpertCase", "expert_cases", "expert_rows"]

EXPERTS, TOP, N, K = 128, 8, 1536, 2048
"""Gate and up of Qwen3-30B-A3B: 128 experts of 2 x 768 rows and 2048 columns, 8 for a token (its config.json)."""
BUCKETS: tuple[tuple[int, float | None], ...] = ((1, 0.25), (16, 1), (64, 4), (256, 16), (1024, 64), (4096, None))
"""Tokens that are measured, and the most rows per expert in the mean that the fastest tile is then for."""
WIDTHS: tuple[int | str, ...] = (4, 8, "w8a8")
GROUP = 128
ROUTINGS = 16
ROUNDS = 5
CHECKED = 4
"""Experts whose rows are compared with float64."""
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class ExpertCase:
    """One width and number of tokens, and the tiles to measure on it; of W8A8 Int8Tiles."""

    bits: int | str
    tokens: int
    tiles: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, str]:
        """Its part and name in the records."""
        return "tune experts", f"experts {self.bits} {self.tokens} tokens"

    def jobs(self, arch: int) -> list[Job]:
        """What it launches, to compile that ahead."""
        bits, group = (8, -1) if self.bits == "w8a8" else (int(self.bits), GROUP)
        return [Job(Problem(16, 64, K, bits, group, self.dtype), tile, EXPERTS) for tile in self.tiles]

    def measure(self, store: Store, attempt: Attempt) -> str:
        """Measure and keep; a line about it. ``attempt`` as for tune_main.Case."""
        attempted = partial(attempt, self.key[1])
        seconds = (_measure_int8 if self.bits == "w8a8" else _measure_packed)(self, attempted)
        times = [[list(vars(tile).values()), time] for tile, time in seconds.items()]
        store.add(*self.key, {"bits": self.bits, "tokens": self.tokens, "times": times})
        best = min(seconds, key=lambda tile: seconds[tile])
        return f"{self.key[1]}: {best} {seconds[best] * 1e6:.1f} us"


def expert_cases(arch: int, dtype: torch.dtype) -> list[ExpertCase]:
    """In the order of measuring, with every tile that fits and may win; none where the kernels do not run."""
    found = []
    for bits in WIDTHS if arch >= MIN_ARCH else ():
        for tokens, _ in BUCKETS:
            widest = max(16, 4 * tokens * TOP // EXPERTS)  # of more than this three quarters would be padding
            tiles: list[Any]
            if bits == "w8a8":
                tiles = [tile for tile in fitting(arch) if tile.block_m <= widest]
            else:
                problem = Problem(tokens * TOP, N, K, int(bits), GROUP, dtype)
                tiles = [t for t in shipped_tiles(arch, ("triton",), problem, fits) if t.block_m <= widest]
            found.append(ExpertCase(bits, tokens, tuple(tiles), dtype))
    return found


def expert_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table's lines: of every width with all buckets the fastest tiles."""
    best: dict[int | str, dict[int, list[Any]]] = {}
    for record in records:
        fields = min(record["times"], key=lambda pair: (pair[1], repr(pair[0])))[0]
        best.setdefault(record["bits"], {})[record["tokens"]] = fields[:6]  # no family of W8A8's, no pdl
    lines: list[dict[str, Any]] = []
    for bits, of_width in best.items():
        if len(of_width) < len(BUCKETS):
            continue
        first = len(lines)
        for tokens, bucket in BUCKETS:
            line = {"bits": bits, "m": bucket, "tile": of_width[tokens]}
            if len(lines) > first and lines[-1]["tile"] == line["tile"]:
                lines[-1]["m"] = bucket
            else:
                lines.append(line)
    return lines


def _routings(tokens: int) -> list[Tensor]:
    """Ends of the experts' rows, (EXPERTS,) int32, of so many random routings of ``tokens`` tokens."""
    found = []
    for _ in range(ROUTINGS):
        chosen = torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP).indices
        found.append(torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).to(torch.int32))
    return found


def _few(ends: Tensor) -> list[tuple[int, slice]]:
    """(expert, rows) of the CHECKED experts with the fewest rows, but some."""
    bounds = [0, *ends.tolist()]
    spans = [(e, slice(bounds[e], bounds[e + 1])) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]
    return sorted(spans, key=lambda span: (span[1].stop - span[1].start, span[0]))[:CHECKED]


def _measure_packed(case: ExpertCase, attempt: Callable[..., Any]) -> dict[Any, float]:
    torch.manual_seed(0)
    bits = int(case.bits)
    words = torch.randint(
        -(2**31), 2**31, (EXPERTS, *tiles_shape(N, K, bits)), dtype=torch.int32, device=DEVICE
    )  # N and K are whole units: no padding that would have to be zero
    scales = (0.01 + 0.02 * torch.rand(EXPERTS, K // GROUP, N, device=DEVICE)).to(case.dtype)
    x = torch.randn(case.tokens * TOP, K, device=DEVICE).to(case.dtype)

    def call(ends: Tensor, tile: Tile) -> Tensor:
        return grouped_matmul(x, ends, words, scales, None, None, bits=bits, group_size=GROUP, n=N, tile=tile)

    def exact(e: int, rows: slice) -> Tensor:
        return weight_only_reference(x[rows], words[e], scales[e], None, None, bits=bits, group_size=GROUP)

    return _timed(case, attempt, call, exact)


def _measure_int8(case: ExpertCase, attempt: Callable[..., Any]) -> dict[Any, float]:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (EXPERTS, N, K), dtype=torch.int8, device=DEVICE)
    scales = 0.001 + 0.001 * torch.rand(EXPERTS, N, device=DEVICE)
    x = torch.randint(-128, 128, (case.tokens * TOP, K), dtype=torch.int8, device=DEVICE)
    x_scale = 0.001 + 0.001 * torch.rand(len(x), device=DEVICE)

    def call(ends: Tensor, tile: Int8Tile) -> Tensor:
        return grouped_int8_matmul(x, x_scale, ends, codes, scales, None, out_dtype=case.dtype, tile=tile)

    def exact(e: int, rows: slice) -> Tensor:
        ends = torch.tensor([rows.stop - rows.start], dtype=torch.int32, device=DEVICE)
        one = slice(e, e + 1)
        return grouped_int8_reference(x[rows], x_scale[rows], ends, codes[one], scales[one], None)

    return _timed(case, attempt, call, exact)


def _timed(
    case: ExpertCase,
    attempt: Callable[..., Any],
    call: Callable[[Tensor, Any], Tensor],
    exact: Callable[[int, slice], Tensor],
) -> dict[Any, float]:
    """Median seconds of each tile, after its result has been compared with float64."""
    routings = _routings(case.tokens)
    few = _few(routings[0])
    expected = torch.cat([exact(e, rows) for e, rows in few])
    limit = limit_of(case.dtype, expected.numel())

    def timer(tile: Any) -> Callable[[], float]:
        out = call(routings[0], tile)
        error = relative_rms(torch.cat([out[rows] for _, rows in few]), expected)
        if not error <= limit:
            raise CheckFailed(f"relative RMS error {error:.2e}, allowed {limit:.1e}")
        return GraphTimer([partial(call, ends, tile) for ends in routings])

    return median_times(case.tiles, timer, attempt, ROUNDS)

"""The measurements: for each linear and number of tokens, lowbit's kernels, cuBLAS in bf16 and the peers in turn.

Every contestant runs in a CUDA graph that rotates over more than 128 MiB of its own weights, so that the L2 never holds
what the next call reads. lowbit's result on the measured weight is compared with float64 in the same case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from check_atomics import atomic_matmul, has_atomic_form
from check_correct import LIMITS, CheckFailed, family_tile, limit_of
from check_device import clocks
from check_layers import LAYERS, TINY_LAYERS, Linear, Packed, dense_weight, random_packed, reference, relative_rms
from check_peers import PEERS, Unavailable, peer_version
from check_stats import COLD_BYTES, copies_for, interleaved
from check_time import GraphTimer
from check_watch import raise_if_lost
from torch import Tensor

from lowbit_kernels.dispatch import choose
from lowbit_kernels.int8_tiles import HOPPER_TILES, Int8Tile, fill_split, pick_tile
from lowbit_kernels.releases import gluon_missing
from lowbit_kernels.tiles import FAMILIES, HOPPER, PDL_ARCH, Problem, Tile

__all__ = ["MODES", "TOKENS", "Point", "free_memory", "measure", "points", "work_of_points"]

MODES = ("w4a16", "w8a16", "w8a8")
TOKENS = (1, 16, 64, 256, 4096)
GROUP = {"w4a16": 128, "w8a16": 128}
ROUNDS = 7
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
PDL_TOKENS = 256
"""The most tokens for which launches that overlap are measured beside those that do not."""
CHECKED_TOKENS = 8
"""Rows of the result that are compared with float64 in a measured case."""


@dataclass(frozen=True)
class Point:
    """One case: a mode, a layer's linear, a number of tokens; bytes of weights to rotate over."""

    mode: str
    layer: str
    linear: Linear
    m: int
    cold: int = COLD_BYTES

    @property
    def case(self) -> str:
        """Its name in the records."""
        return f"{self.mode} {self.layer} {self.linear.name} M={self.m}"


def points(modes: tuple[str, ...] = MODES, *, tiny: bool = False) -> Iterator[Point]:
    """Every case: what matters most first, should time run out. ``tiny``: layers that take no time, few tokens."""
    layers, tokens, cold = (TINY_LAYERS, TOKENS[:3], 0) if tiny else (LAYERS, TOKENS, COLD_BYTES)
    for mode in modes:
        for layer in ("70b", "8b"):
            for m in tokens:
                for linear in layers[layer]:
                    yield Point(mode, layer, linear, m, cold)


def measure(
    point: Point, arch: int, gpu: str, peers: tuple[str, ...], without: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one case; the record's content. CheckFailed when a lowbit result is wrong."""
    torch.manual_seed(point.linear.n * 31 + point.linear.k)
    n, k, m = point.linear.n, point.linear.k, point.m
    x = torch.randn(m, k, device=DEVICE).to(DTYPE)
    if point.mode == "w8a8":
        found = _int8_contestants(x, n, k, point.cold, arch, gpu, without)
    else:
        found = _weight_only_contestants(point, x, arch, gpu, without, say)
    timers: dict[str, Callable[[], float]] = {name: GraphTimer(calls) for name, calls in found.runs.items()}
    told: dict[str, str] = {}
    if point.mode != "w8a8":
        of_peers, told = _peers(point, x, peers, say)
        timers |= of_peers
    timings = interleaved(timers, ROUNDS)
    for name, other in found.same.items():
        timings[name], found.errors[name], found.tiles[name] = (
            part[other] for part in (timings, found.errors, found.tiles)
        )
    return {
        "mode": point.mode,
        "layer": point.layer,
        "linear": point.linear.name,
        "m": m,
        "n": n,
        "k": k,
        "bytes": found.moved + 2 * m * (n + k),
        "flops": 2 * m * n * k,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "spread": {name: f"{timing.low * 1e6:.2f}..{timing.high * 1e6:.2f}" for name, timing in timings.items()},
        "tiles": found.tiles,
        "errors": found.errors,
        "peers": told,
        "rounds": ROUNDS,
        "clocks": clocks(),
    }


def work_of_points(
    modes: Iterable[str], arch: int, gpu: str, *, tiny: bool = False
) -> Iterator[tuple[Problem, Tile | Int8Tile, bool]]:
    """Problem and tile of every lowbit launch, and whether it is that with atomics, to compile them ahead."""
    for point in points(tuple(mode for mode in modes if mode in MODES), tiny=tiny):
        n, k, m = point.linear.n, point.linear.k, point.m
        if point.mode == "w8a8":
            problem = Problem(m, n, k, 8, -1, DTYPE)
            yield from ((problem, tile, False) for tile in _int8_tiles(m, n, k, arch, gpu).values())
            continue
        problem = Problem(m, n, k, 4 if point.mode == "w4a16" else 8, GROUP[point.mode], DTYPE)
        tiles = _lowbit_tiles(problem, arch, gpu)
        yield from ((problem, tile, False) for tile in tiles.values())
        if tiles["lowbit"].family == "triton" and tiles["lowbit"].split_k > 1:
            yield problem, tiles["lowbit"], True


@dataclass
class _Contestants:
    """By name: calls, one per copy of the weight; the tile; the error of its result. ``same``: names of what is
    measured under another name; ``moved``: bytes of the weight.
    """

    moved: int
    runs: dict[str, list[Callable[[], object]]] = field(default_factory=dict)
    tiles: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def _weight_only_contestants(
    point: Point, x: Tensor, arch: int, gpu: str, without: tuple[str, ...], say: Callable[[str], None]
) -> _Contestants:
    bits, n, k = (4 if point.mode == "w4a16" else 8), point.linear.n, point.linear.k
    group, device = GROUP[point.mode], DEVICE
    problem = Problem(point.m, n, k, bits, group, DTYPE)
    first = random_packed(n, k, bits, group, DTYPE, device)
    weights = [first]
    for _ in range(copies_for(first.bytes(), free_memory() // 8, point.cold) - 1):
        weights.append(random_packed(n, k, bits, group, DTYPE, device))
    found, measured = _Contestants(first.bytes()), {}
    for name, tile in _lowbit_tiles(problem, arch, gpu).items():
        if tile.family in without or (tile.pdl and "pdl" in without):
            if name == "lowbit":
                say(f"{point.case}: the table's tile {tile} is left out: no figure for lowbit")
            continue
        if tile in measured:
            found.same[name] = measured[tile]
            continue
        measured[tile] = name
        found.errors[name] = _checked(first, x, tile, f"{point.case}, {name}")
        found.runs[name] = [_bound(packed, x, tile) for packed in weights]
        found.tiles[name] = str(tile)
    chosen = choose(problem, arch, gpu_name=gpu, hopper=gluon_missing() is None)
    if has_atomic_form(first, point.m, chosen):
        name, sums = "lowbit with atomics", torch.zeros(point.m, n, dtype=torch.float32, device=device)
        found.errors[name] = _atomic_error(first, x, chosen, f"{point.case}, {name}")
        found.runs[name] = [partial(atomic_matmul, packed, x, chosen, sums) for packed in weights]
        found.tiles[name] = str(chosen)
    found.runs["cublas bf16"] = _cublas(first, x, point.cold)
    return found


def _peers(
    point: Point, x: Tensor, peers: tuple[str, ...], say: Callable[[str], None]
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Timers of the peers that run here; and of each its version, or why it is not measured.

    Raises:
        ContextLost: a peer left the device in a state that nothing else can be measured in.
    """
    bits, n, k = (4 if point.mode == "w4a16" else 8), point.linear.n, point.linear.k
    problem = Problem(point.m, n, k, bits, GROUP[point.mode], DTYPE)
    timers: dict[str, Callable[[], float]] = {}
    told = {}
    for name in peers:
        try:
            calls = PEERS[name](problem, copies_for(n * k * bits // 8, free_memory() // 8, point.cold))
            calls[0](x).sum().item()  # run it to its end: a fault on the device shows here
            timers[name] = GraphTimer([partial(call, x) for call in calls])
            told[name] = peer_version(name)
        except Unavailable as reason:
            told[name] = f"not measured: {reason}"
            say(f"{point.case}: {name}: {reason}")
        except Exception as error:  # a peer that breaks must not end the run, but must be seen
            told[name] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
            say(f"{point.case}: {name} failed: {type(error).__name__}: {str(error)[:200]}")
            raise_if_lost(f"{name} in {point.case}")
    return timers, told


def _lowbit_tiles(problem: Problem, arch: int, gpu: str) -> dict[str, Tile]:
    """The dispatcher's choice, and each family's most promising tile where it is another one."""
    chosen = choose(problem, arch, gpu_name=gpu, hopper=gluon_missing() is None)
    found = {"lowbit": chosen}
    for family in FAMILIES:
        if family in HOPPER and arch != 90:
            continue
        tile = family_tile(family, problem, arch, _multiprocessors())
        if tile is not None:
            found[f"lowbit {family}"] = tile
    if arch >= PDL_ARCH and chosen.family != "dequant" and problem.m <= PDL_TOKENS:
        found["lowbit without pdl" if chosen.pdl else "lowbit pdl"] = replace(chosen, pdl=not chosen.pdl)
    return found


def _checked(packed: Packed, x: Tensor, tile: Tile, where: str) -> float:
    out = packed(x, tile=tile)
    rows = slice(0, CHECKED_TOKENS)
    error = relative_rms(out[rows], reference(x[rows], packed))
    limit = limit_of(x.dtype, out[rows].numel(), tile)
    if not error <= limit or not bool(out.isfinite().all()):
        raise CheckFailed(f"{where}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}: not measured")
    return error


def _bound(packed: Packed, x: Tensor, tile: Tile) -> Callable[[], object]:
    return lambda: packed(x, tile=tile)


def _atomic_error(packed: Packed, x: Tensor, tile: Tile, where: str) -> float:
    rows = slice(0, CHECKED_TOKENS)
    error = relative_rms(atomic_matmul(packed, x, tile)[rows], reference(x[rows], packed))
    if not error <= LIMITS[DTYPE]:
        raise CheckFailed(f"{where}: relative RMS error {error:.2e}: nothing to compare with")
    return error


def _cublas(first: Packed, x: Tensor, cold: int) -> list[Callable[[], object]]:
    n, k = first.n, first.k
    parts = [dense_weight(first, DTYPE, slice(row, row + 4096)) for row in range(0, n, 4096)]
    dense = [torch.cat(parts)]
    del parts
    for _ in range(copies_for(2 * n * k, free_memory() // 4, cold) - 1):
        dense.append((0.1 * torch.randn(n, k, device=DEVICE)).to(DTYPE))
    return [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in dense]


def _int8_contestants(
    x: Tensor, n: int, k: int, cold: int, arch: int, gpu: str, without: tuple[str, ...]
) -> _Contestants:
    from lowbit_kernels.int8 import int8_linear, int8_matmul
    from lowbit_kernels.int8_quantize import quantize_activations

    copies = copies_for(n * k, free_memory() // 8, cold)
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE) for _ in range(copies)]
    scale = 0.01 + 0.01 * torch.rand(n, device=DEVICE)

    def ours(weight: Tensor, tile: Int8Tile | None = None) -> Tensor:
        out: Tensor = int8_linear(x, weight, scale, None, None, None, tile=tile)
        return out

    def alone(weight: Tensor, tile: Int8Tile | None = None) -> Tensor:
        return int8_matmul(x_q, x_scale, weight, scale, None, out_dtype=DTYPE, tile=tile)

    x_q, x_scale, _ = quantize_activations(x)
    rows = slice(0, CHECKED_TOKENS)
    exact = x_q[rows].double() @ weights[0].double().t() * x_scale[rows].double().view(-1, 1) * scale.double()
    found = _Contestants(n * k + 4 * n)
    runs = found.runs
    for name, tile in _int8_tiles(x.shape[0], n, k, arch, gpu).items():
        if tile.family in without or (tile.pdl and "pdl" in without):
            continue
        call = partial(alone if name.endswith("alone") else ours, tile=tile)
        found.errors[name], found.tiles[name] = relative_rms(call(weights[0])[rows], exact), str(tile)
        if not found.errors[name] <= limit_of(DTYPE, exact.numel()):
            raise CheckFailed(f"W8A8 {tuple(x.shape)} x {n}, {tile}: relative RMS error {found.errors[name]:.2e}")
        runs[name] = [partial(call, weight) for weight in weights]
    if x.shape[0] > 16:  # torch._int_mm refuses fewer rows
        runs["torch._int_mm"] = [lambda weight=weight: torch._int_mm(x_q, weight.t()) for weight in weights]
    dense = [
        (0.1 * torch.randn(n, k, device=DEVICE)).to(DTYPE)
        for _ in range(copies_for(2 * n * k, free_memory() // 4, cold))
    ]
    runs["cublas bf16"] = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in dense]
    return found


def _int8_tiles(m: int, n: int, k: int, arch: int, gpu: str) -> dict[str, Int8Tile]:
    """The dispatcher's choice, it without or with overlap, and a tile in Gluon; "alone" is without quantization."""
    chosen = pick_tile(m, n, k, arch, gpu, gluon_missing() is None)
    found = {"lowbit": chosen, "lowbit int8 matmul alone": chosen}
    if arch >= PDL_ARCH and m <= PDL_TOKENS:
        found["lowbit without pdl" if chosen.pdl else "lowbit pdl"] = replace(chosen, pdl=not chosen.pdl)
    if arch == 90 and k % 16 == 0:
        found["lowbit gluon int8 matmul alone"] = _int8_hopper_tile(m, n, k)
    return found


def _int8_hopper_tile(m: int, n: int, k: int) -> Int8Tile:
    """The narrowest Gluon tile that holds all tokens, or the widest."""
    tile = next((tile for tile in HOPPER_TILES if tile.block_m >= m), HOPPER_TILES[-1])
    return replace(tile, split_k=fill_split(tile, m, n, k, _multiprocessors()))


def _multiprocessors() -> int:
    if not torch.cuda.is_available():  # planning on another machine
        return 132
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def free_memory() -> int:
    """Bytes that can be allocated on the GPU now."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]

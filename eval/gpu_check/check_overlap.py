"""Launches that begin while the one before ends (programmatic dependent launch): chains where each reads the last's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from check_correct import Check, CheckFailed, family_tile
from check_layers import random_packed
from torch import Tensor

from lowbit_kernels.int8_tiles import HOPPER_TILES, Int8Tile, pick_tile
from lowbit_kernels.tiles import FAMILIES, HOPPER, PDL_ARCH, Problem, Tile

__all__ = ["overlap_checks", "overlap_work"]

SIZE = 4096
"""Rows and columns of each weight, so that the result of one is the input of the next."""

LINKS = 12
"""Launches in a row, each reading what the one before wrote; their memory is given back and taken again."""
REPLAYS = 20

Chain = Callable[[Tensor, bool], Tensor]


def overlap_checks(
    device: torch.device, dtype: torch.dtype, arch: int, *, tiny: bool, without: Sequence[str] = ()
) -> Iterator[Check]:
    """One chain for each fused family, at few and at many tokens, and for W8A8; none where the GPU has no PDL."""
    size = 256 if tiny else SIZE
    for m, tile in [] if "pdl" in without else _tiles(dtype, arch, size, tiny):
        if tile.family in without:
            continue
        how = partial(_int8_chain if isinstance(tile, Int8Tile) else _packed_chain, size, dtype, device, tile, tiny)
        kind = f"w8a8 {tile.family}" if isinstance(tile, Int8Tile) else tile.family
        yield Check(f"overlapping launches, {kind}, M = {m}", partial(_checked, how, m, size, dtype, device, tiny))


def overlap_work(dtype: torch.dtype, arch: int, *, tiny: bool) -> Iterator[tuple[Problem, Tile | Int8Tile, bool]]:
    """Problem and tile of the checks' matmuls, none with atomics, to compile them ahead."""
    size = 256 if tiny else SIZE
    for m, tile in _tiles(dtype, arch, size, tiny):
        bits, group = (8, -1) if isinstance(tile, Int8Tile) else (4, 128)
        for pdl in (False, True):
            problem = Problem(m, size, size, bits, group, dtype, not isinstance(tile, Int8Tile))
            yield problem, replace(tile, pdl=pdl), False


def _tiles(dtype: torch.dtype, arch: int, size: int, tiny: bool) -> Iterator[tuple[int, Tile | Int8Tile]]:
    """(tokens, tile) of every chain."""
    for m in (3, 70) if arch >= PDL_ARCH else ():
        for family in FAMILIES:
            tile = family_tile(family, Problem(m, size, size, 4, 128, dtype, True), arch)
            if family != "dequant" and tile is not None and (family not in HOPPER or arch == 90):
                yield m, tile
        yield m, replace(pick_tile(m, size, size, arch), split_k=1 if tiny else 2)
        if arch == 90:
            yield m, replace(HOPPER_TILES[0], split_k=2)


def _packed_chain(size: int, dtype: torch.dtype, device: torch.device, tile: Tile, tiny: bool) -> Chain:
    # codes less their zeros are about 6.5 in the mean square: results are as large as what is multiplied
    scale = 0.15 / size**0.5
    weights = [
        random_packed(size, size, 4, 128, dtype, device, asymmetric=True, scale=(0.9 * scale, 1.1 * scale))
        for _ in range(2 if tiny else LINKS)
    ]
    other = random_packed(size, size, 4, 128, dtype, device, asymmetric=True, scale=(0.9 * scale, 1.1 * scale))
    kept = weights[-1].tiles.clone()

    def run(x: Tensor, pdl: bool) -> Tensor:
        for packed in weights[:-1]:
            x = packed(x, tile=replace(tile, pdl=pdl))
        # a weight that was written just before, by a kernel that knows nothing of this, is what is multiplied with
        weights[-1].tiles.copy_(other.tiles)
        x = weights[-1](x, tile=replace(tile, pdl=pdl))
        weights[-1].tiles.copy_(kept)
        return x + weights[-1](x, tile=replace(tile, pdl=pdl))

    return run


def _int8_chain(size: int, _: torch.dtype, device: torch.device, tile: Int8Tile, tiny: bool) -> Chain:
    from lowbit_kernels.int8 import int8_linear

    weights = [
        torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2 if tiny else LINKS)
    ]
    scales = torch.full((size,), 1 / 74 / size**0.5, device=device)

    def run(x: Tensor, pdl: bool) -> Tensor:
        for codes in weights:
            x = int8_linear(x, codes, scales, None, None, None, tile=replace(tile, pdl=pdl))
        return x

    return run


def _checked(
    make: Callable[[], Chain], m: int, size: int, dtype: torch.dtype, device: torch.device, tiny: bool
) -> float:
    """The bits of the chain that does not overlap, called and replayed from a graph; how often it ran."""
    torch.manual_seed(m)
    chain, x = make(), torch.randn(m, size, device=device).to(dtype)
    expected = chain(x, False)
    if not bool(expected.isfinite().all()) or not bool(expected.any()):
        raise CheckFailed("the chain's result is not finite, or all zeros: it can show nothing")
    runs = 1 if tiny else REPLAYS
    for number in range(runs):
        if not torch.equal(chain(x, True), expected):
            raise CheckFailed(f"run {number + 1}: launches that overlap gave other bits than launches that do not")
    if not tiny:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x, True)
        for number in range(runs):
            out.fill_(float("nan"))
            graph.replay()
            if not torch.equal(out, expected):
                raise CheckFailed(f"replay {number + 1}: launches that overlap in a graph gave other bits")
    return float(2 * runs)

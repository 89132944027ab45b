"""Tiles of the int8 matmul: which ones there are, when one may run, and which one runs. Pure functions.

A GPU's table (table.py) has the choices that ``scripts/tune`` measured there. Where it has none, as all that are
shipped today, a rule chooses, from bytes in flight, registers and shared memory (kernels/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .dispatch import fill_shares, shape_distance
from .table import Int8Row, Table, table_for, uses_pdl
from .tiles import MAX_SPLIT_TILES, MIN_ARCH, PDL_ARCH, cdiv, shared_limit

__all__ = [
    "HOPPER_TILES",
    "TILES",
    "Int8Tile",
    "fill_split",
    "fitting",
    "largest_k",
    "pick_tile",
    "shared_bytes",
    "why_not",
]

MOST_SPLITS = 16
FEWEST_STEPS = 4
"""Steps along K that a program should have at least, to fill its pipeline."""


@dataclass(frozen=True)
class Int8Tile:
    """One program's share of ``out`` and how it walks along K.

    Attributes:
        block_m: tokens, a power of two from 8 to 256.
        block_n: weight rows, a power of two from 16 to 256.
        block_k: columns per step, a power of two from 32 to 256.
        split_k: programs that share the columns of one (block_m, block_n) tile; 1: no workspace.
        num_warps: 1, 2, 4 or 8.
        num_stages: steps along K whose loads are in flight, at least 1.
        family: ``triton``, or ``gluon`` for sm_90 (int8_hopper.py), where split_k is how many programs share a tile of
            the last round, in the mean.
        pdl: launched to begin while the kernel before it on the stream ends (overlap.py); sm_90 and newer.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    family: str = "triton"
    pdl: bool = False


TILES = (
    Int8Tile(16, 64, 256, 1, 4, 4),
    Int8Tile(32, 64, 256, 1, 4, 4),
    Int8Tile(64, 64, 128, 1, 4, 4),
    Int8Tile(128, 64, 128, 1, 4, 4),
    Int8Tile(128, 128, 128, 1, 8, 3),
    Int8Tile(256, 128, 128, 1, 8, 3),
)
"""What pick_tile's rule chooses from, and what the compile gate checks."""
HOPPER_TILES = (
    Int8Tile(64, 128, 128, 1, 8, 8, "gluon"),
    Int8Tile(128, 128, 128, 1, 8, 6, "gluon"),
    Int8Tile(256, 128, 128, 1, 8, 4, "gluon"),
)
"""Those of sm_90 in Gluon: it synchronises by hand and has not run on hardware, so only a measured table picks it."""


def largest_k(asymmetric: bool) -> int:
    """The longest row whose sum of products of int8 numbers (of int8 and a difference of two) always fits int32."""
    most = 255 if asymmetric else 128
    return (2**31 - 1) // (128 * most)


def shared_bytes(tile: Int8Tile) -> int:
    """Upper bound: both operands once per stage, or the result on its way to rows of tokens."""
    step = (tile.block_m + tile.block_n) * tile.block_k
    if tile.family == "gluon":  # the ring, barriers and what worker warps are passed, the results of both warpgroups
        return tile.num_stages * step + 1024 + 2 * 64 * 64 * 4
    return max(tile.num_stages * step, 4 * tile.block_m * tile.block_n) + 1024


def why_not(tile: Int8Tile, m: int, n: int, k: int, arch: int) -> str | None:
    """Why ``tile`` cannot run ``(m, k) @ (n, k).T`` on ``arch`` (90 for sm_90), or None when it can."""
    if arch < MIN_ARCH:
        return f"sm_{arch} has no int8 tensor cores that Triton supports (sm_75 and newer)"
    if tile.family not in ("triton", "gluon"):
        return f"family must be triton or gluon, got {tile.family!r}"
    if tile.pdl and arch < PDL_ARCH:
        return f"programmatic dependent launch needs sm_{PDL_ARCH}, got sm_{arch}"
    reason = (_gluon_why_not if tile.family == "gluon" else _triton_why_not)(tile, m, n, k, arch)
    if reason is None and shared_bytes(tile) > shared_limit(arch):
        return f"{shared_bytes(tile)} bytes of shared memory, sm_{arch} has {shared_limit(arch)}"
    return reason


def _triton_why_not(tile: Int8Tile, m: int, n: int, k: int, arch: int) -> str | None:
    limits = {"block_m": (8, 256), "block_n": (16, 256), "block_k": (32, 256), "num_warps": (1, 8)}
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        if not least <= value <= most or value & (value - 1):
            return f"{name} must be a power of two from {least} to {most}, got {value}"
    if tile.num_stages < 1:
        return f"num_stages must be at least 1, got {tile.num_stages}"
    steps = cdiv(k, tile.block_k)
    if not 1 <= tile.split_k <= max(1, steps):
        return f"split_k must be between 1 and the {steps} steps along K = {k}, got {tile.split_k}"
    count = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    if tile.split_k > 1 and count > MAX_SPLIT_TILES:
        return f"split_k must be 1 for more than {MAX_SPLIT_TILES} output tiles, there are {count}"
    return None


def _gluon_why_not(tile: Int8Tile, m: int, n: int, k: int, arch: int) -> str | None:
    if arch != 90:
        return f"the gluon family is written for sm_90, not sm_{arch}"
    if k % 16:
        return f"the copy engine needs rows at multiples of 16 bytes: K must be a multiple of 16, got {k}"
    if tile.block_m not in (64, 128, 256) or (tile.block_n, tile.block_k, tile.num_warps) != (128, 128, 8):
        return f"block_m must be 64, 128 or 256, block_n and block_k 128 and num_warps 8, got {tile}"
    if not 2 <= tile.num_stages <= 8 or not 1 <= tile.split_k <= MOST_SPLITS:
        return f"num_stages must be 2 to 8 and split_k 1 to {MOST_SPLITS}, got {tile}"
    return None


@lru_cache(maxsize=4096)
def pick_tile(m: int, n: int, k: int, arch: int, gpu_name: str | None = None, hopper: bool = True) -> Int8Tile:
    """The tile to run with; the same arguments always give the same tile, and it always fits.

    What the GPU's table has for the nearest shape, if that fits. Otherwise the narrowest tile that holds all tokens, so
    that a weight is read once; from 129 tokens on the widest that leaves no multiprocessor idle. Programs that are
    fewer than the multiprocessors share columns. None in Gluon unless ``hopper``: Triton has it
    (releases.gluon_missing), and both operands start at multiples of 16 bytes.

    Raises:
        ValueError: the architecture has no int8 tensor cores that Triton supports.
    """
    if arch < MIN_ARCH:
        raise ValueError(why_not(TILES[0], m, n, k, arch))
    return replace(_picked(m, n, k, arch, table_for(arch, gpu_name), hopper), pdl=uses_pdl(arch, gpu_name))


def _picked(m: int, n: int, k: int, arch: int, table: Table, hopper: bool) -> Int8Tile:
    multiprocessors = table.multiprocessors
    if table.int8:
        key = min(table.int8, key=lambda key: (shape_distance(key[0], key[1], n, k), repr(key)))
        measured = _measured(table.int8[key], key == (n, k), m, n, k, multiprocessors)
        if why_not(measured, m, n, k, arch) is None and (hopper or measured.family == "triton"):
            return measured
    allowed = fitting(arch)
    tile = next((tile for tile in allowed if tile.block_m >= m), None)
    if tile is None or m > 128:
        wide = [t for t in allowed if t.block_m >= 64]
        busy = [t for t in wide if cdiv(m, t.block_m) * cdiv(n, t.block_n) >= multiprocessors]
        tile = max(busy, key=_area) if busy else min(wide, key=_area)
    return replace(tile, split_k=fill_split(tile, m, n, k, multiprocessors))


def _measured(rows: tuple[Int8Row, ...], same_shape: bool, m: int, n: int, k: int, multiprocessors: int) -> Int8Tile:
    """The tile of the first row with enough tokens; its split_k is kept only for the shape that it was measured at."""
    row = next(row for row in rows if row.m is None or m <= row.m)
    tile = Int8Tile(*row.tile)
    if same_shape and tile.split_k:
        return tile
    return replace(tile, split_k=fill_split(tile, m, n, k, multiprocessors))


def fill_split(tile: Int8Tile, m: int, n: int, k: int, multiprocessors: int) -> int:
    """Programs per output tile, so that there are about two per multiprocessor and each has FEWEST_STEPS steps."""
    programs = max(1, cdiv(m, tile.block_m) * cdiv(n, tile.block_n))
    if tile.family == "gluon":
        return fill_shares(programs, cdiv(k, 128), multiprocessors)
    if programs > MAX_SPLIT_TILES:
        return 1
    return max(1, min(2 * multiprocessors // programs, cdiv(k, tile.block_k) // FEWEST_STEPS, MOST_SPLITS))


def fitting(arch: int) -> list[Int8Tile]:
    """``TILES`` with as many stages as the shared memory of ``arch`` holds, without those that keep less than three."""
    return [tile for tile in (_fitted(tile, arch) for tile in TILES) if tile is not None]


def _area(tile: Int8Tile) -> int:
    return tile.block_m * tile.block_n


def _fitted(tile: Int8Tile, arch: int) -> Int8Tile | None:
    """``tile`` with as many of its stages as the shared memory holds, None below three."""
    for stages in range(tile.num_stages, 2, -1):
        candidate = replace(tile, num_stages=stages)
        if shared_bytes(candidate) <= shared_limit(arch):
            return candidate
    return None

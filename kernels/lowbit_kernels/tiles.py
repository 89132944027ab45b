"""Which tile a matmul may run with: a problem, a tile, what an architecture offers, and one predicate over the three.

Everything here is a pure function of small frozen values; nothing asks the GPU. Which of the tiles that fit is the
fastest is measured and kept elsewhere (table.py, which dispatch.py chooses from).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .hopper_plan import gluon_shared_bytes, gluon_why_not
from .scaled_plan import scaled_shared_bytes, scaled_why_not

__all__ = [
    "BITS",
    "FAMILIES",
    "GROUPS",
    "HOPPER",
    "MAX_SPLIT_TILES",
    "MIN_ARCH",
    "PDL_ARCH",
    "Problem",
    "Tile",
    "cdiv",
    "fits",
    "narrowed",
    "run_columns",
    "shared_bytes",
    "shared_limit",
    "step_columns",
    "why_not",
]

BITS = (2, 4, 8)
GROUPS = (32, 64, 128, -1)
FAMILIES = ("triton", "gluon", "scaled", "dequant")
"""``triton``: mma.sync or wgmma by tl.dot, every architecture. ``gluon``, ``scaled``: sm_90. ``dequant``: cuBLAS."""
HOPPER = ("gluon", "scaled")
"""Families that synchronise by hand, for sm_90 alone."""
MAX_SPLIT_TILES = 1 << 16
"""Output tiles that may be split along K: each takes a counter, of which a device has a fixed number (epilogue.py)."""
PDL_ARCH = 90
"""The first architecture with programmatic dependent launch."""
MIN_ARCH = 75
"""Triton 3.6 compiles for sm_75, though without its tensor cores: ``dequant`` is the family for it. bf16: sm_80."""

_SHARED = {
    75: 65_536,
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    101: 232_448,
    103: 232_448,
    110: 232_448,
    120: 101_376,
    121: 101_376,
}


@dataclass(frozen=True)
class Problem:
    """``out (m, n) = x (m, k) @ W.T`` with W packed to ``bits`` in groups of ``group_size`` columns (-1: whole row).

    Attributes:
        dtype: of x and the result: float16 or bfloat16 (float32 only in Triton's interpreter).
        asymmetric: whether there are zeros.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    asymmetric: bool = False


@dataclass(frozen=True)
class Tile:
    """One program's share of ``out`` and how it walks along K.

    Attributes:
        family: one of FAMILIES.
        block_m: tokens: a power of two of at least 8. For ``dequant`` without meaning (1).
        block_n: weight rows: a power of two of at least 16.
        split_k: programs that share the columns of one (block_m, block_n) tile; 1: no workspace. For ``scaled``: that
            share one which is left after the last whole round of tiles, in the mean.
        num_warps: 1, 2, 4 or 8.
        num_stages: steps along K whose loads are in flight, at least 1.
        pdl: launched to begin while the kernel before it on the stream ends (overlap.py); sm_90 and newer.
    """

    family: str
    block_m: int
    block_n: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    pdl: bool = False


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` of integers."""
    return -(-a // b)


def step_columns(bits: int) -> int:
    """Columns of one step of the ``triton`` family, one unit of the layout: 256, 128 or 64 at 2, 4 or 8 bits."""
    return 512 // bits


def run_columns(bits: int, group_size: int) -> int:
    """Columns of one dot product: they share a scale and lie in one unit, and are at most 128."""
    return min(step_columns(bits), 128 if group_size == -1 else group_size)


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may use on ``arch`` (90 for sm_90).

    An architecture that is not in the table is taken for the smallest of its generation or, past the table, of all.
    """
    if arch in _SHARED:
        return _SHARED[arch]
    return min((limit for known, limit in _SHARED.items() if known // 10 == arch // 10), default=65_536)


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Upper bound on shared memory: x and words once per stage, and the result on its way to rows of tokens.

    sm_90 multiplies out of the stage that was loaded last and so needs one more than it has in flight.
    """
    if tile.family == "dequant":
        return 0
    if tile.family in HOPPER:
        return (gluon_shared_bytes if tile.family == "gluon" else scaled_shared_bytes)(tile, problem)
    columns = step_columns(problem.bits)
    itemsize = max(2, problem.dtype.itemsize)
    x = tile.block_m * columns * itemsize
    words = tile.block_n * columns * problem.bits // 8
    result = tile.block_m * tile.block_n * 4
    return max((tile.num_stages + 1) * (x + words), result) + 1024


def narrowed(tile: Tile, problem: Problem, arch: int) -> Tile:
    """``tile``, or for small groups one of the triton family that keeps within the registers.

    Tables are of groups of 128. Where 32 or 64 columns share a scale and a zero, a step has up to eight runs, and all
    their scales and zeros are held at once: then a warp has 16 rows and no more, and there are fewer tokens. wgmma
    takes x from shared memory and has room for more.
    """
    if tile.family != "triton" or problem.group_size not in (32, 64):
        return tile
    runs = step_columns(problem.bits) // problem.group_size
    if arch // 10 == 9:
        crowded = runs == 8 and tile.block_m >= 16
        tile = replace(tile, block_m=min(tile.block_m, 32 if crowded else 64))
    else:
        crowded = runs >= 4
        most = 16 if runs == 8 else 32 if runs == 4 and problem.asymmetric else 64
        tile = replace(tile, block_n=64) if runs == 8 and tile.block_m > most else tile
        tile = replace(tile, block_m=min(tile.block_m, most))
    return replace(tile, num_warps=min(8, tile.block_n // 16)) if crowded else tile


@lru_cache(maxsize=8192)  # a launch asks every time
def why_not(tile: Tile, problem: Problem, arch: int) -> str | None:
    """Why ``tile`` cannot run ``problem`` on ``arch``, or None when it can."""
    if tile.family not in FAMILIES:
        return f"family must be one of {FAMILIES}, got {tile.family!r}"
    if arch < MIN_ARCH or (problem.dtype == torch.bfloat16 and arch < 80):
        return f"sm_{arch} has no tensor-core instruction for {problem.dtype} (float16 from sm_75, bfloat16 from sm_80)"
    if problem.bits not in BITS or problem.group_size not in GROUPS:
        return f"bits must be one of {BITS} and group_size one of {GROUPS}, got {problem.bits} and {problem.group_size}"
    if tile.pdl and (arch < PDL_ARCH or tile.family == "dequant"):
        return f"programmatic dependent launch needs a fused family and sm_{PDL_ARCH}, got {tile.family} on sm_{arch}"
    if tile.family == "dequant":
        return None
    if tile.family in HOPPER and arch != 90:
        return f"the {tile.family} family is written for sm_90, not sm_{arch}"
    if tile.family in HOPPER:
        return (gluon_why_not if tile.family == "gluon" else scaled_why_not)(tile, problem)
    powers = {"block_m": (tile.block_m, 8), "block_n": (tile.block_n, 16), "num_warps": (tile.num_warps, 1)}
    for name, (value, least) in powers.items():
        if value < least or value & (value - 1):
            return f"{name} must be a power of two of at least {least}, got {value}"
    if tile.num_warps > 8 or tile.num_stages < 1:
        return f"num_warps must be at most 8 and num_stages at least 1, got {tile.num_warps} and {tile.num_stages}"
    steps = cdiv(problem.k, step_columns(problem.bits))
    if not 1 <= tile.split_k <= max(1, steps):
        return f"split_k must be between 1 and the {steps} steps along K = {problem.k}, got {tile.split_k}"
    count = cdiv(problem.m, tile.block_m) * cdiv(problem.n, tile.block_n)
    if tile.split_k > 1 and count > MAX_SPLIT_TILES:
        return f"split_k must be 1 for more than {MAX_SPLIT_TILES} output tiles, there are {count}"
    if shared_bytes(tile, problem) > shared_limit(arch):
        return f"{shared_bytes(tile, problem)} bytes of shared memory, sm_{arch} has {shared_limit(arch)}"
    return None


def fits(tile: Tile, problem: Problem, arch: int) -> bool:
    """Whether ``tile`` can run ``problem`` on ``arch`` (90 for sm_90)."""
    return why_not(tile, problem, arch) is None

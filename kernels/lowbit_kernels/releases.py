"""What the kernels find in which release of Triton (README.md, "Triton's releases")."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import triton
import triton.language as tl

from .tiles import Tile

__all__ = [
    "GLUON_RELEASES",
    "LANE_COLUMNS",
    "LEAST_TOKENS",
    "LEAST_WGMMA",
    "gluon_missing",
    "release",
    "wide_enough",
]

GLUON_RELEASES = ((3, 6), (3, 9))
"""First and last release of Triton that the Gluon kernels were compiled and emulated with (README.md)."""


def release() -> tuple[int, ...]:
    """Of Triton: (3, 6)."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


LEAST_TOKENS = 8 if release() >= (3, 5) else 16
"""Columns that a dot has at least; tensor cores have 8."""
LEAST_WGMMA = 8 if release() >= (3, 8) else 16
"""Columns from which a dot on sm_90 becomes wgmma, with 64 rows and 4 warps; its operands want another order."""

LANE_COLUMNS = tl.constexpr(4 if release() < (3, 8) else 2)
"""Consecutive columns of a lane in an operand of mma.sync that a join made: until 3.7 the join doubles what the tensor
core has. The order of the columns follows (unpack.py), so that words and x come as they lie in shared memory."""


def wide_enough(tile: Tile) -> Tile:
    """``tile``, or for one of 8 tokens where this Triton's dot has at least 16 (3.4), that with 16: the same sums."""
    return replace(tile, block_m=LEAST_TOKENS) if tile.block_m == 8 < LEAST_TOKENS else tile


@lru_cache(maxsize=1)  # a launch asks every time
def gluon_missing() -> str | None:
    """Why this Triton cannot run the kernels in Gluon, which is experimental and changes with releases; or None."""
    first, last = GLUON_RELEASES
    if not first <= release() <= last:
        return f"the Gluon kernels need triton {first[0]}.{first[1]} to {last[0]}.{last[1]}, got {triton.__version__}"
    try:
        from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma  # noqa: F401
    except ImportError as error:
        return f"the Gluon kernels need triton.experimental.gluon: {error}"
    return None

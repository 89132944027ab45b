"""Triton kernels of lowbit: one operator per file, torch and triton only (kernels/README.md)."""

from .matmul import packed_matmul, packed_matmul_reference
from .tiles import Tile, fits, pick_tile

__all__ = ["Tile", "fits", "packed_matmul", "packed_matmul_reference", "pick_tile"]

"""Memory that was freed but that the C library keeps."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["return_free_memory"]

# glibc only: other C libraries have no such call, and need none
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_free_memory() -> None:
    """Hand freed heap pages back to the system: between tensors that stay, glibc keeps those of every one that went."""
    if _malloc_trim is not None:
        _malloc_trim(0)

"""Memory that was freed but that the C library keeps."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["GrowthLimit", "return_free_memory"]

# glibc only: other C libraries have no such call, and need none
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_free_memory() -> None:
    """Hand freed heap pages back to the system: between tensors that stay, glibc keeps those of every one that went."""
    if _malloc_trim is not None:
        _malloc_trim(0)


class GrowthLimit:
    """Calls :func:`return_free_memory` only where it can lower the peak: every page handed back costs a fault later.

    That is when the process has grown and is larger than it ever was.

    Args:
        slack: bytes of growth since the last time that are let pass.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._after_last = self._largest = resident_bytes()

    def check(self) -> None:
        """Return free memory if the resident set is the largest so far and grew by more than the slack."""
        size = resident_bytes()
        if size - self._after_last > self._slack and size > self._largest:
            return_free_memory()
            self._after_last = resident_bytes()
        self._largest = max(self._largest, size)


def resident_bytes() -> int:
    """Resident set of this process; 0 where the system does not say (then nothing is ever returned early)."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

"""Memory that was freed but that the C library keeps."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["GrowthLimit", "restart_without_cache", "return_free_memory"]

_WITHOUT_CACHE = "glibc.malloc.tcache_count=0"

# glibc only: other C libraries have no such call, and need none
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_free_memory() -> None:
    """Hand freed heap pages back to the system: between tensors that stay, glibc keeps those of every one that went."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def restart_without_cache() -> None:
    """Start this process anew with glibc's per-thread cache of small free chunks off, which it decides at its start.

    torch's memory is aligned: glibc cuts it out of a larger chunk, and frees the ends, of 32 to 112 bytes. Those in
    the cache are not joined again with what lies between them, so the place of a tensor that has gone is too small for
    the next one of its size. Whether that happens is chance: of one calibration (books-11m, float32) some runs took
    0.99 GB and 0.6 million page faults, others 1.1 to 1.3 GB, 1.7 million, and 3 s more of 20. Without the cache all
    were like the former.

    Returns where there is nothing to gain or the environment says otherwise: with another C library, after the
    restart, where GLIBC_TUNABLES is set, under a debugger.
    """
    known = getattr(os, "confstr_names", {}).get("CS_GNU_LIBC_VERSION")
    if sys.platform != "linux" or known is None or not (os.confstr(known) or "").startswith("glibc"):
        return
    if "GLIBC_TUNABLES" in os.environ or sys.gettrace() is not None or not sys.executable:
        return
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, "GLIBC_TUNABLES": _WITHOUT_CACHE})


class GrowthLimit:
    """Calls :func:`return_free_memory` only where it can lower the peak: every page handed back costs a fault later.

    That is when the process has grown and is about to be larger than it ever was.

    Args:
        slack: bytes of growth since the last time that are let pass; less costs page faults, more costs memory.
        margin: bytes that may be taken between two checks. Without it the process exceeds its largest size before each
            check, and so by a little more every time.
    """

    def __init__(self, slack: int, margin: int) -> None:
        self._slack, self._margin = slack, margin
        self._after_last = self._largest = resident_bytes()

    def check(self) -> None:
        """Return free memory if the resident set nears its largest so far and grew by more than the slack."""
        size = resident_bytes()
        if size - self._after_last > self._slack and size + self._margin > self._largest:
            return_free_memory()
            self._after_last = resident_bytes()
        self._largest = max(self._largest, size)


def resident_bytes() -> int:
    """Resident set of this process; 0 where the system does not say (then nothing is ever returned early)."""
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # without a file object around it: called for every batch
    except OSError:
        return 0
    try:
        return int(os.read(statm, 100).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(statm)

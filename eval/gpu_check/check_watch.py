"""What can go wrong with a device besides a wrong result: a kernel that never ends, and a context that is lost.

After an illegal access every later call of the process fails, whatever it is; who is to blame is the first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

__all__ = ["HUNG_S", "ContextLost", "raise_if_lost", "watched"]

HUNG_S = 150
"""Seconds after which a case has not merely to compile much."""


class ContextLost(RuntimeError):
    """The CUDA context answers with an error to everything; the message says after what. Only a new process helps."""


def raise_if_lost(after: str) -> None:
    """Wait for the device. ContextLost when it, or an error that was still under way, cannot be got over."""
    if not torch.cuda.is_available():
        return
    for _ in range(2):  # the first may report, once, a launch that failed and left the context as it was
        try:
            torch.cuda.synchronize()
            return
        except Exception as error:
            reason = str(error).splitlines()[0]
    raise ContextLost(f"the CUDA context is lost after {after}: {reason}")


@contextlib.contextmanager
def watched(seconds: float, hung: Callable[[], None]) -> Iterator[None]:
    """Call ``hung`` from another thread if the block has not ended by then: a wait for the device hears nothing."""
    timer = threading.Timer(seconds, hung)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

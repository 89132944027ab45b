"""What Gluon calls differently from one Triton release to the next, under one name. Imported by the Gluon kernels only.

    barrier()      of a warpgroup's threads: thread_barrier in 3.6
    async_load()   the copy engine's copy to shared memory: async_copy_global_to_shared in 3.6 and 3.7

Which releases: releases.gluon_missing. Gluon of 3.5 lacks what the kernels need.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["async_load", "barrier"]

barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier
async_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

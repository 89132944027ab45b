"""Global and shared memory of the PTX emulator: bounds, alignment, who may see what.

Every access to shared memory is held against those of the other warps: two that touch the same byte, one of them a
write, must be ordered by a barrier. Order is kept as vector clocks (Lamport's happened-before), one number per warp and
one for each program's copy engine; a byte remembers who wrote it last and when, and when each warp read it last. In
global memory, where programs meet, what one wrote another may read only behind an atomic that released and acquired it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["PENDING", "GlobalMemory", "Race", "SharedMemory", "TensorMap", "WrongAccess", "swizzled", "wavefronts"]

Array = Any
SHARED_BASE = 1024
"""Where a kernel's shared memory begins: the first KiB is the system's from sm_90 on, and swizzles count from 0."""


class WrongAccess(Exception):
    """An address outside of every tensor, or not aligned."""


class Race(Exception):
    """Two warps touch the same shared memory without a barrier between them."""


PENDING = 2**31 - 1
"""The time of an access that is still under way."""


class GlobalMemory:
    """The memory of the tensors a kernel was given, at their own addresses."""

    def __init__(self) -> None:
        self.starts = np.zeros(0, np.int64)
        self.ends = np.zeros(0, np.int64)
        self.parts: list[Array] = []
        self.written_by: list[Array] = []
        self.written_at: list[Array] = []
        self.released: dict[int, Array] = {}  # what an atomic's address passes on
        self.waited: list[tuple[int, int]] | None = None  # when which warps of a program waited for the kernel before

    def allow(self, extents: Sequence[tuple[int, int]]) -> None:
        """Make ``[start, end)`` of this process's memory accessible; overlapping parts become one."""
        merged: list[list[int]] = []
        for start, end in sorted(extents):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            elif end > start:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        self.parts = [np.frombuffer((ctypes.c_uint8 * (b - a)).from_address(a), np.uint8) for a, b in merged]
        self.written_by = [np.zeros(part.size, np.int32) for part in self.parts]
        self.written_at = [np.zeros(part.size, np.int32) for part in self.parts]

    def find(self, addresses: Array, size: int, what: str) -> tuple[int, Array]:
        """The part that all addresses lie in, and their ``(n, size)`` bytes there.

        Raises:
            WrongAccess: one of them is not inside, or not a multiple of ``size``.
        """
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise WrongAccess(f"{what} of {size} bytes at {int(addresses[(addresses % size).argmax()]):#x}: misaligned")
        which = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (which >= 0) & (addresses + size <= self.ends[which])
        if not inside.all():
            lane = int((~inside).argmax())
            near = [f"{a:#x}-{b:#x}" for a, b in zip(self.starts, self.ends, strict=True)]
            raise WrongAccess(f"{what} of {size} bytes at {int(addresses[lane]):#x}: outside of the tensors {near}")
        if (which != which[0]).any():
            raise WrongAccess(f"{what}: the lanes of one warp reach into several tensors")
        part = int(which[0])
        return part, (addresses - self.starts[part])[:, None] + np.arange(size)

    def begin_early(self) -> None:
        """A program begins while the kernel before it runs: until it has waited for that, it may only prefetch."""
        self.waited = []

    def previous_ended(self, actor: int, clock: Array) -> None:
        """A warp has waited for the kernel before."""
        if self.waited is not None:
            self.waited.append((actor, int(clock[actor])))

    def knows_of_wait(self, clock: Array) -> bool:
        """Whether who has this vector clock comes after a wait for the kernel before; True where none is needed."""
        return self.waited is None or any(clock[actor] >= then for actor, then in self.waited)

    def _ordered(self, part: int, at: Array, clock: Array, what: str) -> None:
        if not self.knows_of_wait(clock):
            raise Race(f"{what} before griddepcontrol.wait: the kernel before may still write there, or read")
        by = self.written_by[part][at]
        if (self.written_at[part][at] > clock[by]).any():
            raise Race(f"{what} of bytes of a tensor that warp {by.max()} of the grid wrote, nothing orders them")

    def read(self, addresses: Array, size: int, clock: Array, what: str = "a read") -> Array:
        """``(n, size)`` bytes, as seen by who has this vector clock.

        Raises:
            WrongAccess: not inside a tensor, or misaligned.
            Race: another warp wrote them, and nothing says that it was before.
        """
        part, at = self.find(addresses, size, what)
        self._ordered(part, at, clock, what)
        return self.parts[part][at]

    def write(self, addresses: Array, data: Array, actor: int, clock: Array) -> None:
        """``(n, size)`` bytes; of lanes that write to the same place the last wins. Raises as :meth:`read`."""
        part, at = self.find(addresses, data.shape[1], "a write")
        self._ordered(part, at, clock, "a write")
        self.parts[part][at] = data
        self.written_by[part][at], self.written_at[part][at] = actor, clock[actor]

    def add(self, address: int, value: int, actor: int, clock: Array) -> int:
        """An atomic addition to 32 bits that releases and acquires: ``clock`` learns what earlier ones released."""
        part, at = self.find(np.array([address]), 4, "an atomic")
        word = self.parts[part][at[0]].view(np.uint32)
        old = int(word[0])
        self.parts[part][at[0]] = np.array([old + value & 0xFFFFFFFF], np.uint32).view(np.uint8)
        if not self.knows_of_wait(clock):
            raise Race("an atomic before griddepcontrol.wait: the kernel before may still use it")
        passed = self.released.setdefault(address, np.zeros_like(clock))
        np.maximum(clock, passed, out=clock)
        np.maximum(clock, passed, out=passed)
        self.written_by[part][at], self.written_at[part][at] = actor, clock[actor]
        return old


class SharedMemory:
    """One program's shared memory and its history.

    Args:
        size: bytes.
        actors: the program's warps, and one more for its copy engine.
        first: place of the first of them in vector clocks.
    """

    def __init__(self, size: int, actors: int, first: int) -> None:
        self.mine = slice(first, first + actors)
        self.first = first
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN as floats: what nobody wrote shows in the result
        self.written_by = np.zeros(size, np.int32)
        self.written_at = np.zeros(size, np.int32)
        self.read_at = np.zeros((actors, size), np.int32)

    def places(self, addresses: Array, size: int, what: str, align: int | None = None) -> Array:
        """``(n, size)`` indices of bytes.

        Raises:
            WrongAccess: outside, or not aligned.
        """
        at = addresses.astype(np.int64) - SHARED_BASE
        if (at % (align or size)).any():
            raise WrongAccess(f"{what} of {size} bytes in shared memory is misaligned")
        if at.min() < 0 or at.max() + size > self.bytes.size:
            raise WrongAccess(
                f"{what} of {size} bytes in shared memory at {int(at.min())} to {int(at.max())} of {self.bytes.size}"
            )
        return at[:, None] + np.arange(size)

    def read(self, places: Array, actor: int, clock: Array, until: int | None = None) -> Array:
        """Bytes at ``places``, read by ``actor`` with the vector clock ``clock``; asynchronously: ``until`` PENDING.

        Raises:
            Race: another wrote them, or a copy writes them, and nothing says that it was before.
        """
        unordered = self.written_at[places] > clock[self.mine][self.written_by[places]]
        if unordered.any():
            at = int(places[unordered][0])
            raise Race(f"byte {at}: read by {actor}, written by {self.written_by[at]}, no barrier between them")
        self.read_at[actor][places] = clock[self.first + actor] if until is None else until
        return self.bytes[places]

    def claim(self, places: Array, actor: int, before: Array) -> None:
        """``actor`` writes these bytes at any time after its vector clock ``before``, and nobody may touch them.

        Raises:
            Race: another read or wrote them and nothing says that it was before.
        """
        before = before[self.mine]
        unordered = self.written_at[places] > before[self.written_by[places]]
        if unordered.any():
            place = int(places[unordered][0])
            raise Race(f"byte {place}: written by {actor} and {self.written_by[place]}, no barrier between them")
        flat = places.ravel()
        readers = self.read_at[:, flat] > before[:, None]  # its own reads only where they are still under way
        if readers.any():
            reader, which = np.argwhere(readers)[0]
            raise Race(f"byte {int(flat[which])}: read by {reader}, written by {actor}, no barrier between them")
        self.written_by[places], self.written_at[places] = actor, PENDING

    def complete(self, places: Array, data: Array, actor: int, at: int) -> None:
        """What :meth:`claim` announced: seen from now on by those who know of ``actor``'s time ``at``."""
        self.bytes[places] = data
        self.written_at[places] = at

    def write(self, places: Array, data: Array, actor: int, clock: Array) -> None:
        """An ordinary store; several may store the same to one place. Raises Race as :meth:`claim`."""
        new = (self.bytes[places] != data) | (self.written_at[places] <= clock[self.mine][self.written_by[places]])
        self.claim(places[new], actor, clock)
        self.complete(places[new], data[new], actor, clock[self.first + actor])


def wavefronts(addresses: Array, size: int) -> tuple[int, int]:
    """Passes over the banks of shared memory that one access of up to 32 lanes takes, and without conflicts would.

    32 banks of 4 bytes; lanes that want the same 4 bytes share them. With 8 bytes per lane 16 go at a time, with 16
    bytes 8.
    """
    lanes = {8: 16, 16: 8}.get(size, 32)
    passes = fewest = 0
    for i in range(0, len(addresses), lanes):
        bytes_ = addresses[i : i + lanes].astype(np.int64)[:, None] + np.arange(size)
        words = np.unique(bytes_ // 4)
        passes += int(np.bincount(words % 32).max())
        fewest += -(-len(words) // 32)
    return passes, fewest


def swizzled(offsets: Array, width: int) -> Array:
    """Addresses in shared memory with the 16-byte pieces of rows of ``width`` bytes (0, 32, 64, 128) permuted.

    PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Tensor Swizzling Modes".
    """
    return offsets ^ ((offsets >> 7 & width // 16 - 1) << 4) if width else offsets


class TensorMap:
    """What cuTensorMapEncodeTiled makes of a tensor: boxes of it can be copied.

    Args:
        address: of the first element.
        shape, strides: in elements, the last dimension contiguous.
        box: shape of what one copy brings.
        element: bytes.
        swizzle: bytes of a swizzled row, 0 for none.
    """

    def __init__(
        self, address: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], element: int, swizzle: int
    ) -> None:
        self.address, self.shape, self.strides, self.box = address, shape, strides, box
        self.element, self.swizzle = element, swizzle
        if swizzle and box[-1] * element != swizzle:
            raise WrongAccess(f"rows of a box of {box[-1] * element} bytes are not the swizzle's {swizzle}")

    @property
    def bytes(self) -> int:
        """Of one box, also where part of it lies outside the tensor."""
        return int(np.prod(self.box)) * self.element

    def load(self, memory: GlobalMemory, start: Sequence[int], clock: Array) -> Array:
        """``(rows, bytes of a row)`` of the box that begins at ``start`` (outermost first); zeros outside."""
        at = [np.arange(size) + first for size, first in zip(self.box, start, strict=True)]
        grids = np.meshgrid(*at, indexing="ij")
        inside = np.ones(self.box, bool)
        for grid, size in zip(grids, self.shape, strict=True):
            inside &= (grid >= 0) & (grid < size)
        offsets = sum(grid * stride for grid, stride in zip(grids, self.strides, strict=True))
        data = np.zeros((*self.box, self.element), np.uint8)
        if inside.any():
            data[inside] = memory.read(
                self.address + offsets[inside] * self.element, self.element, clock, "a tensor copy"
            )
        return data.reshape(-1, self.box[-1] * self.element)

    def places(self, shared: int) -> Array:
        """Addresses in shared memory of the box's bytes when it is copied to ``shared``: ``(rows, bytes of a row)``."""
        align = 128 * max(1, self.swizzle // 16)
        if shared % align:
            raise WrongAccess(f"a box swizzled by {self.swizzle} bytes begins at {shared}, no multiple of {align}")
        row = self.box[-1] * self.element
        flat = shared + np.arange(self.bytes // 16, dtype=np.int64) * 16 if self.bytes % 16 == 0 else None
        if flat is None:
            raise WrongAccess(f"a box of {self.bytes} bytes")
        return (swizzled(flat, self.swizzle)[:, None] + np.arange(16)).reshape(-1, row)

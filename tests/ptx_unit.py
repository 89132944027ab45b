"""What a warp of the PTX emulator does besides arithmetic: memory, asynchronous copies, barriers, matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_alu import LANES
from ptx_matrix import accumulate, cut_sum, descriptor_addresses, fragment, from_rows, left, mma, numbers, to_rows
from ptx_memory import PENDING, SHARED_BASE, TensorMap, wavefronts

__all__ = ["Copy", "PtxError", "Unit"]

Array = Any


class PtxError(Exception):
    """An instruction that means nothing, or has no defined result, where it stands."""


@dataclass
class Copy:
    """A tensor copy under way, with the clock of who asked for it."""

    map: TensorMap
    start: list[int]
    places: Array
    barrier: int
    clock: Array


@dataclass
class Line:
    """A ``cp.async`` under way: where to, from where, how many of the bytes are read (zeros follow)."""

    places: Array
    sources: Array
    size: int
    given: Array


@dataclass
class Product:
    """A ``wgmma`` under way."""

    accumulators: tuple[int, ...]
    registers: tuple[int, ...]  # of the left operand; none when it lies in shared memory
    words: tuple[Array, ...]
    left: Array  # places in shared memory
    right: Array
    fresh: bool
    kind: str
    sums: str


class InFlight:
    """Stands in a register while a product is under way: whatever computes with it fails."""

    def __getattr__(self, name: str) -> Any:
        raise PtxError("a sum of a wgmma under way is read before it was waited for")


class Unit:
    """The memory and matrix instructions of one warp.

    Args:
        cta: the program it belongs to (ptx_machine.Cta).
        warp: ptx_machine.Warp.
    """

    def __init__(self, cta: Any, warp: Any) -> None:
        self.cta, self.warp, self.special = cta, warp, warp.special
        self.lines: list[Line] = []
        self.line_groups: list[list[Line]] = []
        self.products: list[Product] = []
        self.product_groups: list[list[Product]] = []
        self.sums: dict[int, Array] = {}  # accumulators of products under way

    # --- loads and stores

    def load(
        self, space: str, addresses: Array, size: int, count: int, mask: Array | None, signed: bool, to: str
    ) -> list[Array]:
        """``count`` elements of ``size`` bytes per lane, each widened to the type ``to``; zeros where masked."""
        out = [np.zeros(32, f"u{to[1]}") for _ in range(count)]
        active = np.arange(32) if mask is None else np.flatnonzero(mask)
        if not len(active):
            return out
        if space == "global":
            data = self.cta.memory.read(addresses[active], size * count, self.warp.clock)
        else:
            self._count("ld.shared", addresses[active], size * count)
            places = self.cta.shared.places(addresses[active], size * count, "a read")
            data = self.cta.shared.read(places, self.warp.number, self.warp.clock)
        values = np.ascontiguousarray(data).view(f"{'i' if signed else 'u'}{size}")
        for i in range(count):
            out[i][active] = values[:, i].astype(to).view(f"u{to[1]}")
        return out

    def prefetch(self, addresses: Array, mask: Array | None) -> None:
        """To the L2, which is always up to date: the addresses must be a tensor's, and that is all."""
        active = np.arange(32) if mask is None else np.flatnonzero(mask)
        if len(active):
            self.cta.memory.find(addresses[active], 1, "a prefetch")

    def let_next_begin(self) -> None:
        """``griddepcontrol.launch_dependents``: whoever comes next may take all but this kernel's own for ended."""
        if not self.cta.memory.knows_of_wait(self.warp.clock):
            raise PtxError("griddepcontrol.launch_dependents before griddepcontrol.wait: the next may begin too early")

    def wait_for_previous(self, mask: Array | None) -> None:
        """``griddepcontrol.wait``: from now on this warp, and who hears of it, may read and write what others do."""
        self._all(mask, "griddepcontrol.wait")
        self.cta.memory.previous_ended(self.warp.actor, self.warp.clock)
        self.warp.tick()

    def _count(self, what: str, addresses: Array, size: int) -> None:
        """Add an access's passes over the banks to what the run counts, if it does."""
        counts = self.cta.counts
        if counts is not None:
            taken, fewest = counts.get(what, (0, 0))
            passes = wavefronts(addresses, size)
            counts[what] = taken + passes[0], fewest + passes[1]

    def store(self, space: str, addresses: Array, values: Sequence[Array], size: int, mask: Array | None) -> None:
        """The low ``size`` bytes of each value, side by side."""
        active = np.arange(32) if mask is None else np.flatnonzero(mask)
        if not len(active):
            return
        narrow = np.stack([value[active].astype(f"u{size}") for value in values], 1)
        data = np.ascontiguousarray(narrow).view(np.uint8)
        if space == "global":
            self.cta.memory.write(addresses[active], data, self.warp.actor, self.warp.clock)
        else:
            self._count("st.shared", addresses[active], data.shape[1])
            places = self.cta.shared.places(addresses[active], data.shape[1], "a write")
            self.cta.shared.write(places, data, self.warp.number, self.warp.clock)

    def atomic_add(self, addresses: Array, values: Array, mask: Array | None) -> Array:
        """Lane after lane; returns what was there before."""
        out = np.zeros(32, np.uint32)
        for lane in range(32) if mask is None else np.flatnonzero(mask):
            place = int(addresses[lane])
            out[lane] = self.cta.memory.add(place, int(values[lane]), self.warp.actor, self.warp.clock)
            self.warp.tick()
        return out

    # --- copies past the registers

    def copy(self, shared: Array, sources: Array, size: int, given: Array | None, mask: Array | None) -> None:
        """``cp.async``: from now on nobody may touch its place, until the warp has waited for it."""
        active = np.arange(32) if mask is None else np.flatnonzero(mask)
        if not len(active):
            return
        self._count("cp.async", shared[active], size)
        places = self.cta.shared.places(shared[active], size, "an asynchronous copy")
        self.cta.shared.claim(places, self.warp.number, self.warp.clock)
        some = np.full(len(active), size) if given is None else given[active].astype(np.int64)
        line = Line(places, sources[active], size, some)
        self.lines.append(line)
        if not self.cta.late:
            self._copied(line, PENDING)

    def _copied(self, line: Line, at: int) -> None:
        data = np.zeros((len(line.sources), line.size), np.uint8)
        if (line.sources % np.uint64(line.size)).any():
            raise PtxError(f"an asynchronous copy of {line.size} bytes from an address that is no multiple of them")
        for size in set(line.given.tolist()) - {0}:
            lanes = line.given == size
            each = line.size if size == line.size else 1  # of fewer, so many bytes; zeros follow
            starts = line.sources[lanes].astype(np.int64)
            for byte in range(0, size, each):
                data[lanes, byte : byte + each] = self.cta.memory.read(starts + byte, each, self.warp.clock, "a copy")
        self.cta.shared.complete(line.places, data, self.warp.number, at)

    def commit_copies(self) -> None:
        self.line_groups.append(self.lines)
        self.lines = []

    def wait_copies(self, left_open: int) -> None:
        """All groups but the last ``left_open`` are there, for this warp; others need a barrier."""
        while len(self.line_groups) > left_open:
            for line in self.line_groups.pop(0):
                if self.cta.late:
                    self._copied(line, self.warp.clock[self.warp.actor])
                else:
                    self.cta.shared.written_at[line.places] = self.warp.clock[self.warp.actor]

    def copy_tensor(
        self, shared: Array, maps: Array, at: Sequence[Array], barrier: Array, parameters: Any, mask: Array | None
    ) -> None:
        """``cp.async.bulk.tensor`` by the one lane that is active; coordinates innermost first."""
        active = np.arange(32) if mask is None else np.flatnonzero(mask)
        for lane in active:
            tensor = next((v for v, where in _maps(parameters) if where == int(maps[lane])), None)
            if tensor is None:
                raise PtxError(f"{int(maps[lane]):#x} is no tensor map")
            start = [int(coordinate.view(np.int32)[lane]) for coordinate in reversed(at)]
            addresses = tensor.places(int(shared[lane])).ravel()
            places = self.cta.shared.places(addresses, 1, "a tensor copy")[:, 0]
            self.cta.ask(Copy(tensor, start, places, int(barrier[lane]), self.warp.clock.copy()))
            self.warp.tick()

    # --- barriers in memory

    def initialise(self, at: Array, count: int, mask: Array | None) -> None:
        """``mbarrier.init``; a store as others see it."""
        for lane in np.arange(32) if mask is None else np.flatnonzero(mask):
            self.store("shared", at, [np.zeros(32, np.uint64)], 8, lane == LANES)
            self.cta.make_barrier(int(at[lane]), count)

    def arrive(self, at: Array, expected: Array | None, mask: Array | None) -> None:
        """One arrival per active lane, after adding the bytes it expects."""
        for lane in np.arange(32) if mask is None else np.flatnonzero(mask):
            phases = self.cta.barrier(int(at[lane]))
            if expected is not None:
                phases.transfer(int(expected[lane]))
            phases.arrive(self.warp.clock)
            self.warp.tick()

    def ask(self, at: Array, parity: Array) -> None:
        """``mbarrier.try_wait``, whose answer ends a block."""
        self.warp.question = at, parity

    # --- between lanes

    def _all(self, mask: Array | None, what: str) -> None:
        if mask is not None:
            raise PtxError(f"{what} by some lanes of a warp only")

    def elect(self, mask: Array | None) -> list[Array]:
        self._all(mask, "elect")
        return [np.zeros(32, np.uint32), LANES == 0]

    def reduce(self, how: str, values: Array, mask: Array | None) -> Array:
        self._all(mask, "redux")
        signed = values.view(np.int32)
        total = {"add": signed.sum(dtype=np.int32), "max": signed.max(), "min": signed.min()}[how]
        return np.full(32, total, np.int32).view(np.uint32)

    def shuffle(self, how: str, values: Array, by: Array, limit: Array, mask: Array | None) -> Array:
        """Among all 32 lanes; those that would read past the end keep their own."""
        self._all(mask, "shfl")
        by = by.astype(np.int64)
        if int(limit[0]) != (0 if how == "up" else 31):
            raise PtxError(f"shfl.{how} among parts of a warp")
        source = {"idx": by & 31, "bfly": LANES ^ by, "up": LANES - by, "down": LANES + by}[how]
        return values[np.where((source >= 0) & (source < 32), source, LANES)]

    # --- matrices

    def load_matrix(self, addresses: Array, count: int, transposed: bool, mask: Array | None) -> list[Array]:
        self._all(mask, "ldmatrix")
        self._count("ldmatrix", addresses[: 8 * count], 16)
        places = self.cta.shared.places(addresses[: 8 * count], 16, "ldmatrix")
        rows = self.cta.shared.read(places, self.warp.number, self.warp.clock)
        return [from_rows(rows[8 * i : 8 * i + 8], transposed) for i in range(count)]

    def store_matrix(self, addresses: Array, values: Sequence[Array], transposed: bool, mask: Array | None) -> None:
        self._all(mask, "stmatrix")
        self._count("stmatrix", addresses[: 8 * len(values)], 16)
        places = self.cta.shared.places(addresses[: 8 * len(values)], 16, "stmatrix")
        data = np.concatenate([to_rows(value, transposed) for value in values])
        self.cta.shared.write(places, data, self.warp.number, self.warp.clock)

    def multiply(
        self, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], kind: str, sums: str, mask: Array | None
    ) -> list[Array]:
        self._all(mask, "mma")
        return mma(a, b, c, kind, sums)

    def start_product(
        self, accumulators: tuple[int, ...], a: Any, b: Array, scale: Array, kind: str, sums: str, mask: Array | None
    ) -> None:
        """``wgmma``: the warp's 16 of 64 rows. Its operands are in use, its sums away, until it has been waited for."""
        self._all(mask, "wgmma")
        R, shared, number = self.warp.R, self.cta.shared, self.warp.number
        for register in accumulators:
            if not isinstance(R[register], InFlight):
                self.sums[register] = np.zeros(32, np.uint32) if R[register] is None else R[register]
                R[register] = InFlight()
        rows = descriptor_addresses(int(b[0]), 4 * len(accumulators) // 2, 32)
        right = rows.astype(np.int64) - SHARED_BASE
        registers, words, where = (), (), np.zeros(0, np.int64)
        if isinstance(a, tuple):
            registers, words = a, tuple(R[register] for register in a)
        else:
            first = 16 * (number % 4)
            where = descriptor_addresses(int(a[0]), 64, 32)[first : first + 16].astype(np.int64) - SHARED_BASE
        for places in (right, where):
            if places.size and (places.min() < 0 or places.max() >= shared.bytes.size):
                raise PtxError("a matrix descriptor that points out of shared memory")
            shared.read(places, number, self.warp.clock, until=PENDING)
        product = Product(accumulators, registers, words, where, right, not bool(scale[0]), kind, sums)
        self.products.append(product)
        if not self.cta.late:
            self._multiplied(product)

    def commit_products(self) -> None:
        self.product_groups.append(self.products)
        self.products = []

    def wait_products(self, left_open: int) -> None:
        """All groups but the last ``left_open`` are done: their sums are back and their operands free."""
        clock = self.warp.clock[self.warp.actor]
        while len(self.product_groups) > left_open:
            for product in self.product_groups.pop(0):
                if self.cta.late:
                    self._multiplied(product)
                for register, words in zip(product.registers, product.words, strict=True):
                    if self.warp.R[register] is not words:
                        raise PtxError("a register operand of wgmma was written before the product was waited for")
                for places in (product.left, product.right):
                    self.cta.shared.read_at[self.warp.number][places] = clock
        waiting = {r for group in (*self.product_groups, self.products) for one in group for r in one.accumulators}
        for register in set(self.sums) - waiting:
            self.warp.R[register] = self.sums.pop(register)

    def _multiplied(self, product: Product) -> None:
        shared = self.cta.shared
        in_registers = bool(product.registers)
        a = left(product.words, product.kind) if in_registers else _rows(shared.bytes[product.left], product.kind)
        b = _rows(shared.bytes[product.right], product.kind)
        total = np.zeros((len(a), len(b)))
        if not product.fresh:
            total = fragment([self.sums[register] for register in product.accumulators], product.sums)
        total = cut_sum(a, b.T, total, 25) if product.sums == "f32" else a @ b.T + total
        for register, words in zip(product.accumulators, accumulate(total, product.sums), strict=True):
            self.sums[register] = words


def _rows(data: Array, kind: str) -> Array:
    words = np.ascontiguousarray(data).view(np.uint32)
    return numbers(words.ravel(), kind).reshape(len(data), -1)


def _maps(parameters: Any) -> list[tuple[TensorMap, int]]:
    from ptx_program import PARAMETERS

    return [
        (value, PARAMETERS + 4096 * i) for i, value in enumerate(parameters.values()) if isinstance(value, TensorMap)
    ]

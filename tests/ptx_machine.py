"""Runs compiled kernels where there is no GPU: PTX, warp by warp, one program after the other.

    machine = Machine(ptx, shared_bytes)
    machine.run(grid, parameters, memory, order=random.Random(0), late=True)

What a GPU would only do wrongly now and then is made certain or an error: asynchronous copies and products happen as
late as they may (``late``) or at once, warps take turns in a random order, memory that nobody wrote is NaN, and shared
memory remembers who touched it (ptx_memory.py). Programs of a grid run one after the other, in a random order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_code import Block, Code, place
from ptx_memory import GlobalMemory, SharedMemory, TensorMap
from ptx_program import Program, parse
from ptx_unit import Copy, PtxError, Unit

__all__ = ["Deadlock", "Machine"]

Array = Any


class Deadlock(Exception):
    """Every warp waits for another."""


@dataclass
class Phases:
    """An mbarrier (PTX ISA 8.7, section 9.7.13.15): arrivals and bytes that its current phase still waits for."""

    count: int
    pending: int
    clock: Array
    bytes: int = 0
    phase: int = 0
    finished: Array | None = None  # clock of the phase that was completed last

    def arrive(self, clock: Array) -> None:
        if self.pending <= 0:
            raise PtxError("more arrivals at an mbarrier than it counts")
        self.pending -= 1
        np.maximum(self.clock, clock, out=self.clock)
        self._complete()

    def transfer(self, count: int, clock: Array | None = None) -> None:
        self.bytes += count
        if clock is not None:
            np.maximum(self.clock, clock, out=self.clock)
            self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending, self.finished = self.count, self.clock.copy()


@dataclass
class Named:
    """A barrier of ``bar.sync``: who has come, and of how many."""

    warps: list[Warp] = field(default_factory=list)
    expected: int = 0


class Machine:
    """One compiled kernel.

    Args:
        ptx: of one entry point.
        shared: bytes of shared memory of a program.
    """

    def __init__(self, ptx: str, shared: int) -> None:
        self.program: Program = parse(ptx)
        self.code = Code(self.program)
        self.shared = shared

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: Sequence[int | TensorMap],
        memory: GlobalMemory,
        *,
        order: random.Random,
        late: bool = True,
        counts: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        """All programs of a grid; ``parameters`` as the entry point lists them.

        Args:
            counts: takes, by kind of access to shared memory, the passes over its banks and how few could do.

        Raises:
            WrongAccess, Race, Deadlock, PtxError: what a GPU would fault on, hang on or do wrongly.
        """
        if len(parameters) > len(self.program.parameters):
            raise PtxError(f"{len(parameters)} parameters for {self.program.parameters}")
        values = place(self.program, parameters)
        atomics = any(one.opcode[0] == "atom" for one in self.program.instructions)
        early = any(one.opcode[:2] == ("griddepcontrol", "launch_dependents") for one in self.program.instructions)
        programs = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        order.shuffle(programs)
        with np.errstate(all="ignore"):
            for number, program in enumerate(programs):
                # where programs do not talk to each other, each has its own time
                among = (number, len(programs)) if atomics else (0, 1)
                if early:
                    memory.begin_early()
                Cta(self, program, grid, values, memory, order, late, among, counts).run()
                if memory.waited == []:
                    raise PtxError(f"program {program} ends without griddepcontrol.wait: the next kernel relies on it")


class Cta:
    """One program of the grid: its warps and all they share."""

    def __init__(
        self,
        machine: Machine,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        values: Mapping[str, Any],
        memory: GlobalMemory,
        order: random.Random,
        late: bool,
        among: tuple[int, int],
        counts: dict[str, tuple[int, int]] | None,
    ) -> None:
        self.counts = counts
        count = machine.program.threads // 32
        self.first, self.actors = among[0] * (count + 1), among[1] * (count + 1)
        self.code, self.parameters, self.memory, self.order, self.late = machine.code, values, memory, order, late
        self.shared = SharedMemory(machine.shared, count + 1, self.first)
        self.engine = count
        self.ticks = 0
        self.phases: dict[int, Phases] = {}
        self.named: dict[int, Named] = {}
        self.copies: list[Copy] = []
        self.free_registers = 0  # given up by warps; those of the program's start are all taken
        self.warps = [Warp(self, number, place, grid) for number in range(count)]

    def run(self) -> None:
        """Warps in turns, in a random order, each until it has to wait; then what is asynchronous goes on."""
        while True:
            ready = [warp for warp in self.warps if warp.can_run()]
            if ready:
                self.order.choice(ready).run()
            elif self.copies:
                self.finish(self.order.randrange(len(self.copies)))
            elif all(warp.done for warp in self.warps):
                break
            else:
                raise Deadlock("; ".join(f"warp {w.number}: {w.where()}" for w in self.warps if not w.done))
        for at, phases in self.phases.items():
            if phases.bytes:
                raise PtxError(f"the mbarrier at {at} still waits for {phases.bytes} bytes when the program ends")

    def barrier(self, at: int) -> Phases:
        if at not in self.phases:
            raise PtxError(f"no mbarrier was initialised at {at}")
        return self.phases[at]

    def make_barrier(self, at: int, count: int) -> None:
        self.phases[at] = Phases(count, count, np.zeros(self.actors, np.int32))

    def ask(self, copy: Copy) -> None:
        """A copy begins: from now on nobody may touch its place."""
        self.shared.claim(copy.places, self.engine, copy.clock)
        self.copies.append(copy)
        if not self.late:
            self.finish(len(self.copies) - 1)

    def finish(self, which: int) -> None:
        """The copy engine writes a box, counts its bytes, and lets those who wait see it."""
        copy = self.copies.pop(which)
        data = copy.map.load(self.memory, copy.start, copy.clock)
        self.ticks += 1
        tick = self.ticks
        self.shared.complete(copy.places, data.ravel(), self.engine, tick)
        seen = copy.clock.copy()
        seen[self.first + self.engine] = tick
        self.barrier(copy.barrier).transfer(-copy.map.bytes, seen)

    def meet(self, warp: Warp, barrier: int, threads: int | None) -> None:
        """``bar.sync``: the warp waits; the last to come lets all go."""
        named = self.named.setdefault(barrier, Named())
        expected = (threads or 32 * len(self.warps)) // 32
        if named.warps and named.expected != expected:
            raise PtxError(f"barrier {barrier}: of {named.expected} warps and of {expected}")
        named.expected = expected
        named.warps.append(warp)
        warp.waits = f"bar.sync {barrier} with {32 * expected} threads"
        if len(named.warps) < expected:
            return
        clock = np.maximum.reduce([one.clock for one in named.warps])
        for one in named.warps:
            one.clock = clock.copy()
            one.tick()
            one.waits = None
        del self.named[barrier]


class Warp:
    """32 threads: registers, where they are, and what they wait for."""

    def __init__(self, cta: Cta, number: int, place: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        self.cta, self.number = cta, number
        self.R: list[Any] = [None] * len(cta.code.program.registers)
        self.groups: list[tuple[int, Array]] = [(0, np.ones(32, bool))]  # where, and which lanes are there
        self.waits: str | None = None
        self.allotted = cta.code.program.allotted
        self.wanted: int | None = None  # registers per thread that it waits for
        self.polls: tuple[int, int] | None = None
        self.actor = cta.first + number  # its place in vector clocks
        self.clock = np.zeros(cta.actors, np.int32)
        self.clock[self.actor] = 1
        self.special = {
            f"%{name}.{axis}": np.full(32, value[i], np.uint32)
            for name, value in (("ctaid", place), ("nctaid", grid))
            for i, axis in enumerate("xyz")
        }
        self.special["%tid.x"] = np.arange(32, dtype=np.uint32) + np.uint32(32 * number)
        self.special["%laneid"] = np.arange(32, dtype=np.uint32)
        self.question: tuple[Array, Array] | None = None  # the mbarrier and parity that try_wait asks for
        self.unit = Unit(cta, self)

    @property
    def done(self) -> bool:
        return not self.groups

    def can_run(self) -> bool:
        """Whether what it waited for has come; takes it."""
        if self.wanted is not None:
            more = 32 * (self.wanted - self.allotted)
            if more <= self.cta.free_registers:
                self.cta.free_registers -= more
                self.allotted, self.wanted, self.waits = self.wanted, None, None
        if self.polls is not None and self.cta.barrier(self.polls[0]).phase != self.polls[1]:
            self.polls = None
        return not self.done and self.waits is None and self.polls is None

    def where(self) -> str:
        at = self.groups[0][0] if self.groups else 0
        instructions = self.cta.code.program.instructions
        waits = self.waits or (f"mbarrier at {self.polls[0]}, parity {self.polls[1]}" if self.polls else "")
        return f"{waits} before {instructions[min(at, len(instructions) - 1)].text!r}"

    def tick(self) -> None:
        """What this warp does from now on is later than what it has told the others."""
        self.clock[self.actor] += 1

    def run(self) -> None:
        """Until it has to wait or ends."""
        while self.groups and self.waits is None and self.polls is None:
            self.groups.sort(key=lambda group: group[0])
            at, mask = self.groups.pop(0)
            while self.groups and self.groups[0][0] == at:  # lanes that took different ways meet again
                mask = mask | self.groups.pop(0)[1]
            block = self.cta.code.block(at)
            try:
                block.execute(self, None if mask.all() else mask)
                self.groups += self._next(block, mask)
            except Exception as error:
                error.add_note(f"warp {self.number}: {block.failing(error)}")
                raise

    def _next(self, block: Block, mask: Array) -> Iterator[tuple[int, Array]]:
        """Where the lanes go after a block, by its last instruction."""
        last, after = block.last, block.end
        if last is None:
            return iter([(after, mask)])
        kind = last.opcode[0]
        taken = mask
        if last.predicate is not None:
            value = self.R[last.predicate.index]
            taken = mask & (~value if last.negated else value)
        if kind == "ret":
            return iter([(after, mask & ~taken)] if (mask & ~taken).any() else [])
        if kind == "bra":
            ways = [(self.cta.code.program.target(last.operands[0]), taken), (after, mask & ~taken)]
            return iter([(to, lanes) for to, lanes in ways if lanes.any()])
        if kind == "brx":
            return iter(self._table(last, taken))
        gone = ~mask.copy()
        for _, others in self.groups:
            gone &= ~others
        if taken.any() and not (mask | gone).all():
            raise PtxError(f"{last.text!r} is reached by some lanes of a warp only")
        if taken.any():
            self._wait(last, block)
        return iter([(after, mask)])

    def _table(self, last: Any, mask: Array) -> list[tuple[int, Array]]:
        index = self.R[last.operands[0].index]
        names = self.cta.code.program.branch_targets[last.operands[1].name]
        ways = [(self.cta.code.program.labels[name], mask & (index == i)) for i, name in enumerate(names)]
        return [(to, lanes) for to, lanes in ways if lanes.any()]

    def _wait(self, last: Any, block: Block) -> None:
        kind = last.opcode[0]
        if kind == "setmaxnreg":
            self._resize(last)
            return
        if kind in ("bar", "barrier"):
            number, *count = (operand.value for operand in last.operands)
            self.cta.meet(self, number, count[0] if count else None)
            return
        # mbarrier.try_wait: it may give up after a while and is asked again; here it is asked once there is an answer
        at, parity = (int(value[0]) for value in self.question)
        phases = self.cta.barrier(at)
        target = last.operands[0].index
        if phases.phase == parity:
            self.R[target] = np.zeros(32, bool)
            self.polls = at, parity
            return
        self.R[target] = np.ones(32, bool)
        if phases.finished is not None:
            np.maximum(self.clock, phases.finished, out=self.clock)

    def _resize(self, last: Any) -> None:
        """``setmaxnreg``: give registers to the program's other warps, or wait until they have given enough."""
        count, grows = last.operands[0].value, "inc" in last.opcode
        if not self.allotted:
            raise PtxError(f"{last.text!r} where no .maxnreg says how many registers there are")
        if count != self.allotted and grows is not (count > self.allotted):
            raise PtxError(f"{last.text!r} with {self.allotted} registers")
        if grows:
            self.wanted, self.waits = count, f"{count} registers per thread, it has {self.allotted}"
        else:
            self.cta.free_registers += 32 * (self.allotted - count)
            self.allotted = count

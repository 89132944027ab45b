"""The Gluon family's barriers without a GPU: producer, consumers and copies of one program, under random timing.

The slots and phases are hopper_plan.py's functions, which the kernel itself compiles. What an mbarrier does is taken
from the PTX ISA; that the hardware does it remains to be seen on a GPU.
"""

import random

import pytest

from lowbit_kernels.hopper_plan import slot_of, slot_phase


class Barrier:
    """PTX ISA, "mbarrier": a phase ends when all arrivals and announced bytes are in."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def _turn(self):
        assert self.pending >= 0, "more arrivals than the barrier expects"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def arrive(self, announced=0):
        self.bytes += announced
        self.pending -= 1
        self._turn()

    def copied(self, count):
        self.bytes -= count
        self._turn()

    def passed(self, parity):
        return self.phase & 1 != parity


class Ring:
    """Producer, consumers and copies of one program, each advanced at random; data are the numbers of their steps."""

    def __init__(self, stages, consumers, steps, releases=None, slot_phase=slot_phase):
        self.stages, self.steps, self.slot_phase = stages, steps, slot_phase
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(releases or consumers) for _ in range(stages)]
        self.data = [None] * stages
        self.copies = []
        self.actors = [self.produce(), *(self.consume() for _ in range(consumers))]

    def produce(self):
        for i in range(self.steps):
            slot = slot_of(i, self.stages)
            while not self.empty[slot].passed(self.slot_phase(i, self.stages) ^ 1):
                yield "wait"
            self.full[slot].arrive(announced=1)
            self.data[slot] = "under way"
            self.copies.append((slot, i))
            yield "go"

    def read(self, slot, i):
        if i < self.steps:
            assert self.data[slot] == i, f"slot {slot} holds {self.data[slot]}, wanted step {i}"

    def consume(self):
        """hopper_kernel._consume with two products per step: words come two ahead, fragments are made one ahead."""
        while not self.full[0].passed(0):
            yield "wait"
        self.read(0, 0)
        for i in range(self.steps):
            slot, after = slot_of(i, self.stages), slot_of(i + 1, self.stages)
            for last in (False, True):
                if not last:
                    while i + 1 < self.steps and not self.full[after].passed(self.slot_phase(i + 1, self.stages)):
                        yield "wait"
                    self.read(slot, i)  # scales and zeros of the second piece
                self.read(after, i + 1)  # words of the next step's first piece, then its scales and zeros
                self.read(slot, i)  # wgmma begins to read x ...
                yield "go"
                self.read(slot, i)  # ... and has read it when it is waited for; then the scales
                yield "go"
            self.empty[slot].arrive()
            yield "go"

    def run(self, seed):
        """Until everyone is done. RuntimeError when all wait and no copy is under way."""
        chance = random.Random(seed)
        alive, stuck = list(self.actors), 0
        while alive:
            choice = chance.randrange(len(alive) + 1)
            if choice == len(alive):
                if self.copies:
                    slot, i = self.copies.pop(chance.randrange(len(self.copies)))
                    self.data[slot] = i
                    self.full[slot].copied(1)
                    stuck = 0
                continue
            state = next(alive[choice], "done")
            if state == "done":
                alive.pop(choice)
            stuck = stuck + 1 if state == "wait" else 0
            if stuck > 200 and not self.copies:
                raise RuntimeError("deadlock")


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("consumers", [1, 2])
def test_the_ring_neither_stops_nor_gives_old_data(stages, consumers):
    for steps in (1, 2, stages - 1, stages, stages + 1, 4 * stages + 3):
        for seed in range(20):
            Ring(stages, consumers, max(1, steps)).run(seed)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("deadlock", {"stages": 1, "consumers": 1}),
        ("deadlock|holds", {"stages": 3, "consumers": 2, "releases": 3}),
        ("holds|more arrivals|deadlock", {"stages": 3, "consumers": 2, "releases": 1}),
        ("holds|deadlock", {"stages": 3, "consumers": 1, "slot_phase": lambda i, stages: 0}),
        ("holds|deadlock", {"stages": 3, "consumers": 1, "slot_phase": lambda i, stages: i & 1}),
    ],
)
def test_a_wrong_ring_is_caught(message, arguments):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        for seed in range(50):
            Ring(steps=12, **arguments).run(seed)

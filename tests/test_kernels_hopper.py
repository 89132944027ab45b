"""The Gluon family without a GPU: its arithmetic, indices and barriers run in Python, its code is compiled and read.

Three emulations, each on the functions that the kernel itself compiles (hopper_plan.py): the assembly, over all inputs;
one launch with copies, rings, fragments, splits and stores, in float64; and the barriers, under random timing. None of
them knows what the hardware does: that the instructions mean what is assumed here remains to be seen on a GPU.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from lowbit_kernels import hopper, hopper_plan
from lowbit_kernels.hopper_plan import (
    first_step,
    gluon_shared_bytes,
    gluon_why_not,
    group_of,
    pair_shift,
    pair_text,
    reps,
    runs_of_step,
    slot_of,
    slot_phase,
    unit_slot,
)
from lowbit_kernels.layout import to_tiles
from lowbit_kernels.tiles import Problem, Tile

BF16, FP16 = torch.bfloat16, torch.float16


def packed(codes, bits):
    """Codes (R, C) -> the checkpoint's int32 words (R, ceil(C * bits / 32))."""
    per_word = 32 // bits
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // per_word) * per_word), np.uint64)
    padded[:, :columns] = codes
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    words = (padded.reshape(rows, -1, per_word) << shifts).sum(axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def weight(rng, n, k, bits, group, asymmetric):
    """Codes (n, k), zeros (G, n), scales (G, n), and tiles as the GPU has them."""
    groups = 1 if group == -1 else k // group
    codes = rng.integers(0, 2**bits, (n, k))
    zeros = rng.integers(0, 2**bits, (groups, n)) if asymmetric else np.full((groups, n), 2 ** (bits - 1))
    scales = rng.uniform(0.5, 2.0, (groups, n))
    tiles, _, _ = to_tiles(packed(codes, bits), torch.from_numpy(scales.T), None, bits, k)
    return codes, zeros, scales, tiles.numpy().view(np.uint32)


# --- the operand: assembly


def halves_of(words, bf16):
    """int32 words -> their two floats, float64 (2, ...)."""
    halves = np.stack([words & 0xFFFF, words >> 16]).astype(np.uint32)
    return (halves << 16).view(np.float32).astype(np.float64) if bf16 else halves.astype(np.uint16).view(
        np.float16
    ).astype(np.float64)  # fmt: skip


def words_of(floats, bf16):
    """Inverse of halves_of, for values that are exact: no rounding is emulated."""
    bits = (floats.astype(np.float32).view(np.uint32) >> 16) if bf16 else floats.astype(np.float16).view(np.uint16)
    words = bits[0].astype(np.uint32) | bits[1].astype(np.uint32) << 16
    assert np.array_equal(halves_of(words, bf16), floats), "rounds"
    return words


def execute(text, word, centre, bf16):
    """Run pair_text's PTX on uint32 arrays."""
    held = {"$1": word, "$2": centre}

    def value(name):
        return held[name] if name in held else np.full_like(word, int(name, 0))

    for line in re.fullmatch(r"\{ \.reg [^;]+; (.*); \}", text)[1].split("; "):
        name, operands = line.split(" ", 1)
        target, *rest = operands.split(", ")
        if name == "mov.b32":
            held[target] = value(rest[0])
        elif name == "lop3.b32":
            a, b, c = map(value, rest[:3])
            held[target] = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}[int(rest[3], 0)]
        elif name == "prmt.b32":
            both = value(rest[0]).astype(np.uint64) | value(rest[1]).astype(np.uint64) << np.uint64(32)
            picks = [int(rest[2], 0) >> 4 * j & 7 for j in range(4)]
            held[target] = sum((both >> np.uint64(8 * p) & np.uint64(0xFF)) << np.uint64(8 * j) for j, p in
                               enumerate(picks)).astype(np.uint32)  # fmt: skip
        elif name.startswith("fma.rn"):
            a, b, c = (halves_of(value(r), bf16) for r in rest)
            held[target] = words_of(a * b + c, bf16)
        elif name.startswith("add.rn"):
            a, b = (halves_of(value(r), bf16) for r in rest)
            held[target] = words_of(a + b, bf16)
        else:
            raise AssertionError(f"{name} is not emulated")
    return held["$0"]


def centre_word(zeros, bits, bf16):
    """hopper_operand.centre_of, of an array of zeros."""
    if bf16 and bits == 8:
        return words_of(np.stack([128.0 - zeros] * 2), True)
    constant = hopper_plan.CENTRE_BF16 if bf16 else hopper_plan.CENTRE_FP16
    return ((zeros.astype(np.int64) * 0x10001) | constant).astype(np.int64).astype(np.uint32)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_half_word_becomes_its_code_less_its_zero_exactly(bits, bf16):
    """All 65,536 values of either half, every pair, symmetric and with every zero."""
    every = np.arange(1 << 16, dtype=np.uint32)
    words = every | np.roll(every, 12345) << 16
    for index in range(16 // bits):
        shifted = (words.view(np.int32) >> pair_shift(bits, bf16, index)).view(np.uint32)
        codes = np.stack([every, np.roll(every, 12345)]) >> np.uint32(bits * index) & np.uint32(2**bits - 1)
        got = halves_of(execute(pair_text(bits, bf16, index, False), shifted, words, bf16), bf16)
        assert np.array_equal(got, codes.astype(np.float64) - 2 ** (bits - 1))
        for zero in range(2**bits):
            part = slice(zero, None, 2**bits if bits == 8 else 1)  # each zero with other codes; all of them in the sum
            centre = centre_word(np.full(shifted[part].shape, zero), bits, bf16)
            got = halves_of(execute(pair_text(bits, bf16, index, True), shifted[part], centre, bf16), bf16)
            assert np.array_equal(got, codes[:, part].astype(np.float64) - zero)


def test_wrong_assembly_is_seen():
    words = np.arange(1 << 16, dtype=np.uint32)
    good = pair_text(4, True, 0, False)
    for old, new in (("0xea", "0x6a"), ("0x000f000f", "0x000f0007"), ("0xc308c308", "0xc308c309")):
        bad = execute(good.replace(old, new), words | words << 16, words, True)
        same = np.array_equal(bad, execute(good, words | words << 16, words, True))
        assert same == (old == "0xea")  # below 128 "or" is "xor": the only change that must not matter


# --- the operand: who holds what


def owned(bases, *indices):
    """Element of a linear layout: the sum of the bases of the indices' set bits."""
    place = np.zeros(3, int)
    for index, group in zip(indices, bases, strict=True):
        for bit, base in enumerate(group):
            if index >> bit & 1:
                place += base
    return place


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_loads_the_words_of_its_own_part_of_the_register_operand(bits):
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", matrix A: register r of lane l of warp w holds
    rows 16w + l / 4 + 8 (r odd), columns 2 (l % 4) + 8 (r >= 2) and the next. All from the lane's own two loads."""
    codes, _, _, tiles = weight(np.random.default_rng(0), 64, 512 // bits, bits, -1, False)
    block = tiles[:, 0].reshape(4, 8, 32)
    unit, _ = hopper._register_layouts()
    bases = (unit.reg_bases, unit.lane_bases, unit.warp_bases)
    for warp in range(4):
        for lane in range(32):
            words = [block[tuple(owned(bases, register, lane, warp))] for register in range(8)]
            for j in range(512 // bits // 16):  # one instruction each
                i, b = divmod(j, 2)
                for r in range(4):
                    u, below = divmod(r, 2)
                    word = int(words[4 * below + 2 * b + u]) >> bits * i
                    row, column = 16 * warp + lane // 4 + 8 * below, 16 * j + 2 * (lane % 4) + 8 * u
                    mask = 2**bits - 1
                    assert [word & mask, word >> 16 & mask] == codes[row, column : column + 2].tolist()


def test_loads_of_words_meet_no_bank_twice():
    """Eight lanes at a time read 16 bytes each of the 128-byte swizzled ring: all 32 banks once."""
    unit, _ = hopper._register_layouts()
    for load in (0, 4):
        for first in range(0, 32, 8):
            banks = set()
            for lane in range(first, first + 8):
                _, line, word = owned((unit.reg_bases, unit.lane_bases, unit.warp_bases), load, lane, 0)
                banks.add((word // 4) ^ (line % 8))
            assert banks == set(range(8))


# --- one launch


def box(array, origin, shape):
    """What the copy engine brings: a block at origin, zeros outside of the array."""
    out = np.zeros(shape, array.dtype)
    inside = tuple(slice(o, min(o + s, a)) for o, s, a in zip(origin, shape, array.shape, strict=True))
    part = array[inside]
    out[tuple(slice(0, s) for s in part.shape)] = part
    return out


def fragment(words, zeros, bits, first, count):
    """hopper_operand.fragment_of, with the values that the assembly gives: (64, 32 * count)."""
    words = words.reshape(64, 4, 2, 2)
    mask = np.uint32(2**bits - 1)
    columns = [
        np.stack([words >> np.uint32(bits * i) & mask, words >> np.uint32(bits * i + 16) & mask], axis=-1)
        for i in range(first, first + count)
    ]
    natural = np.stack(columns, axis=1).transpose(0, 1, 3, 4, 2, 5)  # row, i, t, b, u, h -> row, i, b, u, t, h
    return natural.reshape(64, 32 * count).astype(np.float64) - zeros[:, None]


def multiply(x, tiles, scales, zeros, row, token, steps, first, problem, tile):
    """A program's consumers, after its producer: sums (block_n, block_m) of steps first .. first + steps."""
    bits, group, k = problem.bits, problem.group_size, problem.k
    units, runs, blocks = bits // 4, runs_of_step(group), tile.block_n // 64
    flat_scales, flat_zeros = scales.reshape(-1), zeros.reshape(-1).astype(np.float64)
    lines = tiles.reshape(tiles.shape[0], -1, 32)
    x_ring, w_ring, rows_ring = {}, {}, {}
    sums = np.zeros((blocks, 64, tile.block_m))
    for i in range(steps):
        slot, step = slot_of(i, tile.num_stages), first + i
        x_ring[slot] = box(x, (token, step * 128), (tile.block_m, 128))
        for block in range(blocks):
            for u in range(units):
                origin = (row // 16 + 4 * block, (step * units + u) * 8, 0)
                w_ring[unit_slot(slot, block, u, blocks, units)] = box(lines, origin, (4, 8, 32))
        for run in range(runs):
            at = group_of(step, run, k, group, runs) * problem.n + row
            rows_ring[slot * runs + run] = [box(a, (at,), (tile.block_n,)) for a in (flat_scales, flat_zeros)]
        run_columns = 128 // max(runs, 1)
        columns = min(512 // bits, run_columns, 64 if reps(tile) == 1 else 128)
        for block in range(blocks):
            last = np.minimum(row + 64 * block + np.arange(64), problem.n - 1)
            for column in range(0, 128, columns):
                words = w_ring[unit_slot(slot, block, column // (512 // bits), blocks, units)]
                if runs:
                    scale, zero = (a[64 * block :][:64] for a in rows_ring[slot * runs + column // run_columns])
                else:
                    scale, zero = scales[0, last], zeros[0, last]
                part = fragment(words, zero, bits, column % (512 // bits) // 32, columns // 32)
                sums[block] += scale[:, None] * (part @ x_ring[slot][:, column : column + columns].T)
    return sums


def launch(x, tiles, scales, zeros, bias, problem, tile):
    """hopper_kernel over its grid, the splits in the worst order for a reduction that depends on it."""
    m, n, k = problem.m, problem.n, problem.k
    out, consumers = np.full((m, n), np.nan), tile.num_warps // 4
    tiles_m = -(-m // tile.block_m)
    for index in range(tiles_m * -(-n // tile.block_n)):
        token, row = index % tiles_m * tile.block_m, index // tiles_m * tile.block_n
        partials, counts = {}, [0] * consumers
        for split in reversed(range(tile.split_k)):
            first = first_step(split, k, tile.split_k)
            steps = first_step(split + 1, k, tile.split_k) - first
            assert steps >= 1
            sums = multiply(x, tiles, scales, zeros, row, token, steps, first, problem, tile)
            for warpgroup in range(consumers):
                part = slice(warpgroup * reps(tile), (warpgroup + 1) * reps(tile))
                partials[warpgroup, split] = sums[part].reshape(-1, tile.block_m)
                counts[warpgroup] += 1
                if counts[warpgroup] < tile.split_k:
                    continue
                total = sum(partials[warpgroup, s] for s in range(tile.split_k))
                rows = row + warpgroup * reps(tile) * 64 + np.arange(reps(tile) * 64)
                tokens = token + np.arange(tile.block_m)
                inside, present = rows < n, tokens < m
                block = (total + bias[np.minimum(rows, n - 1)][:, None])[inside][:, present]
                out[np.ix_(tokens[present], rows[inside])] = block.T
    return out


LAUNCHES = [
    (37, 200, 384, 4, 128, False, Tile("gluon", 32, 256, 2, 4, 4)),
    (37, 200, 384, 4, 128, True, Tile("gluon", 16, 256, 3, 4, 2)),
    (65, 130, 320, 4, 64, True, Tile("gluon", 64, 128, 1, 8, 3)),
    (5, 77, 352, 4, 32, True, Tile("gluon", 32, 128, 2, 4, 5)),
    (17, 17, 264, 4, -1, True, Tile("gluon", 64, 128, 3, 4, 2)),
    (130, 300, 256, 4, 128, False, Tile("gluon", 128, 128, 1, 8, 5)),
    (70, 300, 512, 8, 128, True, Tile("gluon", 64, 256, 2, 8, 3)),
    (33, 136, 192, 8, 64, False, Tile("gluon", 64, 128, 2, 8, 4)),
    (33, 136, 160, 8, 32, True, Tile("gluon", 32, 128, 1, 4, 3)),
    (3, 9, 1000, 8, -1, True, Tile("gluon", 128, 128, 4, 8, 2)),
]


@pytest.mark.parametrize(("m", "n", "k", "bits", "group", "asymmetric", "tile"), LAUNCHES)
def test_a_launch_computes_the_product(m, n, k, bits, group, asymmetric, tile):
    """Ring slots are reused across steps, shapes are odd, every element of out is written once: no NaN is left."""
    rng = np.random.default_rng(m * n + k)
    problem = Problem(m, n, k, bits, group, BF16, asymmetric)
    assert gluon_why_not(tile, problem) is None
    codes, zeros, scales, tiles = weight(rng, n, k, bits, group, asymmetric)
    x, bias = rng.standard_normal((m, k)), rng.standard_normal(n)
    columns = np.arange(k) // (k if group == -1 else group)
    dense = (codes - zeros.T[:, columns]) * scales.T[:, columns]
    np.testing.assert_allclose(launch(x, tiles, scales, zeros, bias, problem, tile), x @ dense.T + bias, atol=1e-9)


def test_shares_of_the_columns_are_whole_and_even():
    for k in (1, 128, 129, 4096, 28_672):
        steps = -(-k // 128)
        for split in {1, 2, min(3, steps), min(7, steps), steps} - {0}:
            if split > steps:
                continue
            bounds = [first_step(s, k, split) for s in range(split + 1)]
            shares = np.diff(bounds)
            assert bounds[0] == 0 and bounds[-1] == steps and shares.min() >= 1 and np.ptp(shares) <= 1


# --- the barriers


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
        """hopper_kernel._consume with two products per step."""
        while not self.full[0].passed(0):
            yield "wait"
        self.read(0, 0)
        for i in range(self.steps):
            slot, after = slot_of(i, self.stages), slot_of(i + 1, self.stages)
            for last in (False, True):
                if last:
                    while i + 1 < self.steps and not self.full[after].passed(self.slot_phase(i + 1, self.stages)):
                        yield "wait"
                    self.read(after, i + 1)
                else:
                    self.read(slot, i)
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
        ("holds|more arrivals", {"stages": 3, "consumers": 2, "releases": 1}),
        ("holds|deadlock", {"stages": 3, "consumers": 1, "slot_phase": lambda i, stages: 0}),
        ("holds|deadlock", {"stages": 3, "consumers": 1, "slot_phase": lambda i, stages: i & 1}),
    ],
)
def test_a_wrong_ring_is_caught(message, arguments):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        for seed in range(50):
            Ring(steps=12, **arguments).run(seed)


# --- what the compiler made of it

COMPILED = [
    (Tile("gluon", 64, 256, 2, 8, 6), 4, 128, BF16, True, 1.2),
    (Tile("gluon", 32, 256, 4, 4, 4), 4, 128, BF16, False, 1.1),
    (Tile("gluon", 64, 256, 2, 8, 4), 8, 128, BF16, False, 1.5),
]


@pytest.fixture(scope="module", params=COMPILED, ids=lambda p: f"{p[0].block_m}x{p[0].block_n} {p[1]} bits")
def compiled(request):
    tile, bits, group, dtype, asymmetric, budget = request.param
    problem = Problem(4 * tile.block_m, 4096, 4096, bits, group, dtype, asymmetric)
    case = hopper.compile_case(tile, problem)
    names = list(case.signature)
    source = GluonASTSource(
        case.kernel,
        dict(case.signature),
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))
    return tile, problem, case, kernel, budget


def memory_lines(ptx):
    wanted = r"wgmma|mbarrier|bar\.sync|ld\.shared|ldmatrix|st\.shared|cp\.async|fence|barrier\.sync"
    return [line.strip() for line in ptx.splitlines() if re.search(wanted, line) and "//" not in line.strip()[:2]]


def test_each_release_follows_a_barrier_of_its_warpgroup(compiled):
    """Only waits, barriers and arithmetic lie between the last read of a slot and its release."""
    tile, _, _, kernel, _ = compiled
    lines = memory_lines(kernel.asm["ptx"])
    releases = [i for i, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(releases) == tile.num_warps // 4
    for i in releases:
        assert lines[i - 1].startswith(("bar.sync", "barrier.sync")) and "128" in lines[i - 1]
        earlier = [line for line in lines[:i] if "wgmma" in line]
        assert "wgmma.wait_group.sync.aligned 0" in earlier[-1]


def test_weights_are_the_register_operand_and_are_never_stored(compiled):
    ptx = compiled[3].asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (.)", ptx)
    assert products and set(products) == {"{"}
    loops = ptx.split("wgmma.mma_async")[1:-1]
    assert not any("st.shared" in part and "setmaxnreg" not in part for part in loops)


def test_the_copies_bring_what_the_barrier_expects(compiled):
    """Bytes of the copies that the producer issues per step, each with its box, against the number announced."""
    tile, problem, _, kernel, _ = compiled
    announced = {int(n) for n in re.findall(r"mbarrier\.arrive\.expect_tx\S+ _, \[%r\d+\], (\d+)", kernel.asm["ptx"])}
    x = tile.block_m * 128 * 2
    words = tile.block_n * 128 * problem.bits // 8
    rows = runs_of_step(problem.group_size) * tile.block_n * (3 if problem.asymmetric else 2)
    assert announced == {x + words + rows}
    boxes = [np.prod(meta["block_size"]) * meta["elem_size"] for meta in kernel.metadata.tensordesc_meta]
    issued = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", kernel.asm["ptx"]))
    counts = [x // boxes[0], words // boxes[1], runs_of_step(problem.group_size)]
    assert issued == sum(counts) + (counts[2] if problem.asymmetric else 0)
    assert counts[0] * boxes[0] == x and counts[1] * boxes[1] == words and boxes[2] == 2 * tile.block_n
    assert gluon_shared_bytes(tile, problem) >= kernel.metadata.shared


def test_barriers_are_fenced_before_the_roles_part(compiled):
    lines = memory_lines(compiled[3].asm["ptx"])
    fence = next(i for i, line in enumerate(lines) if line.startswith("fence.proxy.async"))
    begun = max(i for i, line in enumerate(lines) if "mbarrier.init" in line)
    assert begun < fence < next(i for i, line in enumerate(lines) if "mbarrier.try_wait" in line)


def inner_loops(sass):
    """Innermost loops with products: lists of (opcode, operands). Waits' retries jump back too, but always."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    code = [(int(address, 16), op, rest, guard) for address, guard, op, rest in found]
    ranges = []
    for address, op, rest, guard in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op == "BRA" and guard and target and int(target[1], 16) <= address:
            body = [c for c in code if int(target[1], 16) <= c[0] <= address]
            if any(c[1].startswith("HGMMA") for c in body):
                ranges.append((int(target[1], 16), address, body))
    return [
        [c[1:3] for c in body]
        for low, high, body in ranges
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b, _ in ranges)
    ]


def test_fragments_are_made_while_the_tensor_cores_work(compiled, tmp_path):
    """In each loop: one wait per piece, and conversions between a product's issue and its wait.

    ptxas puts about half of them there and the others behind the wait, where the other warpgroup's products run.
    """
    tile, problem, _, kernel, budget = compiled
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    loops = inner_loops(sass)
    assert len(loops) == tile.num_warps // 4
    for loop in loops:
        products = [op for op, _ in loop if op.startswith("HGMMA")]
        assert len(products) == 8 * reps(tile)  # all 128 columns of each 64 rows, by 16
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op, _ in loop) == reps(tile) * problem.bits // 4
        multiplying, outside, lop3 = False, 0, 0
        for op, operands in loop:
            multiplying = op.startswith("HGMMA") or (multiplying and not op.startswith("WARPGROUP.DEPBAR"))
            converts = op.startswith("LOP3") and re.search("0xf000f|0x7f007f|0x800080", operands)
            lop3 += bool(converts)
            outside += bool(converts) and not multiplying
        assert lop3 == reps(tile) * 64 // 2 * problem.bits // 4 and outside <= 0.7 * lop3
        integer = sum(op.split(".")[0] in {"LOP3", "SHF", "PRMT", "IADD3", "LEA", "IMAD", "ISETP"} and not
                      op.startswith("IMAD.MOV") for op, _ in loop)  # fmt: skip
        assert integer / (reps(tile) * 64) <= budget


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 2}, "4 and 8 bits"),
        ({"k": 4100, "group_size": -1}, "K must be a multiple of 8"),
        ({"block_m": 8}, "block_m must be 16"),
        ({"block_m": 256}, "block_m must be 16"),
        ({"num_warps": 2}, "num_warps 4 or 8"),
        ({"block_n": 96}, "block_n must be"),
        ({"block_n": 512}, "block_n must be"),
        ({"block_m": 128}, "registers"),
        ({"group_size": 32}, "registers"),
        ({"num_stages": 1}, "num_stages must be 2 to 8"),
        ({"num_stages": 8}, "bytes of shared memory"),
        ({"split_k": 33}, "split_k must be between 1 and the 32 steps"),
        ({"m": 1 << 24, "n": 256}, "split_k must be 1 for more than 65536 output tiles"),
        ({"n": 1 << 27, "split_k": 1, "group_size": 128}, "32-bit coordinates"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change, reason):
    problem = {"m": 64, "n": 4096, "k": 4096, "bits": 4, "group_size": 128, "dtype": BF16}
    tile = {"family": "gluon", "block_m": 64, "block_n": 256, "split_k": 2, "num_warps": 8, "num_stages": 6}
    for name, value in change.items():
        (problem if name in problem else tile)[name] = value
    assert reason in gluon_why_not(Tile(**tile), Problem(**problem))


def test_shipped_tiles_fit_and_promise_enough_shared_memory():
    for case in hopper.compile_cases():
        tile, bound = case.extra["tile"], case.extra["shared_bound"]
        assert bound * (2 if tile.num_warps == 4 else 1) <= hopper_plan.SHARED_LIMIT, case.name


def test_cpu_tensors_are_refused_before_anything_runs():
    x, tiles, scales = torch.zeros(4, 128), torch.zeros(1, 1, 16, 16, dtype=torch.int32), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="CUDA device, got x on cpu"):
        hopper.hopper_matmul(
            x, tiles, scales, None, None, bits=4, group_size=128, n=16, tile=Tile("gluon", 16, 64, 1, 4, 4)
        )


def test_a_triton_without_gluon_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    with pytest.raises(RuntimeError, match=r"needs triton 3\.6"):
        hopper._gluon()

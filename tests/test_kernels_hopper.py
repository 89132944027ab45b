"""The Gluon family's arithmetic and indices without a GPU, on the functions that its kernel compiles (hopper_plan.py).

Two emulations: the assembly, over all inputs; and one launch with copies, rings, fragments, splits and stores, in
float64. Neither knows what the hardware does: that the instructions mean what is assumed here remains to be seen on a
GPU. The barriers: test_kernels_hopper_ring.py; what the compiler makes of it: test_kernels_hopper_code.py.
"""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")


from helpers import needs_gluon
from lowbit_kernels import hopper, hopper_plan
from lowbit_kernels.hopper_plan import (
    first_step,
    gluon_why_not,
    group_of,
    pair_shift,
    pair_text,
    reps,
    runs_of_step,
    slot_of,
)
from lowbit_kernels.layout import to_tiles
from lowbit_kernels.tiles import Problem, Tile

pytestmark = needs_gluon()
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


def execute(text, word, *others, bf16):
    """Run pair_text's PTX on uint32 arrays: the word, then the centre, the factor, or both."""
    held = {"$1": word} | {f"${i}": other for i, other in enumerate(others, 2)}

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
        elif name == "mul.rn.f16x2":
            a, b = (halves_of(value(r), bf16) for r in rest)
            held[target] = words_of((a * b).astype(np.float16).astype(np.float64), bf16)
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
        got = halves_of(execute(pair_text(bits, bf16, index, False), shifted, bf16=bf16), bf16)
        assert np.array_equal(got, codes.astype(np.float64) - 2 ** (bits - 1))
        for zero in range(2**bits):
            part = slice(zero, None, 2**bits if bits == 8 else 1)  # each zero with other codes; all of them in the sum
            centre = centre_word(np.full(shifted[part].shape, zero), bits, bf16)
            got = halves_of(execute(pair_text(bits, bf16, index, True), shifted[part], centre, bf16=bf16), bf16)
            assert np.array_equal(got, codes[:, part].astype(np.float64) - zero)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scaled_pair_is_the_exact_difference_times_a_half_rounded_once(bits, zeros):
    """What the scaled family multiplies: every code, in either half of a word, by scales of every magnitude."""
    words = np.arange(1 << 16, dtype=np.uint32)
    words |= words << 16
    zero = 3 if zeros else 2 ** (bits - 1)
    centre = [centre_word(np.full(words.shape, zero), bits, False)] if zeros else []
    for scale in np.float16([2.0**-24, 1e-5, 0.37, 1.0, 63.9, 2.0**6]):
        factor = words_of(np.full((2, len(words)), scale, np.float64), False)
        for index in range(16 // bits):
            shifted = (words.view(np.int32) >> pair_shift(bits, False, index)).view(np.uint32)
            codes = (words >> np.uint32(bits * index) & np.uint32(2**bits - 1)).astype(np.float64)
            got = halves_of(execute(pair_text(bits, False, index, zeros, True), shifted, *centre, factor, bf16=False),
                            False)  # fmt: skip
            assert np.array_equal(got, np.stack([((codes - zero) * scale).astype(np.float16)] * 2).astype(np.float64))


def test_wrong_assembly_is_seen():
    words = np.arange(1 << 16, dtype=np.uint32)
    good = pair_text(4, True, 0, False)
    for old, new in (("0xea", "0x6a"), ("0x000f000f", "0x000f0007"), ("0xc308c308", "0xc308c309")):
        bad = execute(good.replace(old, new), words | words << 16, bf16=True)
        same = np.array_equal(bad, execute(good, words | words << 16, bf16=True))
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
    unit, _ = hopper.register_layouts()
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
    unit, _ = hopper.register_layouts()
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
        w_ring[slot] = box(lines, (row // 16, step * units * 8, 0), (4 * blocks, 8 * units, 32))
        for run in range(runs):
            at = group_of(step, run, k, group, runs) * problem.n + row
            rows_ring[slot * runs + run] = [box(a, (at,), (tile.block_n,)) for a in (flat_scales, flat_zeros)]
        run_columns = 128 // max(runs, 1)
        columns = min(512 // bits, run_columns, 64 if reps(tile) == 1 else 128)
        for block in range(blocks):
            last = np.minimum(row + 64 * block + np.arange(64), problem.n - 1)
            for column in range(0, 128, columns):
                unit = column // (512 // bits)
                words = w_ring[slot][4 * block : 4 * block + 4, 8 * unit : 8 * unit + 8]
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

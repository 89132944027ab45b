"""Plan of the Gluon family: which tiles it runs, and the index arithmetic of its kernel.

The functions from slot_of on take integers or scalars of the kernel: hopper_kernel.py compiles the very same lines for
the GPU. So the rings, phases, unit slots and shares of columns that the tests run in Python are those that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiles import Problem, Tile

__all__ = [
    "first_step",
    "gluon_shared_bytes",
    "gluon_why_not",
    "group_of",
    "packed_strides",
    "pair_shift",
    "pair_text",
    "reps",
    "runs_of_step",
    "slot_of",
    "slot_phase",
]

STEP = 128
"""Columns of a step, at 4 and 8 bits alike: one or two units of each 16 rows."""
SHARED_LIMIT = 232_448
"""Bytes of shared memory that one program may use on sm_90."""
SHARED_SHARE = 233_472 // 2 - 1024
"""Bytes of each of two on a multiprocessor: it has 228 KiB, and every program costs one besides its own."""
ACCUMULATORS = 128
"""Tokens times 64-row blocks of one warpgroup: 64 fp32 sums per lane, and as many for the dot products under way."""


MAX_SPLIT_TILES = 1 << 16
"""Output tiles that may be split along K: a warpgroup takes a counter for each, of a fixed number (epilogue.py)."""
CENTRE_FP16, CENTRE_BF16 = -0x1BFF1C00, -0x3CFF3D00
"""0xe400e400 and 0xc300c300 as int32: -1024 and -128 twice, in fp16 and bf16. The ulp is 1, so "or zero" subtracts."""


def pair_shift(bits: int, bf16: bool, index: int) -> int:
    """How far a word is shifted before pair_text's instructions take its pair ``index``: prmt needs no shift."""
    return 0 if bits == 8 and not bf16 else bits * index


def pair_text(bits: int, bf16: bool, index: int, has_zeros: bool, scaled: bool = False) -> str:
    """PTX from a shifted word ``$1`` to two floats ``code - zero`` in ``$0``; with zeros, ``$2`` is what to add.

    See hopper_operand.py's table. Constants that lop3 and add cannot both hold are registers. ``scaled``, fp16 only:
    times the last operand, rounded.
    """
    if bf16 and bits == 8:
        raw = (
            "mov.b32 c, 0x43004300; mov.b32 d, 0x43804380; mov.b32 m, 0xbf80bf80; "
            "lop3.b32 a, $1, 0x007f007f, c, 0xea; lop3.b32 b, $1, 0x00800080, d, 0x6a; fma.rn.bf16x2 a, b, m, a; "
        )
        add, constant = "add.rn.bf16x2", None
    elif bf16:
        raw = "mov.b32 c, 0x43004300; lop3.b32 a, $1, 0x000f000f, c, 0xea; "
        add, constant = "add.rn.bf16x2", "0xc308c308"
    elif bits == 8:
        raw = f"mov.b32 c, 0x64646464; prmt.b32 a, $1, c, {('0x4240', '0x4341')[index]}; "
        add, constant = "add.rn.f16x2", "0xe480e480"
    else:
        raw = "mov.b32 c, 0x64006400; lop3.b32 a, $1, 0x000f000f, c, 0xea; "
        add, constant = "add.rn.f16x2", "0xe408e408"
    if has_zeros:
        centred = f"{add} a, a, $2; "
    elif constant is None:
        centred = ""
    else:
        centred = f"mov.b32 d, {constant}; {add} a, a, d; "
    last = f"mul.rn.f16x2 $0, a, ${3 if has_zeros else 2};" if scaled else "mov.b32 $0, a;"
    return f"{{ .reg .b32 a, b, c, d, m; {raw}{centred}{last} }}"


def reps(tile: Tile) -> int:
    """Blocks of 64 weight rows that each consumer warpgroup of ``tile`` has."""
    return tile.block_n * 4 // (64 * tile.num_warps)


def gluon_shared_bytes(tile: Tile, problem: Problem) -> int:
    """Upper bound on the shared memory of one program: the ring, barriers and what worker warps are passed, the result.

    Scales count as fp32. A warpgroup turns its result 2 KiB at a time.
    """
    per_step = tile.block_m * STEP * 2 + tile.block_n * STEP * problem.bits // 8
    per_run = tile.block_n * (5 if problem.asymmetric else 4)
    ring = tile.num_stages * (per_step + runs_of_step(problem.group_size) * per_run)
    return ring + 256 + tile.num_warps // 4 * 2048


def gluon_why_not(tile: Tile, problem: Problem) -> str | None:
    """Why the Gluon kernel cannot run ``problem`` with ``tile`` on sm_90, or None when it can.

    ``num_warps`` counts the warps that multiply, 4 or 8; the producer's come on top. With 4, two programs share a
    multiprocessor, so each has half of its shared memory.
    """
    if problem.bits not in (4, 8):
        return f"the gluon family has 4 and 8 bits, not {problem.bits}"
    if problem.k % 8:
        return f"the copy engine needs rows of x at multiples of 16 bytes: K must be a multiple of 8, got {problem.k}"
    if tile.block_m not in (16, 32, 64, 128) or tile.num_warps not in (4, 8):
        return f"block_m must be 16, 32, 64 or 128 and num_warps 4 or 8, got {tile.block_m} and {tile.num_warps}"
    if tile.block_n % (16 * tile.num_warps) or reps(tile) not in (1, 2, 4) or tile.block_n > 256:
        return f"block_n must be 64, 128 or 256 rows and at least 16 per warp, got {tile.block_n} for {tile.num_warps}"
    if problem.asymmetric and problem.group_size != -1 and tile.block_n < 128:
        return (
            f"zeros of {tile.block_n} rows: the copy engine wants its boxes in shared memory at multiples of 128 bytes"
        )
    limit = ACCUMULATORS // 2 if problem.group_size in (32, 64) else ACCUMULATORS
    if tile.block_m * reps(tile) > limit:
        return f"block_m * block_n / num_warps must be at most {16 * limit} (registers), got tile {tile}"
    if not 2 <= tile.num_stages <= 8:
        return f"num_stages must be 2 to 8, got {tile.num_stages}: one is multiplied while the next is read"
    steps = -(-problem.k // STEP)
    if not 1 <= tile.split_k <= steps:
        return f"split_k must be between 1 and the {steps} steps along K = {problem.k}, got {tile.split_k}"
    count = -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)
    if tile.split_k > 1 and count > MAX_SPLIT_TILES:
        return f"split_k must be 1 for more than {MAX_SPLIT_TILES} output tiles, there are {count}"
    groups = 1 if problem.group_size == -1 else problem.k // problem.group_size
    if groups * problem.n + 256 >= 1 << 31:
        return f"{groups} groups of {problem.n} rows are more scales than the copy engine's 32-bit coordinates"
    needed, share = gluon_shared_bytes(tile, problem), SHARED_SHARE if tile.num_warps == 4 else SHARED_LIMIT
    if needed > share:
        return f"{needed} bytes of shared memory, a program of {tile.num_warps} warps has {share}"
    return None


def packed_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor as the copy engine wants them: torch's may be any where there is one row."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def slot_of(i: int, STAGES: int) -> int:
    """Slot of the ring that step i (counted from the program's first) uses."""
    return i % STAGES


def slot_phase(i: int, STAGES: int) -> int:
    """Parity of the phase of ``full[slot]`` that step i completes; the producer waits for the other of ``empty``."""
    return (i // STAGES) & 1


def first_step(split: int, K: int, SPLIT_K: int) -> int:
    """First step of 128 columns of a split; that of split + 1 ends it. Shares differ by at most one step."""
    return split * ((K + 127) // 128) // SPLIT_K


def runs_of_step(group_size: int) -> int:
    """Runs of columns with a scale of their own in a step of 128; 0 when one scale is for the whole row."""
    return 0 if group_size == -1 else STEP // min(group_size, STEP)


def group_of(step: int, run: int, K: int, GROUP: int, RUNS: int) -> int:
    """Group of run number ``run`` of a step, at most the last: the columns past K meet x = 0 and any finite scale."""
    at = step * RUNS + run
    last = K // GROUP - 1
    return at - (at > last) * (at - last)

"""The emulator of test_kernels_emulated.py: arithmetic as the PTX ISA defines it, and faults that it must see."""

import contextlib
import math
import random
import re
import struct
from unittest import mock

import numpy as np
import pytest
import torch

import gpu_check_modules  # noqa: F401

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from check_layers import random_packed

import emulated_gpu as emulation
from helpers import needs_gluon
from lowbit_kernels import int8_hopper, scaled
from lowbit_kernels.int8 import int8_matmul
from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.tiles import Tile
from ptx_code import Code
from ptx_machine import Deadlock, Machine
from ptx_memory import GlobalMemory, Race, WrongAccess
from ptx_program import Immediate, Instruction
from ptx_unit import PtxError

pytestmark = needs_gluon()
CUDA = torch.device("cuda")
SNIPPET = """
.visible .entry snippet(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)
.reqntid 32
{{
  .reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<8>; .reg .b64 %rd<16>;
  ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; ld.param.b64 %rd2, [p2]; ld.param.b64 %rd3, [p3];
  mov.u32 %r7, %tid.x;
  mad.wide.u32 %rd4, %r7, 4, %rd0; mad.wide.u32 %rd5, %r7, 4, %rd1; mad.wide.u32 %rd6, %r7, 4, %rd2;
  mad.wide.u32 %rd7, %r7, 8, %rd3;
  ld.global.b32 %r0, [%rd4]; ld.global.b32 %r1, [%rd5]; ld.global.b32 %r2, [%rd6];
  cvt.u16.u32 %rs0, %r0; cvt.u16.u32 %rs1, %r1;
  mov.b64 %rd8, 0;
  {code}
  st.global.b64 [%rd7], %rd8;
  ret;
}}
"""


def run_snippet(code, *words):
    """64 bits of %rd8 per lane, after ``code`` with %r0, %r1, %r2 (low halves %rs0, %rs1) set to the words."""
    inputs = [torch.tensor(np.resize(np.array(w, np.uint32), 32).view(np.int32)) for w in words]
    inputs += [torch.zeros(32, dtype=torch.int32)] * (3 - len(inputs))
    out = torch.zeros(32, dtype=torch.int64)
    tensors = [*inputs, out]
    memory = GlobalMemory()
    memory.allow([emulation._extent(tensor) for tensor in tensors])
    machine = Machine(SNIPPET.format(code=code), 0)
    machine.run((1, 1, 1), [tensor.data_ptr() for tensor in tensors], memory, order=random.Random(0))
    return out.numpy().view(np.uint64).tolist()


EDGES = [0, 1, 2, 31, 32, 33, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
OTHERS = [3, 0xFFFFFFFE, 0x80000001, 5, 0x12345678, 1, 0xDEADBEEF, 16, 0xFFFFFFFF, 7, 0x80000000, 9, 2, 33, 31, 0x1F]


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add.s32 %r3, %r0, %r1;": lambda a, b: a + b,
    "sub.s32 %r3, %r0, %r1;": lambda a, b: a - b,
    "mul.lo.s32 %r3, %r0, %r1;": lambda a, b: a * b,
    "mul.hi.u32 %r3, %r0, %r1;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r3, %r0, %r1;": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r3, %r0, %r1, 7;": lambda a, b: a * b + 7,
    "div.s32 %r3, %r0, %r1;": lambda a, b: truncated(signed(a), signed(b)),
    "rem.s32 %r3, %r0, %r1;": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b),
    "min.s32 %r3, %r0, %r1;": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r3, %r0, %r1;": max,
    "neg.s32 %r3, %r0;": lambda a, b: -a,
    "not.b32 %r3, %r0;": lambda a, b: ~a,
    "shl.b32 %r3, %r0, %r1;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r3, %r0, %r1;": lambda a, b: a >> b,
    "shr.s32 %r3, %r0, %r1;": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r3, %r0, %r1, 5;": lambda a, b: (b << 32 | a) << 5 >> 32,
    "bfe.u32 %r3, %r0, 4, 8;": lambda a, b: a >> 4 & 255,
    "bfe.s32 %r3, %r0, 4, 8;": lambda a, b: signed(a >> 4 & 255, 8),
    "popc.b32 %r3, %r0;": lambda a, b: a.bit_count(),
    "prmt.b32 %r3, %r0, %r1, 0x5410U;": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r3, %r0, %r1, 0xF6A0U;": lambda a, b: int.from_bytes(
        [a & 255, 255 * (a >> 23 & 1), b >> 16 & 255, 255 * (b >> 31 & 1)], "little"
    ),
    "cvt.s32.s8 %r3, %r0;": lambda a, b: signed(a & 255, 8),
    "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r3, 1, 0, %p0;": lambda a, b: signed(a) < signed(b),
    "setp.lt.u32 %p0, %r0, %r1; selp.b32 %r3, 1, 0, %p0;": lambda a, b: a < b,
    "setp.ge.u32 %p0, %r0, %r1; mov.b32 %r3, 4; @!%p0 mov.b32 %r3, %r0;": lambda a, b: 4 if a >= b else a,
    "mov.b32 {%rs2, %rs3}, %r0; mov.b32 %r3, {%rs3, %rs2};": lambda a, b: (a >> 16) | (a & 0xFFFF) << 16,
}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers_of_32_bits(code):
    got = run_snippet(f"{code} cvt.u64.u32 %rd8, %r3;", EDGES, OTHERS)
    assert got[:16] == [int(INTEGERS[code](a, b)) & 0xFFFFFFFF for a, b in zip(EDGES, OTHERS, strict=True)]


@pytest.mark.parametrize(
    ("code", "wide"),
    [
        ("mul.wide.s32 %rd8, %r0, %r1;", lambda a, b: signed(a) * signed(b)),
        ("mad.wide.u32 %rd8, %r0, %r1, 9;", lambda a, b: a * b + 9),
        ("cvt.s64.s32 %rd8, %r0;", lambda a, b: signed(a)),
        ("mul.wide.s32 %rd9, %r0, 8; shr.s64 %rd8, %rd9, 4;", lambda a, b: signed(a) * 8 >> 4),
        ("cvt.u64.u32 %rd9, %r0; shl.b64 %rd8, %rd9, 40;", lambda a, b: a << 40),
    ],
)
def test_integers_of_64_bits(code, wide):
    got = run_snippet(code, EDGES, OTHERS)
    assert got[:16] == [wide(a, b) & (1 << 64) - 1 for a, b in zip(EDGES, OTHERS, strict=True)]


def test_every_truth_table_of_lop3():
    """The table's bit ``4 a + 2 b + c`` is the result (PTX ISA, lop3)."""
    a, b, c = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA
    for table in range(256):
        got = run_snippet(f"lop3.b32 %r3, %r0, %r1, %r2, {table}; cvt.u64.u32 %rd8, %r3;", [a], [b], [c])
        assert got[0] == table * 0x01010101


def bits(x, form="<f"):
    return int.from_bytes(struct.pack(form, x), "little")


NAN, INF = float("nan"), float("inf")
FLOATS = [(1.0, 2.0), (0.1, 0.2), (NAN, 1.0), (1.0, NAN), (INF, INF), (-0.0, 0.0), (65504.0, 3.0), (1e-40, -3.5)]


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("setp.lt.f32 %p0, %r0, %r1;", lambda a, b: a < b),
        ("setp.ne.f32 %p0, %r0, %r1;", lambda a, b: a != b and a == a and b == b),
        ("setp.neu.f32 %p0, %r0, %r1;", lambda a, b: a != b),
        ("setp.leu.f32 %p0, %r0, %r1;", lambda a, b: not a > b),
        ("setp.nan.f32 %p0, %r0, %r1;", lambda a, b: a != a or b != b),
        ("setp.num.f32 %p0, %r0, %r1;", lambda a, b: a == a and b == b),
    ],
)
def test_comparisons_know_what_is_not_a_number(code, answer):
    words = [[bits(pair[i]) for pair in FLOATS] for i in (0, 1)]
    got = run_snippet(f"{code} selp.b32 %r3, 1, 0, %p0; cvt.u64.u32 %rd8, %r3;", *words)
    assert [bool(value) for value in got[:8]] == [answer(a, b) for a, b in FLOATS]


def test_max_prefers_numbers():
    words = [[bits(pair[i]) for pair in FLOATS] for i in (0, 1)]
    got = run_snippet("max.f32 %r3, %r0, %r1; cvt.u64.u32 %rd8, %r3;", *words)
    assert got[2] == got[3] == bits(1.0) and got[0] == bits(2.0)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_are_rounded_to_the_nearest(kind, dtype):
    """Conversions, sums and fused products of pairs, against torch in float64."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 32, generator=generator)
    words = [row.numpy().view(np.uint32) for row in wide]
    got = run_snippet(f"cvt.rn.{kind}x2.f32 %r3, %r0, %r1; cvt.u64.u32 %rd8, %r3;", *words)
    low, high = (part.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(int) for part in (wide[1], wide[0]))
    assert got == (low | high << 16).tolist(), "the first source is the upper half"
    pairs = torch.randn(3, 64, generator=generator).to(dtype)
    words = [row.view(torch.int32).numpy().view(np.uint32) for row in pairs]
    got = run_snippet(f"fma.rn.{kind}x2 %r3, %r0, %r1, %r2; cvt.u64.u32 %rd8, %r3;", *words)
    exact = (pairs[0].double() * pairs[1].double() + pairs[2].double()).to(dtype)
    assert got == exact.view(torch.int32).numpy().view(np.uint32).tolist()


@pytest.mark.parametrize(
    ("code", "exact"),
    [
        ("sub.bf16 %rs3, %rs0, %rs1; cvt.u64.u16 %rd8, %rs3;", lambda a, b, _: a - b),
        ("fma.rn.bf16 %rs3, %rs0, %rs1, %rs1; cvt.u64.u16 %rd8, %rs3;", lambda a, b, _: a * b + b),
        ("abs.bf16 %rs3, %rs0; cvt.u64.u16 %rd8, %rs3;", lambda a, b, _: a.abs()),
        ("cvt.rn.bf16.u16 %rs3, %rs0; cvt.u64.u16 %rd8, %rs3;", lambda a, b, word: word),
    ],
)
def test_single_bfloat16_numbers(code, exact):
    numbers = torch.randn(2, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    words = numbers.view(torch.int16).numpy().view(np.uint16)
    expected = exact(*numbers.double(), torch.tensor(words[0].astype(np.float64))).bfloat16()
    assert run_snippet(code, *words) == expected.view(torch.int16).numpy().view(np.uint16).tolist()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_meet_a_float32_without_being_rounded(kind, dtype):
    """sm_100 and later; Triton 3.9 writes differences so."""
    numbers = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    words, (a, b) = numbers.view(torch.int16).numpy().view(np.uint16), numbers.double()
    c, last = float(np.float32(0.7)), "%r3, %rs0, %r2; cvt.u64.u32 %rd8, %r3;"
    for code, exact in (
        (f"add.rn.f32.{kind} {last}", a + c),
        (f"sub.rn.f32.{kind} {last}", a - c),
        (f"fma.rn.f32.{kind} {last.replace('%rs0', '%rs0, %rs1')}", a * b + c),
    ):
        got = run_snippet(code, *words, [bits(0.7)])
        assert got == exact.float().view(torch.int32).numpy().view(np.uint32).tolist(), code
    with pytest.raises(ValueError, match="is not known"):
        run_snippet(f"mul.rn.f32.{kind} {last}", *words, [bits(0.7)])


def test_the_extreme_of_three():
    """sm_100 and later. A NaN loses against numbers."""
    words = [
        [bits(x) for x in row] for row in ((1.0, 5.0, -2.0, math.nan), (3.0, 4.0, -1.0, 2.0), (2.0, 9.0, -3.0, 1.0))
    ]
    for name, expected in (("max", (3.0, 9.0, -1.0, 2.0)), ("min", (1.0, 4.0, -3.0, 1.0))):
        got = run_snippet(f"{name}.f32 %r3, %r0, %r1, %r2; cvt.u64.u32 %rd8, %r3;", *words)
        assert got[:4] == [bits(x) for x in expected]
    with pytest.raises(ValueError, match="is not known"):
        run_snippet("add.f32 %r3, %r0, %r1, %r2; cvt.u64.u32 %rd8, %r3;", *words)


def test_division_that_flushes_knows_no_subnormal_numbers():
    """Triton 3.4 and 3.5 divide so."""
    pairs = [(1.0, 3.0), (1e-40, 1e-3), (1e-38, -10.0), (7.0, 1e-40), (-1e-40, 1.0)]
    words = [[bits(pair[i]) for pair in pairs] for i in (0, 1)]
    got = run_snippet("div.rn.ftz.f32 %r3, %r0, %r1; cvt.u64.u32 %rd8, %r3;", *words)
    third = int(np.float32(1 / 3).view(np.uint32))
    assert got[:5] == [third, 0, bits(-0.0), bits(INF), bits(-0.0)]


def test_a_parameters_address_survives_32_bits():
    """As Triton 3.9 takes that of a tensor map."""
    code = "mov.b32 %r3, p1; cvt.u64.u32 %rd9, %r3; cvta.param.u64 %rd8, %rd9; mov.b64 %rd10, p1;"
    assert run_snippet(f"{code} sub.s64 %rd8, %rd8, %rd10;") == [0] * 32


def test_lanes_that_part_meet_again():
    """Odd lanes go one way, even ones another; both come to the end, and the shuffle behind it sees all."""
    code = """
    and.b32 %r3, %r7, 1; setp.eq.b32 %p0, %r3, 0; @%p0 bra $even;
    mov.b32 %r4, 100; bra $join;
    $even: mov.b32 %r4, 200;
    $join: shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1; cvt.u64.u32 %rd8, %r5;
    """
    assert run_snippet(code)[:4] == [100, 200, 100, 200]


def test_what_is_not_known_is_an_error():
    with pytest.raises(ValueError, match=r"ex2\.approx\.f32.*not known"):
        run_snippet("ex2.approx.f32 %r3, %r0;", [0])
    with pytest.raises(PtxError, match="some lanes"):
        run_snippet("setp.lt.u32 %p0, %r7, 3; @%p0 bra $some; bra $join; $some: bar.sync 0; $join: mov.b32 %r3, 0;")


# --- faults


TRITON, GLUON = Tile("triton", 16, 64, 2, 4, 3), Tile("gluon", 16, 128, 2, 4, 2)
SCALED = Tile("scaled", 64, 128, 2, 8, 2)
INT8 = Int8Tile(64, 128, 128, 2, 8, 2, "gluon")


def launch(tile, late=True):
    """5 tokens by 128 rows of 768 columns; the machine is the one that earlier launches compiled.

    Where programs stay, there are 3 tiles for 2 of them: each has one, and half of the third.
    """
    tokens, k = (5, 768) if tile in (TRITON, GLUON) else (130, 384)
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulation.emulated_gpu(90, seed=0, late=late))
        for module in (scaled, int8_hopper):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda _: 2))
        if tile == INT8:
            codes, x_q = (torch.ones(rows, k, dtype=torch.int8, device=CUDA) for rows in (128, tokens))
            x_scale, scales = torch.ones(tokens, device=CUDA), torch.ones(128, device=CUDA)
            return int8_matmul(x_q, x_scale, codes, scales, None, out_dtype=torch.bfloat16, tile=tile)
        packed = random_packed(128, k, 4, 128, torch.bfloat16, CUDA)
        return packed(torch.randn(tokens, k, device=CUDA).to(torch.bfloat16), tile=tile)


@pytest.fixture
def machine(request):
    """The machine that :func:`launch` with the test's tile uses; its program is mended afterwards."""
    emulation._machines.clear()
    launch(request.getfixturevalue("tile"))
    (found,) = [
        machine for machine, _ in emulation._machines.values() if not re.search("sums|halves", machine.program.name)
    ]
    before = list(found.program.instructions)
    yield found
    found.program.instructions[:], found.code = before, Code(found.program)


def instructions(machine, *opcode):
    return [i for i, one in enumerate(machine.program.instructions) if one.opcode[: len(opcode)] == opcode]


def without(machine, place):
    """Take an instruction out; a wait for an mbarrier finds it complete."""
    one = machine.program.instructions[place]
    waits = one.opcode[:2] == ("mbarrier", "try_wait")
    new = (("mov", "pred"), (one.operands[0], Immediate(1))) if waits else (("fence",), ())
    machine.program.instructions[place] = Instruction(None, False, *new, "taken out")
    machine.code = Code(machine.program)


def faults(machine, tile, place):
    """What is raised without an instruction, with copies late and at once."""
    kept = machine.program.instructions[place]
    without(machine, place)
    found = []
    for late in (True, False):
        try:
            launch(tile, late)
        except (Race, Deadlock, PtxError) as error:
            found.append(type(error))
    machine.program.instructions[place] = kept
    return found


@pytest.mark.parametrize(
    ("tile", "opcode", "kinds"),
    [
        (TRITON, "cp.async.wait_group", {Race}),
        (GLUON, "wgmma.wait_group", {PtxError, Race}),
        (GLUON, "mbarrier.try_wait", {Race, PtxError}),
        (GLUON, "mbarrier.arrive", {Deadlock, PtxError}),
        (SCALED, "wgmma.wait_group", {PtxError, Race}),
        (SCALED, "mbarrier.try_wait", {Race, PtxError}),
        (SCALED, "mbarrier.arrive", {Deadlock, PtxError}),
        (INT8, "wgmma.wait_group", {PtxError, Race}),
        (INT8, "mbarrier.try_wait", {Race, PtxError}),
        (INT8, "mbarrier.arrive", {Deadlock, PtxError}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_wait_and_arrival_is_missed_when_it_is_taken_out(machine, tile, opcode, kinds):
    """But for those of the gluon family that order nothing in the PTX and are there for ptxas (C7513): after the first
    of two products into one accumulator, and where the sums are read behind the next wait. A step's last one counts.
    """
    places = instructions(machine, *opcode.split("."))
    found = [faults(machine, tile, place) for place in places]
    missed = found[-1:] if (tile, opcode) == (GLUON, "wgmma.wait_group") else found
    assert missed and all(missed), [machine.program.instructions[place].text for place in places]
    assert all(set(kinds_found) <= kinds for kinds_found in found), found


@pytest.mark.parametrize("tile", [TRITON], ids=["triton"])
def test_the_barriers_around_split_k_and_of_the_main_loop_are_missed(machine, tile):
    """Two are Triton's own and order nothing: before the first copies, and where the accumulator leaves the loop."""
    places = instructions(machine, "bar", "sync")
    missed = [place for place in places if faults(machine, tile, place)]
    (atomic,) = instructions(machine, "atom")
    assert len(missed) >= len(places) - 2
    assert max(place for place in places if place < atomic) in missed, "before partial sums are announced"
    assert min(place for place in places if place > atomic) in missed, "before others' partial sums are read"


@pytest.mark.parametrize("tile", [SCALED, INT8], ids=["scaled", "int8"])
def test_the_barriers_around_shared_tiles_are_missed(machine, tile):
    """Both warpgroups: all stores before the one announcement, all loads after it."""
    barriers, atomics = instructions(machine, "bar", "sync"), instructions(machine, "atom")
    assert len(atomics) == 2
    for atomic in atomics:
        for place in (max(b for b in barriers if b < atomic), min(b for b in barriers if b > atomic)):
            assert faults(machine, tile, place), machine.program.instructions[place].text


@pytest.mark.parametrize("tile", [TRITON, GLUON, SCALED], ids=["triton", "gluon", "scaled"])
def test_an_access_outside_of_the_tensors_is_seen(machine, tile):
    """The kernel is told of more rows of the weight than its tensors have."""
    run = machine.run

    def told_of_more(grid, parameters, *rest, **options):
        last = max(i for i, value in enumerate(parameters) if value == 128)  # N; sizes come after the tensors
        run(grid, [*parameters[:last], 4096, *parameters[last + 1 :]], *rest, **options)

    machine.run = told_of_more
    with pytest.raises(WrongAccess, match="outside of the tensors"):
        launch(tile)
    del machine.run


@pytest.mark.parametrize("tile", [Tile("gluon", 16, 256, 1, 8, 2), SCALED], ids=["gluon, two warpgroups", "scaled"])
def test_registers_that_nobody_gives_up_are_a_deadlock(machine, tile):
    """setmaxnreg of both consumers and the producer add up to what the program was given, and to no more."""
    places = instructions(machine, "setmaxnreg")
    counts = [machine.program.instructions[place].operands[0].value for place in places]
    assert 24 in counts and machine.program.allotted == 168
    for place, count in zip(places, counts, strict=True):
        if count == 240:
            one = machine.program.instructions[place]
            machine.program.instructions[place] = Instruction(None, False, one.opcode, (Immediate(248),), one.text)
    machine.code = Code(machine.program)
    with pytest.raises(Deadlock, match="registers per thread"):
        launch(tile)


@pytest.mark.parametrize("tile", [TRITON, GLUON], ids=["triton", "gluon"])
def test_a_barrier_that_not_all_come_to_is_a_deadlock(machine, tile):
    first = instructions(machine, "bar", "sync")[0]
    more = Instruction(None, False, ("bar", "sync"), (Immediate(9), Immediate(1024)), "bar.sync 9, 1024")
    machine.program.instructions[first], machine.code = more, Code(machine.program)
    with pytest.raises(Deadlock, match=r"bar\.sync 9"):
        launch(tile)

"""The inline assembly that turns codes into floats, executed in numpy instruction by instruction over all inputs.

Triton's interpreter cannot run inline assembly and a CPU has no GPU, so the text that the kernels hand to the assembler
is parsed and executed here: a pair of codes comes from two half-words, each of which can have 65,536 values.
"""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from lowbit_kernels.unpack import conversion, raw_offset
from lowbit_kernels.weight_only import weight_only_matmul

HALVES = np.arange(1 << 16, dtype=np.uint32)
CASES = [
    (bits, dtype, centred)
    for bits in (2, 4, 8)
    for dtype in (torch.bfloat16, torch.float16)
    for centred in (False, True)
]


def to_float(halves, dtype):
    """Bits of fp16 or bf16 -> float64, exactly."""
    if dtype == torch.float16:
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def from_float(values, dtype):
    """float64 -> bits of fp16 or bf16; only for values that are exact there, so that no rounding is emulated."""
    if dtype == torch.float16:
        bits = values.astype(np.float16).view(np.uint16)
    else:
        bits = values.astype(np.float32).view(np.uint32) >> 16
    assert np.array_equal(to_float(bits, dtype), values), "the conversion rounds"
    return bits.astype(np.uint32)


def lop3(a, b, c, table):
    """PTX ISA, "lop3": bit i of the table is the result where a, b, c have the bits of i, a the highest."""
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def prmt(a, b, selector):
    """PTX ISA, "prmt", default mode: byte j of the result is byte (selector >> 4j) & 7 of the eight in b:a."""
    out = np.zeros_like(a)
    for j in range(4):
        choice = selector >> (4 * j) & 0xF
        assert choice < 8, "sign replication is not emulated"
        out |= ((a if choice < 4 else b) >> np.uint32(8 * (choice % 4)) & np.uint32(0xFF)) << np.uint32(8 * j)
    return out


def fma_pair(a, b, c, dtype):
    halves = [
        from_float(
            to_float(a >> shift & 0xFFFF, dtype) * to_float(b >> shift & 0xFFFF, dtype)
            + to_float(c >> shift & 0xFFFF, dtype),
            dtype,
        )
        for shift in (np.uint32(0), np.uint32(16))
    ]
    return halves[0] | halves[1] << np.uint32(16)


def execute(ptx, words, parameter):
    """Run the assembly: ``$1`` is words, ``$2`` the parameter; returns ``$0``. Unknown instructions are errors."""
    registers = {"$1": words, "$2": np.full_like(words, parameter)}

    def value(operand):
        return registers[operand] if operand in registers else np.full_like(words, int(operand, 0))

    body = re.fullmatch(r"\{ \.reg \.b32 ([\w, ]+); (.*) \}", ptx)
    assert body, ptx
    declared = set(body[1].split(", ")) | {"$0"}
    for line in body[2].rstrip(";").split(";"):
        name, _, rest = line.strip().partition(" ")
        target, *operands = rest.split(", ")
        assert target in declared
        arguments = [value(o) for o in operands]
        if name == "mov.b32":
            result = arguments[0]
        elif name == "shr.u32":
            result = arguments[0] >> arguments[1]
        elif name == "shf.l.wrap.b32":  # of a word with itself: a rotation
            assert operands[0] == operands[1]
            places = int(parameter) % 32
            result = arguments[0] << np.uint32(places) | arguments[0] >> np.uint32((32 - places) % 32)
        elif name == "lop3.b32":
            result = lop3(*arguments[:3], int(operands[3], 0))
        elif name == "prmt.b32":
            result = prmt(arguments[0], arguments[1], int(parameter if operands[2] == "$2" else int(operands[2], 0)))
        elif name == "fma.rn.bf16x2":
            result = fma_pair(*arguments, torch.bfloat16)
        elif name == "fma.rn.f16x2":
            result = fma_pair(*arguments, torch.float16)
        else:
            raise AssertionError(f"{name} is not emulated")
        registers[target] = result.astype(np.uint32)
    return registers["$0"]


@pytest.mark.parametrize(("bits", "dtype", "centred"), CASES)
def test_every_half_word_becomes_its_codes(bits, dtype, centred):
    """Each value of either half of a word, with another half beside it, for each pair: exactly code + RAW."""
    ptx, raw = conversion(bits, dtype, centred), raw_offset(bits, dtype, centred)
    other = np.roll(HALVES, 12345)
    for low, high in ((HALVES, other), (other, HALVES)):
        words = low | high << np.uint32(16)
        for pair in range(16 // bits):
            parameter = bits * pair
            if dtype == torch.float16:
                rotation = ({2: 8, 4: 4, 8: 2}[bits] - bits * pair) % 32
                parameter = 0x4240 + 0x0101 * pair if bits == 8 and centred else rotation
            out = execute(ptx, words, parameter)
            for half, out_half in ((low, out & np.uint32(0xFFFF)), (high, out >> np.uint32(16))):
                codes = half >> np.uint32(bits * pair) & np.uint32(2**bits - 1)
                assert np.array_equal(to_float(out_half, dtype), codes.astype(np.float64) + raw)


@pytest.mark.parametrize(("bits", "dtype", "centred"), CASES)
def test_values_are_exact_integers_that_the_tensor_cores_can_hold(bits, dtype, centred):
    raw = raw_offset(bits, dtype, centred)
    codes = torch.arange(2**bits, dtype=torch.float64) + raw
    assert torch.equal(codes.to(dtype).double(), codes)
    if centred:
        assert raw == -(2 ** (bits - 1))


def test_the_emulator_knows_wrong_assembly():
    """A table, a mask or a constant that is off gives another result: the test above can fail."""
    good = conversion(4, torch.bfloat16, True)
    words = HALVES | np.roll(HALVES, 1) << np.uint32(16)
    expected = execute(good, words, 4)
    for old, new in (("0xea", "0xe8"), ("0x000f000f", "0x000f0007"), ("0x43004300", "0x43004380")):
        assert old in good
        try:
            assert not np.array_equal(execute(good.replace(old, new), words, 4), expected)
        except AssertionError as error:
            assert "rounds" in str(error)


def test_cpu_tensors_are_refused():
    """Here, where nothing is interpreted, a launch would fail far from its cause."""
    tiles, scales = torch.zeros(1, 1, 16, 16, dtype=torch.int32), torch.ones(1, 16)
    with pytest.raises(ValueError, match="need tensors on a CUDA device, got x on cpu"):
        weight_only_matmul(torch.zeros(1, 128).half(), tiles, scales, None, None, bits=4, group_size=128, n=16)

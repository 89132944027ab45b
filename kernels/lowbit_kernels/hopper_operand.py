"""Words in shared memory -> the register operand of wgmma, for hopper_ring.py. Importing it needs Gluon.

64 rows by the columns of one unit at a time: a lane loads 32 bytes and has, without exchange, the elements that the
instruction wants of it. What comes out is ``code - zero``, exact in both dtypes; for the scaled family, in fp16, times
the scale of the group, rounded (one more instruction per pair):

| codes, dtype | raw value                                    | then add              | instructions per pair       |
|--------------|----------------------------------------------|-----------------------|-----------------------------|
| 4, bf16      | 0x4300 or code: 128 + code                   | -(128 + zero)         | shift (3 of 4), lop3, add   |
| 4, fp16      | 0x6400 or code: 1024 + code                  | -(1024 + zero)        | shift (3 of 4), lop3, add   |
| 8, bf16      | 128 + code % 128 less 128 or less 256        | 128 - zero, if any    | shift (1 of 2), 2 lop3, fma |
| 8, fp16      | byte permutation: 1024 + code                | -(1024 + zero)        | prmt, add                   |
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import hopper_plan

__all__ = ["centre_of", "factor_of", "fragment_of", "load_words"]

CENTRE_FP16 = gl.constexpr(hopper_plan.CENTRE_FP16)
CENTRE_BF16 = gl.constexpr(hopper_plan.CENTRE_BF16)

_pair_text = gluon.constexpr_function(hopper_plan.pair_text)
_pair_shift = gluon.constexpr_function(hopper_plan.pair_shift)


@gluon.jit
def _pairs(
    words, centre, factor, INDEX: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr, HAS_ZEROS: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """Pair INDEX of every word as two floats in one int32. ``centre`` is read only with zeros, ``factor`` if SCALED."""
    TEXT: gl.constexpr = _pair_text(BITS, DTYPE == gl.bfloat16, INDEX, HAS_ZEROS, SCALED)  # noqa: SIM300
    shifted = words >> _pair_shift(BITS, DTYPE == gl.bfloat16, INDEX)  # noqa: SIM300
    if HAS_ZEROS and SCALED:
        return gl.inline_asm_elementwise(
            TEXT, "=r,r,r,r", [shifted, centre, factor], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    elif HAS_ZEROS or SCALED:
        other = centre if HAS_ZEROS else factor
        return gl.inline_asm_elementwise(TEXT, "=r,r,r", [shifted, other], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(TEXT, "=r,r", [shifted], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def centre_of(zeros, like, BITS: gl.constexpr, DTYPE: gl.constexpr, WORDS: gl.constexpr):
    """Zeros (64,) uint8 -> what to add to raw pairs to centre them, two halves in an int32, shape and layout of words.

    The halves are the float ``-(RAW + zero)``: its bits are those of -RAW plus zero, for RAW = 128 and 1024 have an ulp
    of 1. At 8 bits and bf16 RAW is -128 and the float ``128 - zero`` is converted.
    """
    if DTYPE == gl.float16:  # noqa: SIM300
        both = zeros.to(gl.int32) * 0x10001 | CENTRE_FP16
    elif BITS == 4:
        both = zeros.to(gl.int32) * 0x10001 | CENTRE_BF16
    else:
        half = (128.0 - zeros.to(gl.float32)).to(gl.bfloat16).to(gl.uint16, bitcast=True)
        both = half.to(gl.int32) * 0x10001
    return _of_rows(both, like, WORDS)


@gluon.jit
def factor_of(scales, factors, like, WORDS: gl.constexpr):
    """Scales (64,) times the rows' factors (64,) fp32 -> twice in fp16 in an int32, shape and layout of words."""
    half = (scales.to(gl.float32) * factors).to(gl.float16).to(gl.uint16, bitcast=True)
    return _of_rows(half.to(gl.int32) * 0x10001, like, WORDS)


@gluon.jit
def _of_rows(values, like, WORDS: gl.constexpr):
    """One int32 per row (64,), in the layout of the accumulator's rows -> shape and layout of words."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS)))
    values = gl.convert_layout(values, LAYOUT, assert_trivial=True)
    return values[:, None, None, None] | (like & 0)


@gluon.jit
def _pair_columns(
    words, centre, factor, INDEX: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr, HAS_ZEROS: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """Pair INDEX of words (64, t, b, u): (64, t, b, u, h)."""
    pairs = _pairs(words, centre, factor, INDEX, BITS, DTYPE, HAS_ZEROS, SCALED)
    low = pairs.to(gl.uint16).to(DTYPE, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.uint16).to(DTYPE, bitcast=True))


@gluon.jit
def fragment_of(
    words, centre, factor, FIRST: gl.constexpr, COUNT: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr,
    HAS_ZEROS: gl.constexpr, SCALED: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Columns 32 * FIRST .. 32 * (FIRST + COUNT) of a unit as wgmma's register operand, (64, 32 * COUNT).

    Column ``32i + 16b + 8u + 2t + h`` is where layout.py puts it. assert_trivial is the compiler's proof that every
    lane already holds the elements that the instruction wants of it: no shuffle, no shared memory.
    """
    columns = _pair_columns(words, centre, factor, FIRST, BITS, DTYPE, HAS_ZEROS, SCALED)
    if COUNT == 1:
        columns = gl.permute(columns, (0, 2, 3, 1, 4))
    elif COUNT == 2:
        second = _pair_columns(words, centre, factor, FIRST + 1, BITS, DTYPE, HAS_ZEROS, SCALED)
        columns = gl.permute(gl.join(columns, second), (0, 5, 2, 3, 1, 4))
    else:
        even = gl.join(columns, _pair_columns(words, centre, factor, FIRST + 2, BITS, DTYPE, HAS_ZEROS, SCALED))
        odd = gl.join(
            _pair_columns(words, centre, factor, FIRST + 1, BITS, DTYPE, HAS_ZEROS, SCALED),
            _pair_columns(words, centre, factor, FIRST + 3, BITS, DTYPE, HAS_ZEROS, SCALED),
        )
        columns = gl.permute(gl.join(even, odd), (0, 5, 6, 2, 3, 1, 4))
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    return gl.convert_layout(gl.reshape(columns, (64, 32 * COUNT)), operand, assert_trivial=True)


@gluon.jit
def load_words(w_ring, slot, BLOCK: gl.constexpr, UNIT_OF_STEP: gl.constexpr, UNIT: gl.constexpr, WORDS: gl.constexpr):
    """One unit of a slot's BLOCK-th 64 rows, (64, t, b, u): word ``t + 4 * (2b + u)``. Two 16-byte loads per lane."""
    unit = w_ring.index(slot).slice(BLOCK * 4, 4, dim=0).slice(UNIT_OF_STEP * 8, 8, dim=1)
    return gl.convert_layout(gl.reshape(unit.load(UNIT), (64, 4, 2, 2)), WORDS, assert_trivial=True)

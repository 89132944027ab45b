"""Device helpers of the fused kernels: words of the GPU layout (layout.py) -> an operand of the tensor cores.

A word holds pairs of codes, ``k`` in its low and ``k + 1`` in its high half, so a shift, a mask and an OR turn one into
two 16-bit floats at once: the bits of a power of two, with a code where the mantissa counts ones. What comes out is
``code + RAW``, an exact integer, with RAW (:func:`raw_offset`) left to the caller, who subtracts ``RAW * sum(x)`` from
the dot product. That spends no instruction on centring or scaling a weight. Where sums of x cost more than one
instruction per pair, the values come out centred, as ``code - 2**(bits - 1)``, by one packed addition.

RAW should be small: tensor cores cut off each product, and the sum so far, some 25 bits below the largest of them,
always towards zero (README.md, "Sums of the tensor cores"). Of terms of 1024 and more that is a bias which
``RAW * sum(x)`` does not have.

| codes, dtype       | the bits of a value                                      | RAW  | per pair                |
|--------------------|----------------------------------------------------------|------|-------------------------|
| 2, 4 bits, bf16    | 0x4300 or code: 128, ulp 1                               | 128  | shift, lop3             |
| 2 bits, fp16       | 0x4400 or code << 8: 4, ulp 2**-8                        | 4    | rotation, lop3          |
| 4 bits, fp16       | 0x5400 or code << 4: 64, ulp 2**-4                       | 64   | rotation, lop3          |
| 8 bits, fp16       | 0x5C00 or code << 2: 256, ulp 2**-2                      | 256  | rotation, lop3          |
| 8 bits, fp16, to be centred | 0x6400 or code: 1024, ulp 1                     | -    | prmt                    |
| 8 bits, bf16       | 7 mantissa bits: (128 + code % 128) less 128 or less 256 | -128 | shift, 2 lop3, fma      |
| centred            |                                                          | -mid | one fma or add more     |
| any, fp32          | converted; only Triton's interpreter multiplies fp32     | -mid | -                       |

:func:`conversion` is the assembly. Triton's interpreter cannot run it and takes the branch written in
``triton.language``; tests/test_kernels_unpack.py executes the assembly over all half-words in numpy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .releases import LANE_COLUMNS

__all__ = ["conversion", "raw_offset", "unpack_columns"]


def raw_offset(bits: int, dtype: torch.dtype, centred: bool) -> float:
    """What :func:`unpack_columns` adds to a code. 8 bits in bf16 and anything in fp32 are centred in any case."""
    if centred or dtype == torch.float32 or (dtype == torch.bfloat16 and bits == 8):
        return float(-(2 ** (bits - 1)))
    return {2: 4.0, 4: 64.0, 8: 256.0}[bits] if dtype == torch.float16 else 128.0


def conversion(bits: int, dtype: torch.dtype, centred: bool) -> str:
    """PTX for one pair: ``$0`` two floats, ``$1`` the word, ``$2`` the pair's shift to the right; in fp16 its rotation
    to the left, and of 8 bits to be centred prmt's selector.

    lop3's table 0xEA is ``(a & b) | c`` and 0x6A is ``(a & b) ^ c`` (PTX ISA, "lop3").
    """
    mask, middle = (2**bits - 1) * 0x10001, 2 ** (bits - 1)
    if dtype == torch.bfloat16 and bits == 8:
        # code < 128: 0x4380, 256, goes off; else 0x4300, 128. Both differences are exact.
        return (
            "{ .reg .b32 s, a, b, c, d, m; mov.b32 c, 0x43004300; mov.b32 d, 0x43804380; mov.b32 m, 0xbf80bf80; "
            "shr.u32 s, $1, $2; lop3.b32 a, s, 0x007f007f, c, 0xea; lop3.b32 b, s, 0x00800080, d, 0x6a; "
            "fma.rn.bf16x2 $0, b, m, a; }"
        )
    if dtype == torch.bfloat16:
        one, exponent, place, shift = 0x3F80, 0x4300, 0, "shr.u32 s, $1, $2;"
    else:
        one, exponent, place = 0x3C00, *{2: (0x4400, 8), 4: (0x5400, 4), 8: (0x5C00, 2)}[bits]
        shift = "shf.l.wrap.b32 s, $1, $1, $2;"
    minus = exponent | 0x8000 | middle << place  # -(RAW + middle)
    raw = f"{shift} lop3.b32 a, s, {mask << place:#010x}, c, 0xea;"
    constant = exponent * 0x10001
    if bits == 8 and centred:  # what the addition takes off again may be large
        raw, constant, minus = "prmt.b32 a, $1, c, $2;", 0x64646464, 0x6400 | 0x8000 | middle
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    finish = "mov.b32 $0, a;"
    if centred:
        finish = f"mov.b32 o, {one * 0x10001:#010x}; mov.b32 m, {minus * 0x10001:#010x}; fma.rn.{kind} $0, a, o, m;"
    return f"{{ .reg .b32 s, a, c, o, m; mov.b32 c, {constant:#010x}; {raw} {finish} }}"


@triton.jit
def _pair(words, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, RAW: tl.constexpr, PTX: tl.constexpr):
    """Pair INDEX of every word, ``code + RAW``: shape of ``words`` with an axis of 2 appended."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001
    if DTYPE == tl.float32:  # noqa: SIM300
        codes = (words >> (BITS * INDEX)) & MASK
        return tl.join((codes & 0xFFFF).to(tl.float32) + RAW, (codes >> 16).to(tl.float32) + RAW)
    elif PTX == "":
        tl.static_assert(DTYPE == tl.float16, "without assembly: float16 and float32")  # noqa: SIM300
        PLACE: tl.constexpr = 8 if BITS == 2 else 4 if BITS == 4 else 2
        POWER: tl.constexpr = 4.0 if BITS == 2 else 64.0 if BITS == 4 else 256.0
        EXPONENT: tl.constexpr = 0x44004400 if BITS == 2 else 0x54005400 if BITS == 4 else 0x5C005C00
        both = (((words >> (BITS * INDEX)) & MASK) << PLACE) | EXPONENT
        low = both.to(tl.uint16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        if RAW != POWER:
            low, high = low + (RAW - POWER), high + (RAW - POWER)
        return tl.join(low, high)
    else:
        HALVES: tl.constexpr = DTYPE == tl.float16  # noqa: SIM300
        ROTATION: tl.constexpr = ((8 if BITS == 2 else 4 if BITS == 4 else 2) - BITS * INDEX) % 32
        OF_HALVES: tl.constexpr = 0x4240 + 0x0101 * INDEX if BITS == 8 and RAW < 0 else ROTATION
        PARAMETER: tl.constexpr = OF_HALVES if HALVES else BITS * INDEX
        both = tl.inline_asm_elementwise(PTX, "=r,r,r", [words, PARAMETER], dtype=tl.int32, is_pure=True, pack=1)
        low = both.to(tl.uint16).to(DTYPE, bitcast=True)
        return tl.join(low, (both >> 16).to(tl.uint16).to(DTYPE, bitcast=True))


@triton.jit
def unpack_columns(
    words,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    RAW: tl.constexpr,
    PTX: tl.constexpr,  # conversion(...), or "" for the interpreter
    FOR_MMA: tl.constexpr,
):
    """Words (ROWS, 16) of one unit -> columns 32 * FIRST .. 32 * (FIRST + COUNT) of it, (ROWS, 32 * COUNT) of DTYPE.

    COUNT is 1, 2 or 4. The axes of a row in memory are (t, b, u): word kw = 8b + 4u + t. Column k is (i, b, u, t, h) in
    natural order. With FOR_MMA and LANE_COLUMNS == 4 it is (i, b, t, u, h): Triton gives a lane four consecutive
    columns then, and this order makes them the four that the lane has. x must be permuted alike.

    Only joins and views: Triton moves the operand's layout through them up to the load, so that words go from shared
    memory to the registers that need them. (A broadcast in their place stops it, and the tile is stored again.)
    """
    ROWS: tl.constexpr = words.shape[0]
    FOUR: tl.constexpr = FOR_MMA and LANE_COLUMNS == 4
    first = _pair(words, FIRST, BITS, DTYPE, RAW, PTX)
    if COUNT == 1:
        values = tl.reshape(first, (ROWS, 4, 2, 2, 2))  # t, b, u, h
        values = tl.permute(values, (0, 2, 1, 3, 4) if FOUR else (0, 2, 3, 1, 4))
    elif COUNT == 2:
        values = tl.join(first, _pair(words, FIRST + 1, BITS, DTYPE, RAW, PTX))
        values = tl.reshape(values, (ROWS, 4, 2, 2, 2, 2))  # t, b, u, h, i
        values = tl.permute(values, (0, 5, 2, 1, 3, 4) if FOUR else (0, 5, 2, 3, 1, 4))
    else:
        tl.static_assert(COUNT == 4, "COUNT is 1, 2 or 4")
        even = tl.join(first, _pair(words, FIRST + 2, BITS, DTYPE, RAW, PTX))
        odd = tl.join(_pair(words, FIRST + 1, BITS, DTYPE, RAW, PTX), _pair(words, FIRST + 3, BITS, DTYPE, RAW, PTX))
        values = tl.reshape(tl.join(even, odd), (ROWS, 4, 2, 2, 2, 2, 2))  # t, b, u, h, i / 2, i % 2
        values = tl.permute(values, (0, 5, 6, 2, 1, 3, 4) if FOUR else (0, 5, 6, 2, 3, 1, 4))
    return tl.reshape(values, (ROWS, 32 * COUNT))

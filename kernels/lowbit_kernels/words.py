"""How codes lie in the words that the kernels read, and how a kernel takes them out.

    bit   31 .. 28 | 27 .. 24 | ... | 7 .. 4 | 3 .. 0        4-bit codes: eight to a word, first code in the low bits
          code 7     code 6           code 1   code 0

Today this is the checkpoint's own order, so loading costs no repacking. A faster layout changes this file and
nothing else: :func:`unpack_words` (plain torch) and :func:`unpack_tile` (the same on a tile) must stay one formula.

| name  | shape                   | dtype | order                                                          |
|-------|-------------------------|-------|----------------------------------------------------------------|
| words | (N, ceil(K * bits / 32)) | int32 | row-major; code k of a row at bit k * bits, little end first    |
| zeros | (ceil(N * bits / 32), G) | int32 | the same along N: the zero of row n at bit n * bits of column g |

Numerics: :func:`unpack_tile` gives ``code - 2**(bits-1)``, an integer in [-128, 127], exactly in fp16, bf16 and fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["unpack_tile", "unpack_words", "unpack_zeros"]


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes ``(N, count)`` int32 in ``[0, 2**bits - 1]`` from words ``(N, ceil(count * bits / 32))`` int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    flat: Tensor = codes.flatten(1)
    return flat[:, :count]


@triton.jit
def _centred(halves, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes alone in 16-bit lanes -> ``code - 2**(BITS-1)`` in DTYPE.

    OR-ing a code into the mantissa of 1024 (fp16, ulp 1) or 128 (bf16, ulp 1) makes the number ``base + code``; the
    subtraction is exact. Eight bits do not fit bf16's seven mantissa bits, so that case converts.
    """
    MID: tl.constexpr = 1 << (BITS - 1)
    if DTYPE == tl.float16:  # noqa: SIM300
        return (halves | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + MID)
    elif DTYPE == tl.bfloat16 and BITS <= 4:  # noqa: SIM300
        return (halves | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - (128.0 + MID)
    else:
        return (halves - MID).to(tl.float32).to(DTYPE)


@triton.jit
def _pair(words, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes INDEX and INDEX + 16 / BITS of every word: (BLOCK_N, W) int32 -> (BLOCK_N, W, 2)."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001
    both = (words >> (INDEX * BITS)) & MASK
    return tl.join(_centred(both & 0xFFFF, BITS, DTYPE), _centred(both >> 16, BITS, DTYPE))


@triton.jit
def unpack_tile(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Words (BLOCK_N, W) int32 -> centred codes (BLOCK_N, W * 32 / BITS) in DTYPE, in the order of k.

    Each ``join`` appends a bit to the code's index, most significant first: the half-word, then INDEX from its top bit.
    """
    if BITS == 8:
        codes = tl.join(_pair(words, 0, 8, DTYPE), _pair(words, 1, 8, DTYPE))
    elif BITS == 4:
        even = tl.join(_pair(words, 0, 4, DTYPE), _pair(words, 2, 4, DTYPE))
        odd = tl.join(_pair(words, 1, 4, DTYPE), _pair(words, 3, 4, DTYPE))
        codes = tl.join(even, odd)
    else:
        tl.static_assert(BITS == 2, "codes are 2, 4 or 8 bits")
        m0 = tl.join(_pair(words, 0, 2, DTYPE), _pair(words, 4, 2, DTYPE))
        m1 = tl.join(_pair(words, 1, 2, DTYPE), _pair(words, 5, 2, DTYPE))
        m2 = tl.join(_pair(words, 2, 2, DTYPE), _pair(words, 6, 2, DTYPE))
        m3 = tl.join(_pair(words, 3, 2, DTYPE), _pair(words, 7, 2, DTYPE))
        codes = tl.join(tl.join(m0, m2), tl.join(m1, m3))
    return codes.reshape(words.shape[0], words.shape[1] * (32 // BITS))


@triton.jit
def unpack_zeros(zeros_ptr, rows, group, stride_n, stride_g, mask, BITS: tl.constexpr):
    """Zeros of some rows (int64 indices) in one group, less ``2**(BITS-1)``: (BLOCK_N,) fp32."""
    PER_WORD: tl.constexpr = 32 // BITS
    words = tl.load(zeros_ptr + (rows // PER_WORD) * stride_n + group * stride_g, mask=mask, other=0)
    codes = (words >> ((rows % PER_WORD) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    return (codes - (1 << (BITS - 1))).to(tl.float32)

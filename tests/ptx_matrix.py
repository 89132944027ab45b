"""Matrix instructions of the PTX emulator: fragments of mma, ldmatrix and stmatrix, operands of wgmma.

Layouts: PTX ISA 8.7, "Matrix Fragments for mma.m16n8k16 / m16n8k32", "ldmatrix", "Register Fragments for
wgmma.mma_async". A lane is ``l``, ``g = l // 4``, ``t = l % 4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_alu import LANES
from ptx_memory import swizzled

__all__ = ["accumulate", "cut_sum", "descriptor_addresses", "fragment", "from_rows", "left", "mma", "right", "to_rows"]

Array = Any
G, T = LANES // 4, LANES % 4


def numbers(words: Array, kind: str) -> Array:
    """``(n,)`` words of 32 bits -> ``(n, 2)`` floats or ``(n, 4)`` integers, in float64: products are exact there."""
    words = np.ascontiguousarray(words)
    if kind == "s8":
        return words.view(np.int8).reshape(len(words), 4).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).reshape(len(words), 2).astype(np.float64)
    halves = words.view(np.uint16).reshape(len(words), 2).astype(np.uint32) << np.uint32(16)
    return np.ascontiguousarray(halves).view(np.float32).astype(np.float64)


def left(registers: Sequence[Array], kind: str) -> Array:
    """Four registers of a warp -> its ``(16, K)`` left operand: K 16 for 16-bit, 32 for 8-bit numbers."""
    width = 4 if kind == "s8" else 2
    out = np.empty((16, 8 * width))
    for i, words in enumerate(registers):
        values = numbers(words, kind)
        for j in range(width):
            out[G + 8 * (i % 2), T * width + j + 4 * width * (i // 2)] = values[:, j]
    return out


def right(registers: Sequence[Array], kind: str) -> Array:
    """Two registers of a warp -> its ``(K, 8)`` right operand."""
    width = 4 if kind == "s8" else 2
    out = np.empty((8 * width, 8))
    for i, words in enumerate(registers):
        values = numbers(words, kind)
        for j in range(width):
            out[T * width + j + 4 * width * i, G] = values[:, j]
    return out


def fragment(registers: Sequence[Array], kind: str) -> Array:
    """Registers of a warp -> the ``(16, 2 * len)`` accumulator they hold; ``kind`` is f32 or s32."""
    out = np.empty((16, 2 * len(registers)))
    for i, words in enumerate(registers):
        values = np.ascontiguousarray(words).view(np.float32 if kind == "f32" else np.int32)
        out[G + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * T + i % 2] = values
    return out


def accumulate(result: Array, kind: str) -> list[Array]:
    """The inverse of :func:`fragment`; float32 rounded once, int32 wrapped (nothing here comes near saturation)."""
    cast = result.astype(np.float32) if kind == "f32" else result.astype(np.int64).astype(np.int32)
    bits = np.ascontiguousarray(cast).view(np.uint32)
    return [bits[G + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * T + i % 2] for i in range(result.shape[1] // 2)]


def mma(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], kind: str, sum_kind: str) -> list[Array]:
    """``mma.sync.m16n8k16`` of 16-bit floats, ``m16n8k32`` of int8.

    Floats as on sm_80, whose sums are the coarsest: eight products at a time, 24 bits.
    """
    rows, columns, total = left(a, kind), right(b, kind), fragment(c, sum_kind)
    if sum_kind != "f32":
        return accumulate(rows @ columns + total, sum_kind)
    for first in range(0, rows.shape[1], 8):
        total = cut_sum(rows[:, first : first + 8], columns[first : first + 8], total, 24)
    return accumulate(total, sum_kind)


def cut_sum(a: Array, b: Array, c: Array, bits: int) -> Array:
    """``a (M, K) @ b (K, N) + c`` in float64, holding float32, as tensor cores add it up.

    Every product and ``c`` are cut off, towards zero, ``bits`` places behind the first of the largest of them; their
    sum is, to float32. A product's first place is the sum of its factors' (so it may have one place more). After
    "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (github.com/microsoft/MMA-Sim): 25 bits and
    16 products on sm_90, 24 and 8 on sm_80. Infinities and NaN as in float64.
    """
    products = a[:, :, None] * b[None]
    exponents = _exponents(a)[:, :, None] + _exponents(b)[None]
    exponents[products == 0] = _NOTHING
    unit = np.ldexp(1.0, np.clip(np.maximum(exponents.max(1), _exponents(c)) - bits, -1000, 1000))
    with np.errstate(invalid="ignore"):
        total = np.trunc(products / unit[:, None]).sum(1) + np.trunc(c / unit)
        nearest = (total * unit).astype(np.float32)
        beyond = np.abs(nearest.astype(np.float64)) > np.abs(total * unit)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


_NOTHING = -5000


def _exponents(x: Array) -> Array:
    """Of the first bit; far below everything for zero, and for what is no number, which stays what it is."""
    found = np.frexp(x)[1].astype(np.int32) - 1
    return np.where((x == 0) | ~np.isfinite(x), _NOTHING, found)


def from_rows(rows: Array, transposed: bool) -> Array:
    """``(8, 16)`` bytes, rows of a matrix of 16-bit numbers -> the register that ldmatrix makes of it."""
    halves = np.ascontiguousarray(rows).view(np.uint16)
    if transposed:
        halves = np.ascontiguousarray(halves.T)
    return np.ascontiguousarray(halves[G[:, None], 2 * T[:, None] + np.arange(2)]).view(np.uint32)[:, 0]


def to_rows(register: Array, transposed: bool) -> Array:
    """The inverse of :func:`from_rows`, for stmatrix."""
    halves = np.empty((8, 8), np.uint16)
    halves[G[:, None], 2 * T[:, None] + np.arange(2)] = np.ascontiguousarray(register).view(np.uint16).reshape(32, 2)
    return np.ascontiguousarray(halves.T if transposed else halves).view(np.uint8)


def descriptor_addresses(descriptor: int, rows: int, row_bytes: int) -> Array:
    """Where ``rows`` rows of K-major numbers lie that a wgmma descriptor points at: ``(rows, row_bytes)`` addresses.

    Raises:
        ValueError: a layout that Triton does not use here: no swizzle, or a base offset.
    """
    start = (descriptor & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4  # between groups of 8 rows
    width = {0: 0, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    if not width or descriptor >> 49 & 7:
        raise ValueError(f"a matrix descriptor {descriptor:#x} without swizzle or with a base offset")
    row, byte = np.arange(rows)[:, None], np.arange(row_bytes)[None, :]
    return swizzled(start + row // 8 * stride + row % 8 * width + byte, width)

"""The weight layout that the GPU kernels read: 16 rows by 16 words, made for the tensor cores' operand registers.

A *unit* is 16 rows of the weight by ``512 / bits`` columns (256, 128 or 64 at 2, 4 or 8 bits): 16 words per row, 1 KiB,
contiguous. Units follow each other along K, then along N. It depends neither on the group size nor on the tile that a
kernel runs with.

    one row of a unit, 4 bits          word kw = 0 .. 15 holds 8 codes:
    bits     31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
    k - 2kw    97      65      33       1   |   96      64      32      0

In general code ``k = 32*i + 2*kw + h`` of a unit's row lies at bit ``bits*i + 16*h`` of word kw, with i below 16 / bits
and h in {0, 1}. So one shift by ``bits*i`` and one mask give the pair (k, k + 1) in the halves of a register, the order
in which the tensor cores want it, and all words under one i are 32 consecutive columns: a group of 32, half one of 64.

    words of a row in memory: kw =  0 4 8 12 | 1 5 9 13 | 2 6 10 14 | 3 7 11 15        position 4*(kw % 4) + kw // 4
                       read by lane  ..0         ..1        ..2         ..3            lane % 4 of a warp, 16 bytes each

In ``mma.m16n8k16`` (and ``wgmma``, A from registers; PTX ISA, "Matrix Fragments for mma.m16n8k16") lane l owns columns
2t, 2t+1, 2t+8, 2t+9 of rows l / 4 and l / 4 + 8, t = l % 4: exactly the words kw with kw % 4 == t. A lane takes a row's
share of a unit with one 16-byte load, and a warp reads 8 rows as 512 contiguous bytes.

| name       | shape                          | dtype         | order                                             |
|------------|--------------------------------|---------------|---------------------------------------------------|
| words_disk | (N, ceil(K * bits / 32))       | int32         | the checkpoint's: code k at bit k * bits of a row  |
| zeros_disk | (ceil(N * bits / 32), G)       | int32 or None | the same along N                                  |
| scales     | (N, G)                         | floating      | any strides                                       |
| tiles      | (ceil(N / 16), U, 16, 16)      | int32         | contiguous; U = units_along_k(K, bits)            |
| scales_gn  | (G, N)                         | as scales     | contiguous                                        |
| zeros_gn   | (G, N)                         | uint8 or None | contiguous                                        |

Rows N.. and columns K.. that fill the last units hold code 0; kernels multiply those columns by x = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BITS", "UNIT_ROWS", "UNIT_WORDS", "from_tiles", "tiles_shape", "to_tiles", "unit_columns", "units_along_k"]

BITS = (2, 4, 8)
UNIT_ROWS = 16
UNIT_WORDS = 16
"""Words in one row of a unit."""
STEP_COLUMNS = 128
"""K is padded to a multiple of this (256 at 2 bits), so that a kernel's step along K never needs a mask on words."""
CHUNK_CODES = 1 << 24
"""Codes unpacked at a time: bounds the memory needed beside the two layouts to a few times 16 MiB."""


def unit_columns(bits: int) -> int:
    """Columns of one unit: 256, 128 or 64 at 2, 4 or 8 bits. ValueError for any other width."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    return UNIT_WORDS * 32 // bits


def units_along_k(k: int, bits: int) -> int:
    """Units that hold K columns, padding included: 1 KiB each per 16 rows."""
    columns = unit_columns(bits)
    step = max(columns, STEP_COLUMNS)
    return -(-k // step) * step // columns


def tiles_shape(n: int, k: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of ``tiles`` for a weight ``(n, k)``."""
    return -(-n // UNIT_ROWS), units_along_k(k, bits), UNIT_ROWS, UNIT_WORDS


def to_tiles(
    words_disk: Tensor, scales: Tensor, zeros_disk: Tensor | None, bits: int, k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checkpoint layout -> ``(tiles, scales_gn, zeros_gn)``, see the module's table; new tensors on the same device.

    Raises:
        ValueError: a width other than 2, 4 or 8, or tensors that do not have the table's shapes and dtypes.
    """
    if scales.ndim != 2 or not scales.is_floating_point():
        raise ValueError(f"scales must be a floating (N, G), got {tuple(scales.shape)} {scales.dtype}")
    n, groups = scales.shape
    _check("words_disk", words_disk, (n, _disk_width(k, bits)), torch.int32)
    zeros_gn = None
    if zeros_disk is not None:
        _check("zeros_disk", zeros_disk, (_disk_width(n, bits), groups), torch.int32)
        zeros_gn = _unpack(zeros_disk.t(), bits, n)
    shape = tiles_shape(n, k, bits)
    tiles = torch.empty(shape, dtype=torch.int32, device=words_disk.device)
    padded_k = shape[1] * unit_columns(bits)
    step = max(1, CHUNK_CODES // (UNIT_ROWS * padded_k))
    for first in range(0, shape[0], step):
        rows = words_disk[first * UNIT_ROWS : (first + step) * UNIT_ROWS]
        units = min(step, shape[0] - first)
        codes = torch.zeros(units * UNIT_ROWS, padded_k, dtype=torch.uint8, device=words_disk.device)
        codes[: rows.shape[0], :k] = _unpack(rows, bits, k)
        tiles[first : first + units] = _interleave(codes, bits)
    return tiles, scales.t().contiguous(), zeros_gn


def from_tiles(
    tiles: Tensor, scales_gn: Tensor, zeros_gn: Tensor | None, bits: int, k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(words_disk, scales, zeros_disk)``: the inverse of :func:`to_tiles`, bit for bit.

    Raises:
        ValueError: as for :func:`to_tiles`.
    """
    if scales_gn.ndim != 2 or not scales_gn.is_floating_point():
        raise ValueError(f"scales_gn must be a floating (G, N), got {tuple(scales_gn.shape)} {scales_gn.dtype}")
    groups, n = scales_gn.shape
    shape = tiles_shape(n, k, bits)
    _check("tiles", tiles, shape, torch.int32)
    zeros_disk = None
    if zeros_gn is not None:
        _check("zeros_gn", zeros_gn, (groups, n), torch.uint8)
        zeros_disk = _pack(zeros_gn, bits).t().contiguous()
    words = torch.empty(n, _disk_width(k, bits), dtype=torch.int32, device=tiles.device)
    step = max(1, CHUNK_CODES // (UNIT_ROWS * shape[1] * unit_columns(bits)))
    for first in range(0, shape[0], step):
        codes = _deinterleave(tiles[first : first + step], bits)
        rows = words[first * UNIT_ROWS : (first + step) * UNIT_ROWS]
        rows.copy_(_pack(codes[: rows.shape[0], :k], bits))
    return words, scales_gn.t().contiguous(), zeros_disk


def _interleave(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(16 * R, U * unit_columns)`` uint8 -> words ``(R, U, 16, 16)`` int32."""
    shifts = 16 // bits
    rows, units = codes.shape[0] // UNIT_ROWS, codes.shape[1] // unit_columns(bits)
    # r, unit, row, t, j with kw = t + 4j; then i, h
    ordered = codes.view(rows, UNIT_ROWS, units, shifts, 4, 4, 2).permute(0, 2, 1, 5, 4, 3, 6)
    packed = torch.zeros(*ordered.shape[:5], 4, dtype=torch.uint8, device=codes.device)
    for i in range(shifts):
        byte, shift = divmod(bits * i, 8)
        for h in range(2):  # bytes first, then viewed as words: both are little-endian on every supported machine
            packed[..., byte + 2 * h] |= ordered[..., i, h] << shift
    return packed.view(torch.int32).view(rows, units, UNIT_ROWS, UNIT_WORDS)


def _deinterleave(tiles: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_interleave`."""
    shifts = 16 // bits
    rows, units = tiles.shape[:2]
    packed = tiles.contiguous().view(torch.uint8).view(rows, units, UNIT_ROWS, 4, 4, 4)
    codes = torch.empty(rows, UNIT_ROWS, units, shifts, 4, 4, 2, dtype=torch.uint8, device=tiles.device)
    ordered = codes.permute(0, 2, 1, 5, 4, 3, 6)
    for i in range(shifts):
        byte, shift = divmod(bits * i, 8)
        for h in range(2):
            ordered[..., i, h] = (packed[..., byte + 2 * h] >> shift) & (2**bits - 1)
    return codes.view(rows * UNIT_ROWS, units * unit_columns(bits))


def _disk_width(count: int, bits: int) -> int:
    unit_columns(bits)
    return -(-count * bits // 32)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes ``(R, count)`` uint8 from the checkpoint's words ``(R, ceil(count * bits / 32))``."""
    packed, per_byte = words.clone(memory_format=torch.contiguous_format).view(torch.uint8), 8 // bits
    codes = torch.empty(words.shape[0], packed.shape[1] * per_byte, dtype=torch.uint8, device=words.device)
    for i in range(per_byte):
        codes[:, i::per_byte] = (packed >> (i * bits)) & (2**bits - 1)
    return codes[:, :count].contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_unpack`."""
    rows, count = codes.shape
    padded = torch.zeros(rows, _disk_width(count, bits) * 32 // bits, dtype=torch.uint8, device=codes.device)
    padded[:, :count] = codes
    per_byte = 8 // bits
    packed = torch.zeros(rows, padded.shape[1] // per_byte, dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):
        packed |= padded[:, i::per_byte] << (i * bits)
    return packed.view(torch.int32)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")

"""Codes <-> int32 words, both directions, in compressed-tensors' ``pack-quantized`` order.

    bit   31 .. 28 | 27 .. 24 | ... | 7 .. 4 | 3 .. 0        4-bit codes: eight to a word, first code in the low bits
          code 7     code 6           code 1   code 0

Code k of a row starts at global bit ``k * bits``, little end first, no interleaving; the last word of a row is padded
with zeros. Only widths that divide 32 are packed (2, 4, 8): for the others the format changed between
compressed-tensors 0.17 and 0.18, so a file could be read two ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import PACKED_BITS

__all__ = ["pack_codes", "packed_width", "unpack_codes"]


def packed_width(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits fill: ``ceil(count * bits / 32)``."""
    _check_bits(bits)
    return -(-count * bits // 32)


def pack_codes(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along one dimension.

    Args:
        codes: 2-D uint8, each in ``[0, 2**bits - 1]``.
        bits: 2, 4 or 8.
        dim: -1 or 1 packs along the columns (weights), 0 along the rows (zero points).

    Returns:
        int32, the packed dimension ``packed_width(count, bits)`` long; contiguous.

    Raises:
        ValueError: wrong dtype, rank or width, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be 2-D uint8, got {tuple(codes.shape)} {codes.dtype}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"{bits}-bit codes must be at most {2**bits - 1}, got {int(codes.max())}")
    if dim == 0:
        return pack_codes(codes.t(), bits).t().contiguous()
    rows, count = codes.shape
    words, per_byte = packed_width(count, bits), 8 // bits
    padded = torch.zeros(rows, words * 32 // bits, dtype=torch.uint8, device=codes.device)
    padded[:, :count] = codes
    packed = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):  # bytes first, then viewed as words: both are little-endian on every supported machine
        packed |= padded[:, i::per_byte] << (i * bits)
    return packed.view(torch.int32)


def unpack_codes(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        words: 2-D int32.
        count: codes along the packed dimension; the padding after them is dropped.

    Returns:
        uint8 codes, the packed dimension ``count`` long.

    Raises:
        ValueError: wrong dtype, rank or width, or ``words`` does not hold exactly ``packed_width(count, bits)`` words.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.ndim != 2:
        raise ValueError(f"words must be 2-D int32, got {tuple(words.shape)} {words.dtype}")
    if dim == 0:
        return unpack_codes(words.t(), bits, count).t().contiguous()
    if words.shape[1] != packed_width(count, bits):
        raise ValueError(f"{count} codes of {bits} bits fill {packed_width(count, bits)} words, got {words.shape[1]}")
    # clone, not contiguous(): a transposed (1, G) counts as contiguous with strides that view() refuses
    packed, per_byte = words.clone(memory_format=torch.contiguous_format).view(torch.uint8), 8 // bits
    codes = torch.empty(words.shape[0], packed.shape[1] * per_byte, dtype=torch.uint8, device=words.device)
    for i in range(per_byte):
        codes[:, i::per_byte] = (packed >> (i * bits)) & (2**bits - 1)
    return codes[:, :count].contiguous()


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"packed widths are {PACKED_BITS} bits, got {bits!r}")

"""Packing: bit positions, exhaustive and random round trips, and the same words as the compressed-tensors package."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.packing import pack_codes, packed_width, unpack_codes
from lowbit.spec import PACKED_BITS

by_bits = pytest.mark.parametrize("bits", PACKED_BITS)
by_dim = pytest.mark.parametrize("dim", [0, 1, -1])
sizes = st.integers(1, 70)


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@by_bits
def test_code_k_starts_at_bit_k_times_bits(bits):
    """One code at a time, every value at every position of two words."""
    for k in range(2 * 32 // bits):
        for value in range(2**bits):
            codes = torch.zeros(1, 2 * 32 // bits, dtype=torch.uint8)
            codes[0, k] = value
            low, high = (int(w) & 0xFFFFFFFF for w in pack_codes(codes, bits)[0])
            assert low | high << 32 == value << k * bits


@by_bits
def test_every_byte_survives(bits):
    """All 256 patterns of a byte in all four bytes of a word."""
    byte = torch.arange(256, dtype=torch.uint8)
    words = torch.stack([byte, byte.flip(0), byte.roll(77), byte.roll(150)], 1).contiguous().view(torch.int32)
    assert torch.equal(pack_codes(unpack_codes(words, bits, 32 // bits), bits), words)


@by_dim
@by_bits
@settings(max_examples=60)
@given(rows=sizes, columns=sizes, seed=st.integers(0, 2**32))
def test_round_trip(bits, dim, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    words = pack_codes(codes, bits, dim)
    width = packed_width(codes.shape[dim], bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert tuple(words.shape) == ((width, columns) if dim == 0 else (rows, width))
    back = unpack_codes(words, bits, codes.shape[dim], dim)
    assert back.is_contiguous() and torch.equal(back, codes)
    # however the words lie in memory
    assert torch.equal(unpack_codes(words.t().contiguous().t(), bits, codes.shape[dim], dim), codes)


@by_dim
@by_bits
@settings(max_examples=60)
@given(rows=sizes, columns=sizes, seed=st.integers(0, 2**32))
def test_agrees_with_compressed_tensors(bits, dim, rows, columns, seed):
    """Weights are packed along their columns, zero points along dimension 0; theirs are signed, ours count from 0."""
    codes = random_codes(rows, columns, bits, seed)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed_dim = dim % 2
    theirs = pack_to_int32(signed, bits, packed_dim=packed_dim)
    assert torch.equal(pack_codes(codes, bits, dim), theirs)
    assert torch.equal(unpack_from_int32(pack_codes(codes, bits, dim), bits, codes.shape, packed_dim), signed)


@by_bits
def test_padding_is_zero_and_is_dropped(bits):
    codes = torch.full((3, 32 // bits + 1), 2**bits - 1, dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert words[:, 0].tolist() == [-1] * 3 and words[:, 1].tolist() == [2**bits - 1] * 3
    assert torch.equal(unpack_codes(torch.full_like(words, -1), bits, codes.shape[1]), codes)


def test_empty():
    for shape in ((0, 8), (0, 13)):
        codes = torch.zeros(shape, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(codes, 4), 4, shape[1]), codes)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 6, 7, 16])
def test_other_widths_are_refused(bits):
    for call in (
        lambda: packed_width(8, bits),
        lambda: pack_codes(torch.zeros(1, 8, dtype=torch.uint8), bits),
        lambda: unpack_codes(torch.zeros(1, 1, dtype=torch.int32), bits, 8),
    ):
        with pytest.raises(ValueError, match=rf"packed widths are \(2, 4, 8\) bits, got {bits}"):
            call()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int8), "must be 2-D uint8, got .*int8"),
        (torch.zeros(8, dtype=torch.uint8), r"must be 2-D uint8, got \(8,\)"),
        (torch.full((2, 8), 16, dtype=torch.uint8), "4-bit codes must be at most 15, got 16"),
    ],
)
def test_bad_codes_are_named(codes, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), "words must be 2-D int32"),
        (torch.zeros(2, dtype=torch.int32), "words must be 2-D int32"),
        (torch.zeros(2, 2, dtype=torch.int32), "8 codes of 4 bits fill 1 words, got 2"),
    ],
)
def test_bad_words_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        unpack_codes(words, 4, 8)

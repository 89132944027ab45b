"""The GPU layout: where every code lies, and that nothing is lost on the way there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.packing import pack_codes
from lowbit_kernels import layout
from lowbit_kernels.layout import from_tiles, tiles_shape, to_tiles, unit_columns, units_along_k

BITS = (2, 4, 8)


def random_weight(n, k, bits, groups=1, asymmetric=True, dtype=torch.float16):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    zeros = pack_codes(torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8), bits, dim=0) if asymmetric else None
    return codes, pack_codes(codes, bits), torch.randn(n, groups).to(dtype), zeros


def where(n, k, bits):
    """(tile row, unit, row, position, bit) of code (n, k), written from the module's text and not from its code."""
    unit, column = divmod(k, 512 // bits)
    i, rest = divmod(column, 32)
    kw, h = divmod(rest, 2)
    return n // 16, unit, n % 16, 4 * (kw % 4) + kw // 4, bits * i + 16 * h


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_a_unit_lies_where_the_picture_says(bits):
    """Exhaustive over a unit and its neighbours: each position, each value of a code there, all others zero."""
    n, k = 32, 2 * max(unit_columns(bits), 128)
    seen = set()
    for row in (*range(16), 16, 31):
        for column in (*range(unit_columns(bits)), unit_columns(bits), k - 1):
            value = (row * 37 + column * 11) % (2**bits - 1) + 1
            codes = torch.zeros(n, k, dtype=torch.uint8)
            codes[row, column] = value
            tiles, _, _ = to_tiles(pack_codes(codes, bits), torch.ones(n, 1), None, bits, k)
            (found,) = tiles.nonzero().tolist()
            a, b, c, d, bit = where(row, column, bits)
            assert found == [a, b, c, d]
            assert int(tiles[a, b, c, d]) & 0xFFFFFFFF == value << bit
            seen.add((a, b, c, d, bit))
    assert len(seen) == 18 * (unit_columns(bits) + 2)  # no two codes share bits


@pytest.mark.parametrize("bits", BITS)
def test_every_value_in_every_position_survives(bits):
    """All 2**bits codes in each of a unit's positions, there and back."""
    columns = max(unit_columns(bits), 128)
    position = torch.arange(16 * columns).view(16, columns)
    for shift in range(2**bits):
        codes = ((position + shift) % 2**bits).to(torch.uint8)
        words = pack_codes(codes, bits)
        tiles, scales, _ = to_tiles(words, torch.ones(16, 1), None, bits, columns)
        assert torch.equal(from_tiles(tiles, scales, None, bits, columns)[0], words)


@pytest.mark.parametrize("bits", BITS)
def test_a_lane_of_the_tensor_core_reads_its_columns_from_sixteen_bytes(bits):
    """mma.m16n8k16, A: lane l owns columns 2t, 2t+1, 2t+8, 2t+9 of each 16, t = l % 4 (PTX ISA)."""
    for t in range(4):
        own = {
            16 * block + c
            for block in range(unit_columns(bits) // 16)
            for c in (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9)
        }
        assert {where(0, k, bits)[3] for k in own} == set(range(4 * t, 4 * t + 4))


@settings(max_examples=60)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    bits=st.sampled_from(BITS),
    groups=st.integers(1, 5),
    asymmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_back_is_the_inverse_of_there(n, k, bits, groups, asymmetric, dtype):
    codes, words, scales, zeros = random_weight(n, k, bits, groups, asymmetric, dtype)
    tiles, scales_gn, zeros_gn = to_tiles(words, scales, zeros, bits, k)
    assert tuple(tiles.shape) == tiles_shape(n, k, bits) == (-(-n // 16), units_along_k(k, bits), 16, 16)
    assert tiles.is_contiguous() and scales_gn.is_contiguous() and torch.equal(scales_gn, scales.t())
    back = from_tiles(tiles, scales_gn, zeros_gn, bits, k)
    assert torch.equal(back[0], words) and torch.equal(back[1], scales) and back[1].dtype == dtype
    assert (zeros is None and back[2] is None) or torch.equal(back[2], zeros)
    for row, column in [(0, 0), (n - 1, k - 1), (n // 2, k // 2)]:
        a, b, c, d, bit = where(row, column, bits)
        assert (int(tiles[a, b, c, d]) >> bit) & (2**bits - 1) == codes[row, column]


@pytest.mark.parametrize("bits", BITS)
def test_padding_holds_code_zero(bits):
    codes = torch.full((17, 130), 2**bits - 1, dtype=torch.uint8)
    tiles, _, _ = to_tiles(pack_codes(codes, bits), torch.ones(17, 1), None, bits, 130)
    ones = sum(bin(int(w) & 0xFFFFFFFF).count("1") for w in tiles.flatten())
    assert ones == 17 * 130 * bits


@pytest.mark.parametrize("bits", BITS)
def test_long_weights_are_repacked_in_pieces(bits, monkeypatch):
    _, words, scales, zeros = random_weight(90, 260, bits)
    whole = to_tiles(words, scales, zeros, bits, 260)
    monkeypatch.setattr(layout, "CHUNK_CODES", 10_000)
    pieces = to_tiles(words, scales, zeros, bits, 260)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(from_tiles(*pieces, bits, 260), (words, scales, zeros), strict=True))


def test_zeros_are_one_byte_per_row_and_group():
    zeros = torch.randint(0, 16, (21, 3), dtype=torch.uint8)
    _, words, scales, _ = random_weight(21, 96, 4, groups=3)
    zeros_gn = to_tiles(words, scales, pack_codes(zeros, 4, dim=0), 4, 96)[2]
    assert zeros_gn.dtype == torch.uint8 and zeros_gn.is_contiguous() and torch.equal(zeros_gn, zeros.t())


def test_meta_tensors_keep_their_shapes():
    words, scales = torch.empty(40, 25, dtype=torch.int32, device="meta"), torch.empty(40, 1, device="meta")
    tiles, scales_gn, _ = to_tiles(words, scales, None, 4, 200)
    assert tiles.is_meta and tuple(tiles.shape) == (3, 2, 16, 16)
    assert tuple(from_tiles(tiles, scales_gn, None, 4, 200)[0].shape) == (40, 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be one of"),
        ({"words_disk": torch.zeros(8, 7, dtype=torch.int32)}, r"words_disk must be \(8, 8\)"),
        ({"words_disk": torch.zeros(8, 8, dtype=torch.int64)}, "words_disk must be .* got .*int64"),
        ({"zeros_disk": torch.zeros(8, 2, dtype=torch.int32)}, r"zeros_disk must be \(1, 2\)"),
        ({"scales": torch.ones(8, dtype=torch.int32)}, "scales must be a floating"),
    ],
)
def test_tensors_that_contradict_each_other_are_named(change, message):
    good = {
        "words_disk": torch.zeros(8, 8, dtype=torch.int32),
        "scales": torch.ones(8, 2),
        "zeros_disk": torch.zeros(1, 2, dtype=torch.int32),
        "bits": 4,
        "k": 64,
    }
    tiles, scales_gn, zeros_gn = to_tiles(**good)
    with pytest.raises(ValueError, match=message):
        to_tiles(**{**good, **change})
    with pytest.raises(ValueError, match=r"tiles must be \(1, 2, 16, 16\)"):
        from_tiles(tiles, scales_gn, zeros_gn, 4, 130)
    with pytest.raises(ValueError, match=r"zeros_gn must be \(2, 8\)"):
        from_tiles(tiles, scales_gn, zeros_gn.t(), 4, 64)

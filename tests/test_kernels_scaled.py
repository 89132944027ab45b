"""The scaled family without a GPU: how programs share the work, what it refuses, and the kernel on the emulated GPU.

Its assembly: test_kernels_hopper.py. What the compiler makes of it: test_kernels_compile.py and here. That no wait or
barrier can be spared: test_ptx_machine.py.
"""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_check_modules  # noqa: F401

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from check_correct import limit_of
from check_layers import random_packed, reference, relative_rms

from compile_gate import machine_code
from emulated_gpu import emulated_gpu
from helpers import needs_gluon
from lowbit_kernels import scaled
from lowbit_kernels.dispatch import fill_split
from lowbit_kernels.scaled_plan import (
    MOST_STEPS,
    banded_tile,
    first_sharer,
    scaled_why_not,
    segment_of,
    segments_of,
    share_of,
    steps_taken,
)
from lowbit_kernels.tiles import Problem, Tile
from sass_figures import product_loops

pytestmark = needs_gluon()
BF16, FP16 = torch.bfloat16, torch.float16
CUDA = torch.device("cuda")

# --- the plan


@st.composite
def plans(draw):
    """(programs, tiles, steps, sharers) as a launch may have them."""
    programs, tiles, steps = (draw(st.integers(1, most)) for most in (140, 400, 60))
    left = tiles % programs
    return programs, tiles, steps, draw(st.integers(max(1, left), max(1, min(programs, left * steps))))


def work(plan):
    """What each tile is made of: {tile: [(first step, steps, program), ...]} in the order of k."""
    programs, tiles, steps, sharers = plan
    parts = {tile: [] for tile in range(tiles)}
    for p in range(programs):
        for s in range(segments_of(p, programs, tiles, steps, sharers)):
            tile, first, count = segment_of(p, s, programs, tiles, steps, sharers)
            parts[tile].append((first, count, p))
    return {tile: sorted(of_tile) for tile, of_tile in parts.items()}


@given(plans())
@settings(deadline=None)
def test_every_step_of_every_tile_is_done_once_and_its_sharers_are_known(plan):
    programs, tiles, steps, sharers = plan
    whole = tiles // programs * programs
    left_steps = (tiles - whole) * steps
    for tile, parts in work(plan).items():
        assert all(count >= 1 for _, count, _ in parts)
        assert [first for first, _, _ in parts] == [sum(c for _, c, _ in parts[:i]) for i in range(len(parts))]
        assert sum(count for _, count, _ in parts) == steps
        done_by = [p for _, _, p in parts]
        if tile < whole:
            assert done_by == [tile % programs]
            continue
        begin = (tile - whole) * steps
        first, last = (first_sharer(unit, left_steps, sharers) for unit in (begin, begin + steps - 1))
        assert done_by == list(range(first, last + 1)), "the order of the programs is that of k"
        # each has two places for sums: of the first left tile that it touches and of the second
        places = [2 * p + tile - whole - share_of(p, left_steps, sharers) // steps for p in done_by]
        assert all(2 * p <= place <= 2 * p + 1 for p, place in zip(done_by, places, strict=True))
    if sharers == tiles - whole:
        assert all(len(parts) == 1 for parts in work(plan).values()), "no tile is shared"


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 16), st.integers(1, 140))
@settings(deadline=None)
def test_the_steps_of_the_busiest_program_are_counted(tiles, steps, split, multiprocessors):
    taken, share = steps_taken(tiles, steps, split, multiprocessors)
    split = min(split, steps)
    programs = min(multiprocessors, tiles * split)
    left = tiles % programs
    sharers = max(1, min(programs, left * split))
    busiest = [0] * programs
    for parts in work((programs, tiles, steps, sharers)).values():
        for _, count, p in parts:
            busiest[p] += count
    assert max(busiest) == taken and share == sharers / max(1, left)


def test_the_largest_products_stay_within_int32():
    """What the kernel computes in int32: units times sharers, for 512 multiprocessors and the longest K."""
    most = 511 * MOST_STEPS
    assert (most - 1 + 1) * 512 < 2**31 and share_of(512, most, 512) == most


def test_a_band_of_token_tiles_shares_its_weights():
    for tiles_m, tiles_n in ((1, 5), (16, 3), (17, 4), (40, 2)):
        order = [banded_tile(tile, tiles_m, tiles_n) for tile in range(tiles_m * tiles_n)]
        assert sorted(order) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
        assert [m // 16 for m, _ in order] == sorted(m // 16 for m, _ in order)
        for a, b in itertools.pairwise(order):
            assert a[0] // 16 != b[0] // 16 or b[1] - a[1] in (0, 1)


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (4096, 57344, 8192, 4),  # 54 rounds, and 40 tiles for 132 programs
        (256, 8192, 8192, 2),  # 64 tiles: two share each
        (128, 8192, 28672, 5),  # 32 tiles
        (132 * 128, 256, 4096, 1),  # a round exactly
        (128, 256, 256, 1),  # two steps: nothing to share
    ],
)
def test_tiles_are_shared_where_it_pays(m, n, k, expected):
    assert fill_split(Tile("scaled", 128, 256, 1, 8, 4), Problem(m, n, k, 4, 128, BF16), 90, 132) == expected


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 2}, "4 and 8 bits"),
        ({"k": 4100, "group_size": -1}, "K must be a multiple of 8"),
        ({"block_m": 32}, "block_m must be 64 or 128"),
        ({"block_m": 256}, "block_m must be 64 or 128"),
        ({"block_n": 64}, "block_n 128 or 256"),
        ({"num_warps": 4}, "num_warps 8"),
        ({"num_stages": 1}, "num_stages must be 2 to 8"),
        ({"num_stages": 6}, "bytes of shared memory"),
        ({"split_k": 17}, "must be 1 to 16"),
        ({"k": 128 * (MOST_STEPS + 1)}, "K must be at most 1048576"),
        ({"n": 1 << 27}, "32-bit coordinates"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change, reason):
    problem = {"m": 64, "n": 4096, "k": 4096, "bits": 4, "group_size": 128, "dtype": BF16}
    tile = {"family": "scaled", "block_m": 128, "block_n": 256, "split_k": 2, "num_warps": 8, "num_stages": 4}
    assert scaled_why_not(Tile(**tile), Problem(**problem)) is None
    for name, value in change.items():
        (problem if name in problem else tile)[name] = value
    assert reason in scaled_why_not(Tile(**tile), Problem(**problem))


def test_cpu_tensors_and_other_families_are_refused_before_anything_runs():
    x, tiles, scales = torch.zeros(4, 128), torch.zeros(1, 1, 16, 16, dtype=torch.int32), torch.zeros(1, 16)
    arguments = {"bits": 4, "group_size": 128, "n": 16}
    with pytest.raises(ValueError, match="CUDA device, got x on cpu"):
        scaled.scaled_matmul(x, tiles, scales, None, None, tile=Tile("scaled", 64, 128, 1, 8, 4), **arguments)
    with emulated_gpu(90), pytest.raises(ValueError, match="its family is 'gluon', not 'scaled'"):
        packed = random_packed(16, 128, 4, 128, BF16, CUDA)
        x = torch.zeros(4, 128, dtype=BF16, device=CUDA)
        scaled.scaled_matmul(x, packed.tiles, packed.scales_gn, None, None, tile=Tile("gluon", 64, 128), **arguments)
    with emulated_gpu(80), pytest.raises(ValueError, match="written for sm_90, the GPU of x is sm_80"):
        scaled.scaled_matmul(x, packed.tiles, packed.scales_gn, None, None, tile=Tile("scaled", 64, 128), **arguments)


# --- the kernel

LAUNCHES = [
    # tokens, rows, columns, bits, group, zeros, dtype, tile, multiprocessors
    (67, 300, 256, 4, 128, True, BF16, Tile("scaled", 64, 256, 2, 8, 3), 3),  # a round, and one tile for two
    (70, 300, 384, 4, 32, True, FP16, Tile("scaled", 64, 256, 3, 8, 2), 3),  # parts that cross tiles
    (130, 130, 384, 8, 128, True, BF16, Tile("scaled", 128, 256, 16, 8, 2), 5),
    (33, 40, 200, 8, -1, True, BF16, Tile("scaled", 128, 128, 2, 8, 2), 132),  # one tile for both
    (65, 260, 264, 4, -1, False, FP16, Tile("scaled", 64, 128, 1, 8, 4), 2),  # whole tiles, one after the other
    (3, 129, 320, 4, 64, False, BF16, Tile("scaled", 64, 128, 4, 8, 8), 132),
]


@pytest.mark.parametrize(("m", "n", "k", "bits", "group", "asymmetric", "dtype", "tile", "programs"), LAUNCHES)
def test_any_number_of_programs_computes_the_product(m, n, k, bits, group, asymmetric, dtype, tile, programs):
    """The ring runs on from tile to tile; any order of warps, late copies or not: the same bits, no bank conflicts."""
    results = []
    for seed, late in ((0, True), (1, False)):
        with (
            emulated_gpu(90, seed, late) as gpu,
            mock.patch.object(scaled, "multiprocessors", lambda _: programs),
        ):
            torch.manual_seed(1)
            packed = random_packed(n, k, bits, group, dtype, CUDA, asymmetric=asymmetric)
            x, bias = torch.randn(m, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA)
            results.append(packed(x, bias, tile=tile))
            expected = reference(x, packed, bias)
    assert relative_rms(results[0], expected) < limit_of(dtype, m * n, tile)
    assert torch.equal(results[0], results[1])
    for kind, (taken, fewest) in gpu.counts["scaled_kernel"].items():
        assert taken <= 1.05 * fewest, f"{kind}: {taken} passes over the banks, {fewest} could do"


def test_scales_and_tokens_of_any_magnitude():
    """Powers of two bring both into float16's range; without them these would overflow, or vanish."""
    tile = Tile("scaled", 64, 128, 1, 8, 2)
    with emulated_gpu(90):
        rows, tokens = (2.0 ** torch.arange(-size, size, 2, device=CUDA) for size in (48, 5))
        torch.manual_seed(2)
        packed = random_packed(48, 256, 4, 128, BF16, CUDA, asymmetric=True)
        x = torch.randn(5, 256, device=CUDA).to(BF16)
        expected = reference(x, packed)
        packed.scales_gn.mul_(rows.to(BF16))
        out = packed((x * tokens[:, None] ** 12).to(BF16), tile=tile)
    found = out.double() / tokens.double()[:, None] ** 12 / rows
    assert out.isfinite().all() and relative_rms(found, expected) < limit_of(BF16, 5 * 48)


def test_symmetric_4_bit_weights_with_bf16_scales_are_exact():
    """Every significand of bf16 times every code less 8 has 11 bits; less another zero, 12."""
    significands = torch.arange(128, 256).double()[:, None]
    symmetric, any_zero = torch.arange(-8, 8).double(), torch.arange(-15, 16).double()
    for codes, exact in ((symmetric, True), (any_zero, False)):
        products = significands * codes
        assert torch.equal(products.half().double(), products) == exact


# --- what the compiler makes of it


@pytest.mark.parametrize(
    ("tile", "least"),
    [
        (Tile("scaled", 128, 256, 1, 8, 4), 0.65),
        (Tile("scaled", 64, 256, 1, 8, 6), 0.95),
        (Tile("scaled", 128, 128, 1, 8, 5), 0.8),
        (Tile("scaled", 64, 128, 1, 8, 8), 0.8),
    ],
    ids=str,
)
def test_fragments_are_made_while_the_tensor_cores_work(tile, least):
    """In both warpgroups' loops: the share of the conversions that lie between a product's issue and its wait."""
    loops = product_loops(machine_code(scaled.compile_case(tile, Problem(256, 4096, 4096, 4, 128, BF16)), 90))
    assert len(loops) == 2
    for loop in loops:
        multiplying, inside, outside = False, 0, 0
        for one in loop:
            multiplying = one.base == "HGMMA" or (multiplying and not one.opcode.startswith("WARPGROUP.DEPBAR"))
            if one.base == "LOP3" and "0xf000f" in one.operands:
                inside, outside = inside + multiplying, outside + (not multiplying)
        assert sum(one.base == "HGMMA" for one in loop) == 8 * tile.block_n // 128
        assert inside + outside == tile.block_n // 128 * 64 // 2 and inside >= least * (inside + outside)

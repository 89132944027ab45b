"""The compiled kernels themselves, run without a GPU: their PTX for sm_80, 90 and 120, instruction by instruction.

emulated_gpu.py says what that shows and what not. Here run the checks of scripts/gpu_check (its small shapes), with
bfloat16, inline assembly, the copy engine and warp specialization, none of which Triton's interpreter has.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch

import gpu_check_modules  # noqa: F401

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import check_correct
import check_machinery
from check_layers import random_packed, reference, relative_rms
from tune_table import shipped_tiles

from emulated_gpu import emulated_gpu
from lowbit_kernels.int8 import int8_matmul
from lowbit_kernels.int8_tiles import TILES
from lowbit_kernels.tiles import Problem, Tile, fits

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
SUITE = {
    90: {
        "triton bfloat16": 8, "triton float16": 8, "triton same bits": 3, "dequant bfloat16": 8, "dequant float16": 8,
        "grouped bfloat16": 3, "grouped w8a8 bfloat16": 1, "grouped same": 1, "w8a8": 9, "batch invariance": 1,
        "dispatched": 3, "gluon bfloat16": 7, "gluon float16": 7, "gluon same bits": 3, "scaled bfloat16": 7,
        "gluon w8a8": 6, "overlapping launches, scaled": 2, "overlapping launches, w8a8 gluon": 2,
    },
    80: {"triton bfloat16": 8, "grouped bfloat16": 3, "w8a8 bfloat16": 4},
    120: {"triton bfloat16": 8, "grouped w8a8": 2},
}  # fmt: skip
"""By architecture, beginnings of the names of gpu_check's checks, and how many there are of each."""


@pytest.mark.parametrize(
    ("arch", "beginning"), [(arch, beginning) for arch, beginnings in SUITE.items() for beginning in beginnings]
)
def test_the_suite_of_gpu_check_passes(arch, beginning):
    """Copies and products as late as they may for one check, at once for the next."""
    late = itertools.cycle((True, False))
    run = 0
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(emulated_gpu(arch, seed=arch))
        stack.enter_context(mock.patch.object(check_machinery, "compiled_fullgraph", lambda *_: 0.0))
        stack.enter_context(mock.patch.object(check_correct, "RUNS", 2))
        for check in check_correct.checks(CUDA, arch, tiny=True):
            if check.name.startswith(beginning):
                gpu.late = next(late)
                check.run()
                run += 1
    assert run == SUITE[arch][beginning]
    for kernel, counts in gpu.counts.items():
        if kernel != "to_halves_kernel":  # a reduction over the scales, not measured to matter
            assert_banks_do_not_conflict(counts)


def assert_banks_do_not_conflict(counts, kinds=frozenset()):
    """Each access to shared memory takes as few passes as its bytes need; 5 % for what is not of the main loop."""
    assert kinds <= set(counts)
    for kind, (taken, fewest) in counts.items():
        assert taken <= 1.05 * fewest, f"{kind}: {taken} passes, {fewest} could do"


@pytest.mark.parametrize("arch", [80, 90])
def test_every_shipped_tile_computes_what_it_should(arch):
    """Odd shapes, every kind of weight in turn, one program and two per tile."""
    kinds = [(4, 128, False), (4, 32, True), (8, 64, True), (4, -1, True), (8, -1, False), (2, 64, True)]
    shapes = [(1, 1, 256), (17, 33, 256), (16, 64, 384), (67, 40, 512)]
    dtypes = [BF16, torch.float16]
    run = 0
    with emulated_gpu(arch) as gpu:
        shapes_of_tiles = {}  # the same with another number of stages is left to the suite above
        for tile in shipped_tiles(arch, ("triton", "gluon")):
            shapes_of_tiles.setdefault((tile.family, tile.block_m, tile.block_n, tile.num_warps), tile)
        for number, tile in enumerate(shapes_of_tiles.values()):
            m, n, k = shapes[number % len(shapes)]
            bits, group, asymmetric = kinds[(2 * number + run) % len(kinds)]
            problem = Problem(m, n, k, bits, group, dtypes[number % 2], asymmetric)
            tile = Tile(tile.family, tile.block_m, tile.block_n, 1 + number % 2, tile.num_warps, tile.num_stages)
            if not fits(tile, problem, arch):
                continue
            packed = random_packed(n, k, bits, group, problem.dtype, CUDA, asymmetric=asymmetric)
            x, bias = torch.randn(m, k, device=CUDA).to(problem.dtype), torch.randn(n, device=CUDA)
            gpu.late = bool(run % 2)
            error = relative_rms(packed(x, bias, tile=tile), reference(x, packed, bias))
            assert error < check_correct.limit_of(problem.dtype, m * n), (tile, problem)
            run += 1
        for kernel in ("weight_only_kernel", "hopper_kernel")[: 2 if arch == 90 else 1]:
            assert_banks_do_not_conflict(gpu.counts[kernel], {"ld.shared", "ldmatrix"})
    assert run >= 5


@pytest.mark.parametrize("arch", [80, 90])
def test_every_int8_tile_computes_exactly(arch):
    """Integer products are exact, so the result is the reference rounded once."""
    with emulated_gpu(arch) as gpu:
        for number, tile in enumerate(TILES):
            m, n, k = [(1, 17, 512), (19, 33, 112), (70, 40, 512)][number % 3]
            codes, x_q = (torch.randint(-128, 128, size, dtype=torch.int8, device=CUDA) for size in ((n, k), (m, k)))
            x_scale, scales = torch.rand(m, device=CUDA), torch.rand(n, device=CUDA).to(BF16)
            split = 1 + number % 2 if k > tile.block_k else 1
            shared = type(tile)(tile.block_m, tile.block_n, tile.block_k, split, tile.num_warps, tile.num_stages)
            gpu.late = bool(number % 2)
            out = int8_matmul(x_q, x_scale, codes, scales, None, out_dtype=torch.float32, tile=shared)
            exact = (x_q.double() @ codes.double().t()) * x_scale.double()[:, None] * scales.double()
            assert relative_rms(out, exact) < 3 * 2.0**-24, tile
        assert_banks_do_not_conflict(gpu.counts["_int8_matmul_kernel"], {"ld.shared"})


@pytest.mark.parametrize("tile", [Tile("triton", 16, 64, 3, 4, 3), Tile("gluon", 16, 128, 3, 4, 2)], ids=str)
def test_no_order_of_warps_and_programs_changes_a_bit(tile):
    packed_kind = (64, 1152, 4, 128, BF16, CUDA)
    results = []
    for seed, late in [(0, True), (1, True), (2, False), (3, False)]:
        with emulated_gpu(90, seed, late):
            torch.manual_seed(5)
            packed, x = random_packed(*packed_kind, asymmetric=True), torch.randn(5, 1152, device=CUDA).to(BF16)
            results.append(packed(x, tile=tile).cpu())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("arch", [80, 90])
def test_activations_with_a_mean_keep_to_the_limit(arch):
    """Tensor cores cut sums off towards zero: whatever is large beside the weights, such as an offset, is a bias."""
    with emulated_gpu(arch):
        torch.manual_seed(6)
        x = (torch.randn(8, 2048, device=CUDA).abs() + 1).half()
        for bits, asymmetric, tile in itertools.product(
            (2, 4, 8), (False, True), (Tile("triton", 8, 64, 1, 2, 4), Tile("triton", 16, 128, 1, 4, 4))
        ):
            packed = random_packed(128, 2048, bits, 128, torch.float16, CUDA, asymmetric=asymmetric)
            error = relative_rms(packed(x, tile=tile), reference(x, packed))
            assert error < 2.4e-4, f"{bits} bits, {tile}: {error:.2e}; one rounding to fp16 is 2.1e-4"

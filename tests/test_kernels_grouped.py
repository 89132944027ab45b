"""The grouped kernel's own code against float64, run by Triton's interpreter on the CPU.

A process of its own and fp16 only, for the reasons in test_kernels_interpret.py. The architecture is pretended: it
decides the order of the operands and where the sums of x come from.
"""

from dataclasses import replace

import pytest
import torch

from helpers import Case, assert_close, random_quantized, tolerance
from interpreted import BOUNDS_FROM_ARRAYS, INTERPRETING, assert_passes_interpreted
from lowbit.affine import dequantize
from lowbit.packing import pack_codes

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

pytestmark = BOUNDS_FROM_ARRAYS

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from triton.runtime.interpreter import interpreter_builder

    from lowbit import grouped as op
    from lowbit.ops import CUDA_TILES, set_batch_invariant
    from lowbit_kernels import grouped, weight_only
    from lowbit_kernels.grouped import grouped_matmul, grouped_reference
    from lowbit_kernels.grouped_routing import routing_constants, token_tiles
    from lowbit_kernels.grouped_tiles import grouped_tile
    from lowbit_kernels.layout import to_tiles
    from lowbit_kernels.tiles import Problem, Tile, why_not
    from lowbit_kernels.weight_only import weight_only_matmul

    FEW = Tile("triton", 8, 32, 1, 4, 1)
    TILES = (FEW, Tile("triton", 16, 64, 1, 4, 1), Tile("triton", 32, 64, 1, 4, 1), Tile("triton", 64, 64, 1, 4, 1))
    KINDS = [(2, 64, False), (4, 32, True), (4, 128, False), (8, 64, True), (8, -1, False), (4, -1, True)]

    def experts(case, count):
        """Unpacked weights, and what the kernel gets of them: tiles, scales, zeros, bias, each for all experts."""
        weights = [random_quantized(case.n, case.k, case.spec, torch.float16) for _ in range(count)]
        parts = []
        for qw in weights:
            zeros = None if qw.zeros is None else pack_codes(qw.zeros, case.bits, dim=0)
            parts.append(to_tiles(pack_codes(qw.codes, case.bits), qw.scales, zeros, case.bits, case.k))
        stacked = [None if tensors[0] is None else torch.stack(tensors) for tensors in zip(*parts, strict=True)]
        bias = torch.randn(count, case.n).half() if case.bias else None
        return weights, (*stacked, bias)

    def ends_of(counts):
        return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def multiply(case, x, ends, args, tile=None, **how):
        return grouped_matmul(x, ends, *args, bits=case.bits, group_size=case.group_size, n=case.n, tile=tile, **how)

    def float64(case, x, counts, weights, bias):
        out, begin = torch.zeros(len(x), case.n, dtype=torch.float64), 0
        for e, (rows, qw) in enumerate(zip(counts, weights, strict=True)):
            mine = slice(begin, begin + rows)
            out[mine] = x[mine].double() @ dequantize(qw, torch.float64).t()
            out[mine] += 0 if bias is None else bias[e].double()
            begin += rows
        return out

    @pytest.fixture(params=(80, 90), ids="sm_{}".format)
    def arch(request, monkeypatch):
        monkeypatch.setattr(grouped, "device_arch", lambda device: request.param)
        monkeypatch.setattr(weight_only, "device_arch", lambda device: request.param)
        return request.param

    @pytest.mark.parametrize("index, kind", list(enumerate(KINDS)), ids=str)
    def test_matches_float64(index, kind, arch):
        """Starved experts first, last and between, one row, more than a tile, rows that are nobody's."""
        bits, group_size, symmetric = kind
        counts = [0, 3, 0, 0, 17, 1, 0]
        for turn, rows in enumerate((0, 4)):
            tile = TILES[(index + turn) % len(TILES)]
            case = Case(0, 34, 256, bits, group_size, symmetric, bias=turn == 0)
            weights, args = experts(case, len(counts))
            x = torch.randn(sum(counts) + rows, case.k).half()
            out = multiply(case, x, ends_of(counts), args, tile)
            assert out.dtype == torch.float16 and out.is_contiguous()
            expected = float64(case, x, counts, weights, args[3])
            assert_close(out, expected, **tolerance(torch.float16, k=case.k))
            assert bool((out[sum(counts) :] == 0).all())
            reference = grouped_reference(x, ends_of(counts), *args, bits=bits, group_size=group_size)
            assert_close(reference, expected, **tolerance(torch.float64))

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_a_row_has_the_bits_that_its_expert_alone_would_give_it(tile, arch):
        case = Case(0, 40, 200, 8, -1, False, bias=True)
        counts = [5, 0, 20, 9]
        _, args = experts(case, len(counts))
        x = torch.randn(sum(counts), case.k).half()
        out, begin = multiply(case, x, ends_of(counts), args, tile), 0
        for e, rows in enumerate(counts):
            alone = weight_only_matmul(
                x[begin : begin + rows].clone(), *(t[e] for t in args), bits=8, group_size=-1, n=case.n, tile=tile
            )
            assert torch.equal(out[begin : begin + rows], alone)
            begin += rows

    def test_no_program_writes_the_rows_of_another(monkeypatch):
        """The last program first gives the same bits, though tiles reach into the rows of the next expert."""
        case = Case(0, 34, 64, 8, -1)
        counts = [3, 9, 0, 1]
        weights, args = experts(case, len(counts))
        x = torch.randn(sum(counts) + 2, case.k).half()
        first = multiply(case, x, ends_of(counts), args, FEW)
        assert_close(first, float64(case, x, counts, weights, None), **tolerance(torch.float16, k=case.k))
        last, plain = token_tiles(len(x), len(counts), 8) * 2 - 1, interpreter_builder.set_grid_idx
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda i, y, z: plain(last - i if i <= last else i, y, z)
        )
        assert torch.equal(multiply(case, x, ends_of(counts), args, FEW), first)

    @settings(max_examples=15)
    @given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=9), nobody=st.integers(0, 12))
    def test_any_split_of_the_rows(counts, nobody):
        case = Case(0, 16, 64, 8, -1)
        weights, args = experts(case, len(counts))
        routed = sum(counts)
        x = torch.randn(routed + nobody, case.k, generator=torch.Generator().manual_seed(routed)).half()
        out = multiply(case, x, ends_of(counts), args, FEW)
        expected = float64(case, x, counts, weights, None)
        # the tolerance is relative to the size of results: zeros, which nobody computes, are not among them
        assert_close(out[:routed], expected[:routed], **tolerance(torch.float16, k=case.k))
        assert not out[routed:].any()

    @settings(max_examples=200)
    @given(
        counts=st.lists(st.integers(0, 300), min_size=1, max_size=40),
        nobody=st.integers(0, 300),
        block_m=st.sampled_from([8, 16, 64]),
    )
    def test_the_grid_covers_the_worst_case(counts, nobody, block_m):
        needed = sum(-(-rows // block_m) for rows in (*counts, nobody))
        assert needed <= token_tiles(sum(counts) + nobody, len(counts), block_m)

    def test_the_grid_is_no_larger_than_the_worst_case():
        assert token_tiles(8, 128, 8) == 8  # a token and eight experts: a tile each
        assert token_tiles(64, 3, 8) == 11  # such as 1, 1, 1 rows and 61 of nobody

    @pytest.mark.parametrize("ends", [[5, 2, 9], [-4, 3, 200], [300, 300, 300]], ids=str)
    def test_ends_that_make_no_sense_touch_nothing_else(ends):
        """They cannot be refused without waiting for the device. The interpreter reads and writes real memory."""
        case = Case(0, 16, 64, 8, -1)
        _, args = experts(case, 3)
        around = torch.full((3, 12, 16), 7.0, dtype=torch.float16)
        empty = torch.empty
        try:
            torch.empty = lambda *size, **how: around[1] if size == (12, 16) else empty(*size, **how)
            multiply(case, torch.randn(12, 64).half(), torch.tensor(ends, dtype=torch.int32), args, FEW)
        finally:
            torch.empty = empty
        assert bool((around[[0, 2]] == 7).all())

    @pytest.mark.parametrize("here", [[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], ids=str)
    def test_experts_without_a_weight_get_zeros_and_the_others_their_own(here, arch):
        """Which of the weights an expert has, ``slots``, also in another order than the experts'."""
        case = Case(0, 34, 64, 4, 32, False, bias=True)
        counts, slots = [3, 9, 0, 5, 17], torch.tensor(here).cumsum(0).sub(1)
        slots = (sum(here) - 1 - slots).masked_fill(torch.tensor(here) == 0, -1).int()
        weights, args = experts(case, sum(here))
        x = torch.randn(sum(counts) + 2, case.k).half()
        out, begin = multiply(case, x, ends_of(counts), args, FEW, slots=slots), 0
        for rows, slot in zip(counts, slots.tolist(), strict=True):
            mine = slice(begin, begin + rows)
            if slot >= 0:
                expected = float64(case, x[mine], [rows], weights[slot : slot + 1], args[3][slot : slot + 1])
                assert_close(out[mine], expected, **tolerance(torch.float16, k=case.k))
            else:
                assert not out[mine].any()
            begin += rows
        assert not out[begin:].any()
        how = {"bits": 4, "group_size": 32, "slots": slots}
        reference = grouped_reference(x, ends_of(counts), *args, **how)
        own = reference.any(1)
        assert_close(out[own], reference[own], **tolerance(torch.float16, k=case.k))
        assert int(own.sum()) == sum(rows for rows, slot in zip(counts, slots.tolist(), strict=True) if slot >= 0)

    def test_no_rows():
        case = Case(0, 16, 64, 8, -1)
        _, args = experts(case, 3)
        assert multiply(case, torch.zeros(0, 64).half(), ends_of([0, 0, 0]), args).shape == (0, 16)

    @pytest.mark.parametrize("experts_count", [1, 8, 128, 255, 256])
    @pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
    def test_a_tile_is_found_for_any_number_of_rows(arch, experts_count):
        assert routing_constants(experts_count, experts_count, False)["BLOCK_E"] > experts_count
        for m in (1, 8, 64, 1000, 30_000):
            for bits, group_size in ((2, 64), (4, 32), (8, 128)):
                problem = Problem(m, 1536, 2048, bits, group_size, torch.bfloat16, True)
                tile = grouped_tile(problem, experts_count, arch)
                assert why_not(tile, problem, arch) is None and tile.split_k == 1
                fixed = grouped_tile(problem, experts_count, arch, batch_invariant=True)
                assert fixed == grouped_tile(replace(problem, m=1), experts_count, arch, batch_invariant=True)

    def test_what_it_refuses():
        case = Case(0, 16, 64, 4, 32, False, bias=True)
        _, (tiles, scales, zeros, bias) = experts(case, 3)
        x, ends = torch.randn(4, 64).half(), ends_of([1, 2, 1])
        for wrong, message in (
            ((x, ends.long(), tiles, scales, zeros, bias), r"ends must be \(E,\) int32"),
            ((x, ends[:2], tiles, scales, zeros, bias), "tiles must be contiguous and hold the 2 experts"),
            ((x, ends, tiles, scales, zeros[:2], bias), "zeros must be contiguous and hold the 3 experts"),
            ((x, ends, tiles, scales.mT, zeros, bias), "scales must be contiguous"),
            ((x[:, :32], ends, tiles, scales, zeros, bias), "x must be contiguous"),
            ((x, ends, tiles, scales, zeros, bias[:, :8].clone()), r"bias must be \(16,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                multiply(case, wrong[0], wrong[1], wrong[2:])
        for tile, message in (
            (Tile("dequant", 1, 16), "experts share the grid"),
            (Tile("triton", 8, 32, 2, 4, 1), "split_k must be between"),
        ):
            with pytest.raises(ValueError, match=message):
                multiply(case, x, ends, (tiles, scales, zeros, bias), tile)

    def test_too_old_a_gpu_is_named(monkeypatch):
        monkeypatch.setattr(grouped, "device_arch", lambda device: 75)
        case = Case(0, 16, 64, 8, -1)
        _, args = experts(case, 1)
        with pytest.raises(ValueError, match="needs sm_80 or newer, got sm_75"):
            multiply(case, torch.randn(4, 64).half(), ends_of([4]), args)

    def test_the_operator_runs_the_kernel(monkeypatch):
        """lowbit/grouped.py's way on CUDA, on CPU tensors: any strides and address of x, int64 ends."""
        case = Case(0, 34, 96, 4, 32, False, bias=True)
        weights, args = experts(case, 3)
        counts = [2, 0, 3]
        wide = torch.randn(6, 200).half()
        x = wide[1:, 3:99]
        monkeypatch.setattr(op, "_per_expert", None)  # the kernel or nothing
        out = op._forward_cuda(x, ends_of(counts).long(), None, *args, case.bits, case.group_size, CUDA_TILES)
        assert_close(out, float64(case, x, counts, weights, args[3]), **tolerance(torch.float16, k=case.k))

    def test_rows_can_be_made_independent_of_the_batch():
        case = Case(0, 32, 128)
        _, args = experts(case, 2)
        x = torch.randn(70, case.k).half()
        set_batch_invariant(True)
        try:
            whole = op._forward_cuda(x, ends_of([40, 30]), None, *args, case.bits, case.group_size, CUDA_TILES)
            few = op._forward_cuda(x[38:42], ends_of([2, 2]), None, *args, case.bits, case.group_size, CUDA_TILES)
        finally:
            set_batch_invariant(False)
        assert torch.equal(few, whole[38:42])

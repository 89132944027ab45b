"""The fused and the dequant kernels' own code against float64, run by Triton's interpreter on the CPU.

Triton decides at import whether to interpret, so these tests run in a process of their own. fp16 and fp32 only: bf16 is
silently wrong in the interpreter (it truncates and computes on the bits). The architecture is pretended: it decides the
order of the operands (mma.sync's below sm_90, wgmma's on it) and where the sums of x come from.
"""

from dataclasses import replace

import pytest
import torch

from helpers import MATMUL_CASES, Case, assert_close, random_quantized, tolerance
from interpreted import INTERPRETING, assert_passes_interpreted
from lowbit.affine import dequantize
from lowbit.packing import pack_codes

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    from lowbit_kernels import prefill, weight_only
    from lowbit_kernels.layout import to_tiles
    from lowbit_kernels.tiles import Problem, Tile
    from lowbit_kernels.weight_only import constants, weight_only_matmul, weight_only_reference

    ARCHS = (80, 90)
    FEW, SPLIT, WIDE = Tile("triton", 8, 32, 1, 4, 2), Tile("triton", 16, 64, 3, 2, 2), Tile("triton", 64, 64, 2, 4, 2)
    SHAPES = (
        FEW,
        SPLIT,
        Tile("triton", 32, 64, 1, 4, 2),
        WIDE,
        Tile("triton", 32, 128, 2, 8, 2),
        Tile("dequant", 1, 16),
    )

    def fitted(tile, case):
        """The tile with no more splits than the case has steps along K."""
        return replace(tile, split_k=min(tile.split_k, -(-case.k * case.bits // 512)), num_stages=1)

    def tensors(case, dtype):
        qw = random_quantized(case.n, case.k, case.spec, dtype)
        zeros = None if qw.zeros is None else pack_codes(qw.zeros, case.bits, dim=0)
        tiles, scales, zeros = to_tiles(pack_codes(qw.codes, case.bits), qw.scales, zeros, case.bits, case.k)
        bias = torch.randn(case.n, dtype=dtype) if case.bias else None
        return qw, (torch.randn(case.m, case.k).to(dtype), tiles, scales, zeros, bias)

    def multiply(case, args, tile):
        return weight_only_matmul(*args, bits=case.bits, group_size=case.group_size, n=case.n, tile=tile)

    def float64(case, qw, args):
        expected = args[0].double() @ dequantize(qw, torch.float64).t()
        return expected + args[4].double() if case.bias else expected

    @pytest.fixture(params=ARCHS, ids="sm_{}".format)
    def arch(request, monkeypatch):
        monkeypatch.setattr(weight_only, "device_arch", lambda device: request.param)
        return request.param

    @pytest.mark.parametrize("arch, dtype", [(80, torch.float16), (90, torch.float16), (80, torch.float32)], ids=str)
    @pytest.mark.parametrize("index, case", list(enumerate(MATMUL_CASES)), ids=str)
    def test_matches_float64(index, case, dtype, arch, monkeypatch):
        """Every width, group size, symmetry and odd shape; the tile shapes take turns."""
        monkeypatch.setattr(weight_only, "device_arch", lambda device: arch)
        qw, args = tensors(case, dtype)
        tile = fitted(SHAPES[(index + 3) % len(SHAPES)], case)
        actual = multiply(case, args, tile)
        assert actual.dtype == dtype and actual.is_contiguous()
        roundings = 3 if tile.family == "dequant" else 1  # weight, bias and result
        assert_close(actual, float64(case, qw, args), **tolerance(dtype, roundings, k=case.k))

    @pytest.mark.parametrize("case", MATMUL_CASES, ids=str)
    def test_the_reference_is_the_formula(case):
        qw, args = tensors(case, torch.float32)
        actual = weight_only_reference(*args, bits=case.bits, group_size=case.group_size)
        assert_close(actual, float64(case, qw, args), **tolerance(torch.float64, k=1))

    @pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
    @pytest.mark.parametrize("tile", SHAPES, ids=str)
    @pytest.mark.parametrize("bits, group_size", [(2, 128), (4, 32), (8, 64)])
    def test_every_branch_gives_the_result(bits, group_size, tile, symmetric, arch):
        case = Case(19, 34, 256, bits, group_size, symmetric, bias=True)
        qw, args = tensors(case, torch.float16)
        roundings = 3 if tile.family == "dequant" else 1
        actual = multiply(case, args, fitted(tile, case))
        assert_close(actual, float64(case, qw, args), **tolerance(torch.float16, roundings, k=case.k))

    def test_the_shapes_above_take_every_branch():
        """Both operand orders and all four origins of the sums are among them, and x by the run and by the step."""
        seen = {
            (chosen["FOR_MMA"], chosen["SUMS"], chosen["PART"])
            for arch in ARCHS
            for tile in SHAPES
            for asymmetric in (False, True)
            if tile.family == "triton"
            for chosen in [
                constants(Problem(19, 34, 256, 4, 32, torch.float16, asymmetric), tile, arch, has_bias=False)
            ]
        }
        wgmma = {(False, sums, 32) for sums in (0, 2, 3)}
        mma = {(True, sums, part) for sums in (0, 1, 3) for part in (32, 128)}
        assert seen == {*mma, *wgmma}

    @pytest.mark.parametrize("tile", [FEW, Tile("triton", 64, 64, 1, 4, 2), Tile("dequant", 1, 16)], ids=str)
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_every_code_in_every_position_is_exact(bits, tile, arch):
        """A one-hot x reads single codes: the result is code - zero, an integer, for every column of a unit."""
        columns = 512 // bits
        codes = (torch.arange(16)[:, None] * 5 + torch.arange(columns)[None, :]) % 2**bits
        codes = codes.to(torch.uint8)
        zeros = (torch.arange(16) * 11 % 2**bits).to(torch.uint8).view(16, 1)
        tiles, scales, zeros_gn = to_tiles(
            pack_codes(codes, bits), torch.ones(16, 1).half(), pack_codes(zeros, bits, dim=0), bits, columns
        )
        x = torch.eye(columns, dtype=torch.float16)
        out = weight_only_matmul(x, tiles, scales, zeros_gn, None, bits=bits, group_size=-1, n=16, tile=tile)
        assert torch.equal(out.t(), codes.half() - zeros.half())

    @pytest.mark.parametrize("case", [Case(5, 40, 640, 4, 64, False), Case(20, 40, 300, 8, -1)], ids=str)
    def test_split_sums_do_not_depend_on_who_arrives_last(case, monkeypatch):
        """The programs run in four orders; the bits are those of the first, and the counters are zero again."""
        _, args = tensors(case, torch.float16)
        tile, counters = Tile("triton", 8, 32, 5, 4, 2), torch.zeros(64, dtype=torch.int32)
        monkeypatch.setattr(
            weight_only,
            "workspace",
            lambda tiles, split_k, block, device: (torch.full((tiles, split_k, block), float("nan")), counters),
        )
        plain, results = interpreter_builder.set_grid_idx, []
        for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 1, 3), (1, 0, 4, 3, 2)):
            monkeypatch.setattr(
                interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: plain(x, order[y] if y < 5 else y, z)
            )
            results.append(multiply(case, args, tile))
            assert not counters.any()
        assert all(torch.equal(results[0], r) for r in results[1:])
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", plain)
        assert_close(results[0], multiply(case, args, FEW), **tolerance(torch.float16, 2, k=case.k))

    @pytest.mark.parametrize("tile", [FEW, SPLIT, WIDE], ids=str)
    @pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
    def test_a_row_does_not_depend_on_the_rows_beside_it(tile, symmetric, arch):
        """What batch_invariant rests on: with one and the same tile, row i has the same bits for every M."""
        case = Case(70, 48, 256, 4, 64, symmetric, bias=True)
        _, (x, *rest) = tensors(case, torch.float16)
        whole = multiply(case, (x, *rest), fitted(tile, case))
        for m in (1, 7, 33):
            assert torch.equal(multiply(case, (x[:m].contiguous(), *rest), fitted(tile, case)), whole[:m])
        other = torch.cat([x[:1], torch.full_like(x[1:], 1000.0)])
        assert torch.equal(multiply(case, (other, *rest), fitted(tile, case))[:1], whole[:1])

    def test_no_tokens():
        case = Case(0, 24, 64, 4, 32, bias=True)
        _, args = tensors(case, torch.float16)
        for tile in (FEW, WIDE, Tile("dequant", 1, 16)):
            out = multiply(case, args, fitted(tile, case))
            assert out.shape == (0, 24) and out.dtype == torch.float16

    def test_chunks_of_rows_join(monkeypatch):
        case = Case(9, 300, 128, 4, 64, False, bias=True)
        qw, args = tensors(case, torch.float16)
        monkeypatch.setattr(prefill, "CHUNK_BYTES", 2 * 128 * 128)
        assert prefill.chunk_rows(case.n, case.k) == 128
        actual = multiply(case, args, Tile("dequant", 1, 16))
        assert_close(actual, float64(case, qw, args), **tolerance(torch.float16, 3, k=case.k))

    @pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
    def test_a_mean_in_x_costs_no_accuracy(symmetric, arch):
        """(64 + zero) * sum(x) comes off a sum of the same size: what is lost there is fp32's, not fp16's."""
        case = Case(8, 32, 512, symmetric=symmetric)
        qw, (_, *rest) = tensors(case, torch.float16)
        x = (8 + torch.randn(case.m, case.k)).half()
        x[:, 3] = 200  # an outlier channel
        expected = x.double() @ dequantize(qw, torch.float64).t()
        size = expected.square().mean().sqrt()
        lost = float(1040 * x.double().abs().sum(1).max() * qw.scales.double().max() / size) * 2.0**-24
        once = tolerance(torch.float16)
        actual = multiply(case, (x, *rest), FEW)
        assert_close(actual, expected, rms=once["rms"] + lost, peak=once["peak"] + 4 * lost)

    @pytest.fixture
    def far(monkeypatch):
        """Run one program of a launch, at a given place of the grid, and copy no tensor."""

        def place(x):
            plain_idx, plain_dim = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
            monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda a, b, c: plain_dim(2**31 - 1, 1, 1))
            monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda a, b, c: plain_idx(x, b, c))
            monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
            monkeypatch.setattr(weight_only, "cdiv", lambda a, b: 1)

        return place

    def untouched(*shape, dtype):
        """Memory that nothing reads or writes is not there: a tensor of many GB costs what is used of it."""
        return torch.empty(shape, dtype=dtype)

    def test_weights_of_more_than_2_to_the_31_words(far, monkeypatch):
        n, k = 2**27 + 40, 128  # 2**31 + 640 words, the last rows past them
        case = Case(3, n, k)
        small = Case(3, 40, k)
        qw, (x, tiles_small, scales_small, _, _) = tensors(small, torch.float16)
        tiles = untouched(n // 16 + 1, 1, 16, 16, dtype=torch.int32)
        scales = untouched(1, n, dtype=torch.float16)
        assert tiles.numel() > 2**31
        tiles[-3:], scales[:, -40:] = tiles_small, scales_small
        out = untouched(3, n, dtype=torch.float16)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: out)
        far(n // 32 - 1 + (n % 32 > 0))  # the last tile of 32 rows: 8 of the 40
        weight_only._launch(
            x, tiles, scales, None, None, Problem(3, n, k, 4, 128, torch.float16), Tile("triton", 8, 32, 1, 4, 2), 80
        )
        expected = x.double() @ dequantize(qw, torch.float64).t()
        assert_close(out[:, -8:], expected[:, -8:], **tolerance(torch.float16, k=case.k))

    def test_results_and_activations_of_more_than_2_to_the_31_elements(far, monkeypatch):
        m, n, k = 2**24 + 5, 160, 160
        small = Case(5, n, k, group_size=32, symmetric=False, bias=True)
        qw, (x_small, *rest) = tensors(small, torch.float16)
        x, out = untouched(m, k, dtype=torch.float16), untouched(m, n, dtype=torch.float16)
        assert x.numel() > 2**31 and out.numel() > 2**31
        x[-5:] = x_small
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: out)
        tiles_n = 5
        far(m // 8 // 16 * 16 * tiles_n)  # the first tile of the last band, which is one tile of 5 tokens high
        assert m // 8 % 16 == 0
        problem = Problem(m, n, k, 4, 32, torch.float16, True)
        weight_only._launch(x, *rest, problem, Tile("triton", 8, 32, 1, 4, 2), 80)
        expected = float64(small, qw, (x_small, *rest))
        assert_close(out[-5:, :32], expected[:, :32], **tolerance(torch.float16, k=k))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 3}, "bits must be one of .* got 3"),
            ({"group_size": 48}, "group_size must be one of .* got 48"),
            ({"group_size": 128}, "group_size divide K, got K = 192"),
            ({"n": 24}, r"tiles must be \(2, 2, 16, 16\)"),
            ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "x must be .* got .*float64"),
            ({"x": torch.zeros(192)}, r"x must be \(M, K\)"),
            ({"x": torch.zeros(192, 2).t()}, "x must be contiguous"),
            ({"x": torch.zeros(2 * 192 + 1)[1:].view(2, 192)}, "x must start at a multiple of 16 bytes"),
            ({"tiles": torch.zeros(1, 1, 16, 16, dtype=torch.int32)}, r"tiles must be \(1, 2, 16, 16\)"),
            ({"tiles": torch.zeros(1, 2, 16, 16)}, "tiles must be .* got .*float32"),
            ({"tiles": torch.zeros(1, 2, 16, 32, dtype=torch.int32)[..., ::2]}, "tiles must be contiguous"),
            ({"scales": torch.ones(2, 8)}, r"scales must be \(3, 8\)"),
            ({"scales": torch.ones(8, 3).t()}, "scales must be contiguous"),
            ({"zeros": torch.zeros(3, 8, dtype=torch.int32)}, "zeros must be .* got .*int32"),
            ({"bias": torch.zeros(7)}, r"bias must be \(8,\)"),
            ({"tile": Tile("triton", 8, 24, 1, 4, 2)}, "block_n must be a power of two of at least 16, got 24"),
            ({"tile": Tile("triton", 4, 32, 1, 4, 2)}, "block_m must be a power of two of at least 8, got 4"),
            ({"tile": Tile("triton", 8, 32, 3, 4, 2)}, "split_k must be between 1 and the 2 steps"),
            ({"tile": Tile("triton", 256, 256, 1, 8, 4)}, "bytes of shared memory"),
            ({"tile": Tile("gluon", 64, 128, 1, 4, 4)}, "written for sm_90, not sm_80"),
            ({"tile": Tile("marlin", 8, 32, 1, 4, 2)}, "family must be one of"),
        ],
    )
    def test_bad_arguments_are_named_before_a_launch(change, message, monkeypatch):
        good = {
            "x": torch.zeros(2, 192),
            "tiles": torch.zeros(1, 2, 16, 16, dtype=torch.int32),
            "scales": torch.ones(3, 8),
            "zeros": torch.zeros(3, 8, dtype=torch.uint8),
            "bias": None,
            "bits": 4,
            "group_size": 64,
            "n": 8,
            "tile": FEW,
        }
        weight_only_matmul(**good)
        monkeypatch.setattr(weight_only, "_launch", None)
        with pytest.raises(ValueError, match=message):
            weight_only_matmul(**{**good, **change})

    @pytest.mark.parametrize("old", [70, 61])
    def test_an_old_gpu_is_refused(old, monkeypatch):
        case = Case(1, 16, 64, group_size=-1)
        _, args = tensors(case, torch.float16)
        monkeypatch.setattr(weight_only, "device_arch", lambda device: old)
        with pytest.raises(ValueError, match=f"sm_{old} cannot multiply torch.float16"):
            multiply(case, args, FEW)

    def test_bfloat16_needs_sm_80(monkeypatch):
        case = Case(1, 16, 64, group_size=-1)
        _, (x, *rest) = tensors(case, torch.float16)
        monkeypatch.setattr(weight_only, "device_arch", lambda device: 75)
        with pytest.raises(ValueError, match=r"sm_75 cannot multiply torch\.bfloat16"):
            multiply(case, (x.bfloat16(), *rest), FEW)

    def test_the_dispatched_tile_can_be_batch_invariant():
        """With no tile given: the result is right, and batch_invariant makes its rows' bits independent of M."""
        case = Case(40, 96, 512, 4, 128, symmetric=False)
        qw, (x, *rest) = tensors(case, torch.float16)
        options = {"bits": 4, "group_size": 128, "n": 96}
        assert_close(
            weight_only_matmul(x, *rest, **options), float64(case, qw, (x, *rest)), **tolerance(torch.float16, 3, k=512)
        )
        whole = weight_only_matmul(x, *rest, **options, batch_invariant=True)
        for m in (1, 3, 17):
            part = weight_only_matmul(x[:m].contiguous(), *rest, **options, batch_invariant=True)
            assert torch.equal(part, whole[:m])

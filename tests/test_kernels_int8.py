"""The int8 kernels' own code, run by Triton's interpreter on the CPU, against exact integers and float64.

Triton decides at import whether to interpret, so these tests run in a process of their own. bf16 is silently wrong in
the interpreter; the kernels see fp16 and fp32 here.
"""

from dataclasses import replace

import pytest
import torch

from helpers import HALF_ULP, assert_close, tolerance
from interpreted import BOUNDS_FROM_ARRAYS, INTERPRETING, assert_passes_interpreted

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

pytestmark = BOUNDS_FROM_ARRAYS

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:
    from lowbit_kernels import int8 as module
    from lowbit_kernels.int8 import int8_linear, int8_matmul, int8_matmul_reference
    from lowbit_kernels.int8_quantize import LARGEST_BLOCK, quantize_activations, quantize_activations_reference
    from lowbit_kernels.int8_tiles import TILES, Int8Tile, largest_k, pick_tile, why_not

    SMALL = Int8Tile(16, 16, 32, 1, 4, 2)
    LONG = LARGEST_BLOCK + 77  # two blocks, the second one ragged

    # --- quantization

    def same(actual, expected):
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    @pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5), (4, 64), (2, 100), (7, 129), (2, LONG)], ids=str)
    def test_activations_get_the_references_integers(shape, dtype):
        x = (torch.randn(shape) * torch.logspace(-3, 3, max(1, shape[0]))[: shape[0], None]).to(dtype)
        same(quantize_activations(x, sums=True), quantize_activations_reference(x))
        static = torch.tensor([0.02], dtype=dtype)
        same(quantize_activations(x, static, sums=True), quantize_activations_reference(x, static))
        assert quantize_activations(x)[2] is None

    def test_dynamic_is_within_half_a_step_and_uses_the_whole_range():
        x = torch.randn(6, 300) * torch.tensor([1e-20, 1e-3, 1.0, 5.0, 1e4, 1e30])[:, None]
        q, scale, _ = quantize_activations(x)
        assert q.abs().amax(1).tolist() == [127] * 6
        error = (q.double() * scale.double()[:, None] - x.double()).abs()
        assert (error <= scale.double()[:, None] * (0.5 + 127 * 3 * HALF_ULP[torch.float32])).all()

    def test_ties_go_to_the_even_integer():
        """absmax 127 makes the scale 1, so halves are ties."""
        x = torch.arange(-126.5, 127, 1.0).unsqueeze(0)
        x = torch.cat([x, torch.tensor([[127.0]])], 1)
        q, scale, _ = quantize_activations(x)
        assert scale.item() == 1.0
        assert torch.equal(q[0].float(), x[0].round()) and (q[0, :-1] % 2 == 0).all()

    def test_rows_of_zeros_and_of_the_smallest_numbers_give_zeros():
        x = torch.zeros(2, 40)
        x[1] = 1e-40
        q, scale, sums = quantize_activations(x, sums=True)
        assert not q.any() and not sums.any()
        assert (scale > 0).all() and scale.isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_token_that_is_not_finite_is_nan_and_no_other(bad):
        x = torch.randn(3, 70)
        x[1, 33] = bad
        q, scale, sums = quantize_activations(x, sums=True)
        same((q, scale, sums), quantize_activations_reference(x))
        assert scale.isnan().tolist() == [False, True, False] and not q[1].any() and sums[1] == 0
        w, w_scale = torch.randint(-128, 128, (5, 70), dtype=torch.int8), torch.rand(5)
        out = int8_linear(x, w, w_scale, None, None, None)
        assert out.isnan().all(1).tolist() == [False, True, False] and out[0].isfinite().all()

    def test_a_static_scale_saturates_and_passes_nan_on():
        x = torch.tensor([[1000.0, -1000.0, float("inf"), -float("inf")], [0.0, 1.0, float("nan"), 2.0]])
        for make in (quantize_activations, quantize_activations_reference):
            q, scale, *_ = make(x, torch.tensor(0.5))
            assert q[0].tolist() == [127, -128, 127, -128] and q[1].tolist() == [0, 2, 0, 4]
            assert scale[0] == 0.5 and scale[1].isnan()

    @pytest.mark.parametrize("given", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_static_scale_that_is_none_makes_everything_nan(given):
        for make in (quantize_activations, quantize_activations_reference):
            q, scale, *_ = make(torch.randn(3, 9), torch.tensor(given))
            assert scale.isnan().all() and not q.any()

    # --- the product

    def operands(m, n, k, *, asymmetric=False, bias=False, dtype=torch.float16):
        extreme = torch.tensor([-128, 127], dtype=torch.int8)
        x, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        x[: m // 3], w[: n // 3] = extreme[0], extreme[torch.randint(0, 2, (n // 3, k))]
        scales = torch.rand(m) / 100, (torch.rand(n) / 100).to(dtype)
        zero = torch.randint(-128, 128, (n,), dtype=torch.int8) if asymmetric else None
        return x, scales[0], w, scales[1], (torch.randn(n).to(dtype) if bias else None), zero

    CASES = [
        (0, 8, 32, False, True),
        (1, 1, 1, True, True),
        (1, 64, 256, False, False),
        (5, 33, 100, True, True),
        (16, 130, 48, False, True),
        (17, 15, 129, True, False),
        (40, 65, 511, False, True),
        (70, 70, 64, True, True),
        (131, 129, 128, False, False),
    ]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_matches_exact_integers_scaled_in_float64(case, dtype):
        m, n, k, asymmetric, with_bias = case
        x, xs, w, ws, bias, zero = operands(m, n, k, asymmetric=asymmetric, bias=with_bias, dtype=dtype)
        sums = x.sum(1, dtype=torch.int32) if asymmetric else None
        expected = int8_matmul_reference(x, xs, w, ws, bias, w_zero=zero)
        for tile in (SMALL, None):
            out = int8_matmul(x, xs, w, ws, bias, out_dtype=dtype, w_zero=zero, row_sums=sums, tile=tile)
            assert out.dtype == dtype
            # four fp32 roundings (int to float, two scales, bias), one to the dtype
            error = (out.double() - expected).abs()
            size = expected.abs() + (0 if bias is None else bias.double().abs())
            assert (error <= (HALF_ULP[dtype] + 5 * HALF_ULP[torch.float32]) * size + 2.0**-25).all()

    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_the_sums_are_exact(asymmetric):
        """With scales of 1 and fp32 out, sums below 2**24 must come out to the last integer."""
        x, _, w, _, _, zero = operands(20, 40, 500, asymmetric=asymmetric)
        sums = x.sum(1, dtype=torch.int32) if asymmetric else None
        ones = torch.ones(20), torch.ones(40)
        expected = x.long() @ (w.long() - (0 if zero is None else zero.long()[:, None])).t()
        assert expected.abs().max() < 2**24
        for split in (1, 3):
            tile = Int8Tile(16, 32, 64, split, 4, 2)
            out = int8_matmul(x, ones[0], w, ones[1], None, out_dtype=torch.float32, w_zero=zero, row_sums=sums,
                              tile=tile)  # fmt: skip
            assert torch.equal(out.long(), expected)

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_every_tile_and_split_gives_the_same_bits(tile):
        x, xs, w, ws, bias, zero = operands(37, 70, 800, asymmetric=True, bias=True)
        args = {"out_dtype": torch.float16, "w_zero": zero, "row_sums": x.sum(1, dtype=torch.int32)}
        expected = int8_matmul(x, xs, w, ws, bias, tile=SMALL, **args)
        for split in (1, 2, 4):
            shared = Int8Tile(tile.block_m, tile.block_n, tile.block_k, min(split, -(-800 // tile.block_k)), 4, 2)
            assert torch.equal(int8_matmul(x, xs, w, ws, bias, tile=shared, **args), expected)

    def test_a_row_does_not_depend_on_how_many_there_are():
        x, xs, w, ws, bias, _ = operands(33, 40, 300, bias=True)
        whole = int8_matmul(x, xs, w, ws, bias, out_dtype=torch.float16)
        for m in (1, 2, 17):
            assert torch.equal(int8_matmul(x[:m], xs[:m], w, ws, bias, out_dtype=torch.float16), whole[:m])

    def test_int32_holds_the_largest_sum():
        k = largest_k(False)
        x = torch.full((1, k), -128, dtype=torch.int8)
        out = int8_matmul(x, torch.ones(1), x, torch.ones(1), None, out_dtype=torch.float32,
                          tile=Int8Tile(16, 16, 256, 1, 4, 1))  # fmt: skip
        assert out.item() == float(torch.tensor(16384 * k).float()) > 2**31 - 2**15
        long = torch.zeros(1, k + 1, dtype=torch.int8)
        with pytest.raises(ValueError, match=f"K from 1 to {k} .*got N = 1, K = {k + 1}"):
            int8_matmul(long, torch.ones(1), long, torch.ones(1), None, out_dtype=torch.float32)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_a_whole_linear_is_as_close_as_int8_allows(static, asymmetric):
        """Rounding x to steps of s errs by s / sqrt(12) per element, independently: sqrt(K) * s / sqrt(12) * rms(W)."""
        m, n, k = 9, 50, 384
        x = torch.randn(m, k)
        w, w_scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.full((n,), 0.01)
        zero = torch.randint(-20, 20, (n,), dtype=torch.int8) if asymmetric else None
        scale = torch.tensor([x.abs().max() / 127]) if static else None
        weight = (w.double() - (0 if zero is None else zero.double()[:, None])) * w_scale.double()[:, None]
        expected = x.double() @ weight.t()
        out = int8_linear(x, w, w_scale, zero, scale, None)
        step = x.abs().max() / 127
        rms = float(step / 12**0.5 * k**0.5 * weight.square().mean().sqrt() / expected.square().mean().sqrt())
        assert_close(out, expected, rms=1.2 * rms, peak=6 * rms)
        codes, scales, _ = quantize_activations_reference(x, scale)
        exact = int8_matmul_reference(codes, scales, w, w_scale, None, w_zero=zero)
        assert_close(out, exact, **tolerance(torch.float32, roundings=3))

    def test_offsets_are_64_bits():
        """The last rows of a weight of 2.5e9 bytes, of which only the pages that a few programs read are ever touched.

        One split of 4096 runs, which never is the last to arrive, so its partial sums are the whole result.
        """
        n, k, split = 600, 1 << 22, 4096
        w, x = torch.empty(n, k, dtype=torch.int8), torch.empty(1, k, dtype=torch.int8)
        assert (n - 1) * k > 2**31
        w[:, :1024] = torch.randint(-128, 128, (n, 1024), dtype=torch.int8)
        x[:, :1024] = torch.randint(-128, 128, (1, 1024), dtype=torch.int8)
        tile = Int8Tile(16, 64, 256, split)
        count = -(-n // 64)
        partials, counters = torch.empty(count, split, 64, 16, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
        out, ones = torch.zeros(1, n), torch.ones(n)
        module._int8_matmul_kernel[(count, 1)](
            x,
            w,
            ones,
            ones,
            x,
            x,
            ones,
            out,
            partials,
            counters,
            M=1,
            N=n,
            **module.int8_constants(k, tile, False, False),
            PDL=False,
        )
        expected = x[:, :1024].long() @ w[:, :1024].long().t()
        assert torch.equal(partials[:, 0, :, 0].flatten()[:n].long(), expected[0]) and counters.tolist() == [1] * count

    # --- choice and errors

    @pytest.mark.parametrize(
        ("change", "arch", "k", "reason"),
        [
            ({}, 80, 512, "written for sm_90, not sm_80"),
            ({}, 90, 520, "K must be a multiple of 16, got 520"),
            ({"block_m": 32}, 90, 512, "block_m must be 64, 128 or 256"),
            ({"block_k": 64}, 90, 512, "block_k 128"),
            ({"num_warps": 4}, 90, 512, "num_warps 8"),
            ({"num_stages": 9}, 90, 512, "num_stages must be 2 to 8"),
            ({"split_k": 17}, 90, 4096, "split_k 1 to 16"),
            ({"num_stages": 5}, 90, 512, "bytes of shared memory"),
            ({"family": "cuda"}, 90, 512, "family must be triton or gluon, got 'cuda'"),
        ],
    )
    def test_a_tile_in_gluon_that_cannot_run_says_why(change, arch, k, reason):
        tile = Int8Tile(256, 128, 128, 1, 8, 4, "gluon")
        assert why_not(tile, 300, 4096, 512, 90) is None
        assert reason in why_not(replace(tile, **change), 300, 4096, k, arch)

    @pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
    def test_the_picked_tile_always_fits(arch):
        for m in (0, 1, 8, 16, 17, 64, 65, 128, 129, 300, 4096, 100_000):
            for n, k in ((1, 1), (64, 64), (4096, 4096), (8192, 28672), (57344, 8192), (256, 100_000)):
                tile = pick_tile(m, n, k, arch)
                assert why_not(tile, m, n, k, arch) is None, (tile, m, n, k)
                assert tile == pick_tile(m, n, k, arch)

    def good():
        x, xs, w, ws, _, _ = operands(4, 8, 32)
        return {"x_q": x, "x_scale": xs, "w_q": w, "w_scale": ws, "bias": None, "out_dtype": torch.float16}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_q": torch.zeros(4, 33, dtype=torch.int8)}, r"w_q must be \(8, 33\)"),
            ({"x_q": torch.zeros(4, 32)}, "x_q must be .*int8.*float32"),
            ({"x_q": torch.zeros(32, dtype=torch.int8)}, r"x_q must be \(M, K\)"),
            ({"x_q": torch.zeros(32, 4, dtype=torch.int8).t()}, "x_q must be contiguous"),
            ({"x_scale": torch.ones(5)}, r"x_scale must be \(4,\)"),
            ({"w_scale": torch.ones(8, 1)}, r"w_scale must be \(8,\)"),
            ({"w_zero": torch.zeros(8, dtype=torch.int8)}, "row_sums must be given with w_zero"),
            ({"bias": torch.zeros(7)}, r"bias must be \(8,\)"),
            ({"out_dtype": torch.int32}, "out_dtype must be one of"),
            ({"tile": Int8Tile(16, 24, 32)}, "block_n must be a power of two from 16 to 256, got 24"),
            ({"tile": Int8Tile(16, 16, 32, split_k=2)}, "split_k must be between 1 and the 1 steps"),
            ({"tile": Int8Tile(256, 256, 256, num_stages=3)}, "bytes of shared memory"),
            ({"w_q": torch.zeros(8, 32, dtype=torch.int8, device="meta")}, "w_q must be .*meta"),
        ],
    )
    def test_bad_arguments_are_named(change, message):
        assert int8_matmul(**good()).shape == (4, 8)
        with pytest.raises(ValueError, match=message):
            int8_matmul(**{**good(), **change})

    @pytest.mark.parametrize(
        ("x", "static", "message"),
        [
            (torch.zeros(4), None, r"x must be a contiguous \(M, K\)"),
            (torch.zeros(4, 0), None, "x must be a contiguous"),
            (torch.zeros(4, 4, dtype=torch.float64), None, "float64"),
            (torch.zeros(4, 6).t(), None, "strides"),
            (torch.zeros(4, 6), torch.ones(3), r"static must be one element .*\(3,\)"),
            (torch.zeros(4, 6), torch.ones(1, device="meta"), "static must be one element .*meta"),
        ],
    )
    def test_bad_activations_are_named(x, static, message):
        with pytest.raises(ValueError, match=message):
            quantize_activations(x, static)

"""The grouped int8 kernel's own code against exact integers, run by Triton's interpreter on the CPU.

A process of its own and no bf16, for the reasons in test_kernels_int8.py.
"""

import pytest
import torch

from helpers import assert_close, tolerance
from interpreted import BOUNDS_FROM_ARRAYS, INTERPRETING, assert_passes_interpreted

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

pytestmark = BOUNDS_FROM_ARRAYS

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from lowbit import grouped_int8 as op
    from lowbit_kernels import grouped_int8, int8
    from lowbit_kernels.grouped_int8 import (
        grouped_int8_linear,
        grouped_int8_matmul,
        grouped_int8_reference,
    )
    from lowbit_kernels.grouped_tiles import grouped_int8_tile
    from lowbit_kernels.int8 import int8_linear
    from lowbit_kernels.int8_quantize import quantize_activations
    from lowbit_kernels.int8_tiles import Int8Tile, why_not

    FEW = Int8Tile(16, 16, 32, 1, 4, 2)
    TILES = (FEW, Int8Tile(32, 32, 64, 1, 4, 1))
    COUNTS = [0, 3, 0, 20, 1, 0]
    """Starved experts first, last and between, one row, more than a tile."""

    @pytest.fixture(params=(80, 90), ids="sm_{}".format)
    def arch(request, monkeypatch):
        for module in (grouped_int8, int8):
            monkeypatch.setattr(module, "device_arch", lambda device: request.param)

    def stack(count, n, k, *, zeros=False, static=False, bias=False):
        """(w_q, w_scale, w_zero, input_scale, bias) of ``count`` weights."""
        return (
            torch.randint(-128, 128, (count, n, k), dtype=torch.int8),
            0.01 + 0.02 * torch.rand(count, n),
            torch.randint(-128, 128, (count, n), dtype=torch.int8) if zeros else None,
            0.01 + 0.02 * torch.rand(count) if static else None,
            torch.randn(count, n).half() if bias else None,
        )

    def ends_of(counts):
        return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def alone(x, counts, tensors, slots=None):
        """Every expert's rows through the kernel for one weight; zeros where there is none."""
        out, begin = torch.zeros(len(x), tensors[0].shape[1], dtype=x.dtype), 0
        for e, rows in enumerate(counts):
            weight = e if slots is None else int(slots[e])
            if weight >= 0:
                one = [None if tensor is None else tensor[weight] for tensor in tensors]
                out[begin : begin + rows] = int8_linear(x[begin : begin + rows].clone(), *one)
            begin += rows
        return out

    @pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_every_row_has_the_bits_that_its_expert_alone_gives_it(dtype, static, zeros, arch):
        """And the exact sums are what they should be; four rows are nobody's. K is odd, so no row is aligned."""
        for n, k, nobody in ((34, 45, 4), (16, 64, 0)):
            tensors = stack(len(COUNTS), n, k, zeros=zeros, static=static, bias=n == 34)
            x = torch.randn(sum(COUNTS) + nobody, k).to(dtype)
            out = grouped_int8_linear(x, ends_of(COUNTS), None, *tensors)
            assert out.dtype == dtype and out.is_contiguous()
            assert torch.equal(out, alone(x, COUNTS, tensors))
            w_q, w_scale, w_zero, input_scale, bias = tensors
            rows = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)).tolist() + [0] * nobody
            x_q, x_scale, _ = quantize_activations(x, None if input_scale is None else input_scale[rows])
            expected = grouped_int8_reference(x_q, x_scale, ends_of(COUNTS), w_q, w_scale, bias, w_zero=w_zero)
            assert_close(out, expected, **tolerance(dtype, k=4))

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_no_tile_shows_in_the_result(tile, arch):
        w_q, w_scale, _, _, bias = stack(4, 40, 130, bias=True)
        x_q, x_scale = torch.randint(-128, 128, (42, 130), dtype=torch.int8), torch.rand(42)
        args = (x_q, x_scale, ends_of([5, 0, 30, 7]), w_q, w_scale, bias)
        out = grouped_int8_matmul(*args, out_dtype=torch.float32, tile=tile)
        assert torch.equal(out, grouped_int8_matmul(*args, out_dtype=torch.float32))
        assert_close(out, grouped_int8_reference(*args), **tolerance(torch.float32, k=4))

    @settings(max_examples=15)
    @given(
        experts=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=9),
        nobody=st.integers(0, 12),
    )
    def test_any_split_of_the_rows_over_experts_with_a_weight_and_without(experts, nobody):
        counts, here = [rows for rows, _ in experts], [has for _, has in experts]
        slots = torch.tensor(here).cumsum(0).sub(1).masked_fill(~torch.tensor(here), -1).int()
        tensors = stack(max(1, sum(here)), 16, 32, static=True)
        x = torch.randn(sum(counts) + nobody, 32).half()
        out = grouped_int8_linear(x, ends_of(counts), slots, *tensors)
        assert torch.equal(out, alone(x, counts, tensors, slots))

    @pytest.mark.parametrize("ends", [[5, 2, 9], [-4, 3, 200], [300, 300, 300]], ids=str)
    def test_routing_that_makes_no_sense_touches_nothing_else(ends):
        """It cannot be refused without waiting for the device. The interpreter reads and writes real memory."""
        w_q, w_scale, *_ = stack(3, 16, 32)
        around = torch.full((3, 12, 16), 7.0, dtype=torch.float16)
        empty = torch.empty
        x_q, x_scale = torch.zeros(12, 32, dtype=torch.int8), torch.ones(12)
        routing = {"out_dtype": torch.float16, "slots": torch.tensor([70000, -9, 1], dtype=torch.int32)}
        try:
            torch.empty = lambda *size, **how: around[1] if size == (12, 16) else empty(*size, **how)
            grouped_int8_matmul(x_q, x_scale, torch.tensor(ends, dtype=torch.int32), w_q, w_scale, None, **routing)
        finally:
            torch.empty = empty
        assert bool((around[[0, 2]] == 7).all())

    def test_a_row_that_is_not_finite_is_nan_and_no_other():
        tensors = stack(2, 16, 32)
        x = torch.randn(6, 32).half()
        good = grouped_int8_linear(x, ends_of([2, 3]), None, *tensors)
        x[1, 3], x[5, 2] = float("nan"), float("inf")  # the latter is nobody's
        out = grouped_int8_linear(x, ends_of([2, 3]), None, *tensors)
        assert out[1].isnan().all() and torch.equal(out[[0, 2, 3, 4, 5]], good[[0, 2, 3, 4, 5]])

    def test_no_rows():
        assert grouped_int8_linear(torch.zeros(0, 32).half(), ends_of([0, 0]), None, *stack(2, 16, 32)).shape == (0, 16)

    @pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
    def test_a_tile_is_found_for_any_number_of_rows(arch):
        for experts in (1, 8, 128):
            tiles = [grouped_int8_tile(m, experts, arch) for m in (1, 8, 64, 1000, 30_000)]
            assert all(why_not(tile, 64, 1536, 2048, arch) is None and tile.split_k == 1 for tile in tiles)
            assert [tile.block_m for tile in tiles] == sorted(tile.block_m for tile in tiles)

    def test_what_it_refuses(monkeypatch):
        w_q, w_scale, w_zero, input_scale, bias = stack(3, 16, 32, zeros=True, static=True, bias=True)
        x, ends, slots = torch.zeros(4, 32), ends_of([1, 2, 1]), torch.zeros(3, dtype=torch.int32)
        tensors = {"w_q": w_q, "w_scale": w_scale, "w_zero": w_zero, "input_scale": input_scale, "bias": bias}
        for wrong, message in (
            ({"ends": ends.long()}, r"ends must be \(E,\) int32 .* torch.int64"),
            ({"ends": ends[:0]}, r"ends must be \(E,\) int32"),
            ({"slots": slots[:2]}, r"slots must be \(E,\) int32"),
            ({"ends": ends[:2]}, "w_q must be contiguous and hold the 2 experts of ends"),
            ({"w_q": w_q[:, :, ::2]}, "w_q must be contiguous"),
            ({"w_scale": w_scale[:2]}, r"w_scale must be contiguous .* got \(2, 16\)"),
            ({"slots": slots, "bias": bias[:2]}, "bias must be contiguous and hold one weight per slot"),
            ({"w_zero": w_zero.int()}, "w_zero must be"),
            ({"input_scale": input_scale[:1]}, "input_scale must be contiguous and hold the 3 experts"),
            ({"x": torch.zeros(4, 31)}, "w_q must be"),
        ):
            with pytest.raises(ValueError, match=message):
                grouped_int8_linear(**{"x": x, "ends": ends, "slots": None, **tensors, **wrong})
        codes = (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4), ends, w_q, w_scale, None)
        for tile, message in (
            (Int8Tile(24, 16, 32), "block_m must be a power of two"),
            (Int8Tile(16, 16, 16 * 2, 2), "split_k must be between"),
            (Int8Tile(16, 16, 32, 1, 3), "num_warps must be"),
        ):
            with pytest.raises(ValueError, match=message):
                grouped_int8_matmul(*codes, out_dtype=torch.float32, tile=tile)
        long = (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4), ends, torch.zeros(3, 16, 64, dtype=torch.int8))
        with pytest.raises(ValueError, match="experts share the grid"):
            grouped_int8_matmul(*long, w_scale, None, out_dtype=torch.float32, tile=Int8Tile(16, 16, 32, 2))
        monkeypatch.setattr(grouped_int8, "device_arch", lambda device: 75)
        with pytest.raises(ValueError, match="needs sm_80 or newer, got sm_75"):
            grouped_int8_matmul(*codes, out_dtype=torch.float32)

    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    def test_the_operator_runs_the_kernel(static, monkeypatch):
        """lowbit/grouped_int8.py's way on CUDA, on CPU tensors: any strides and address of x, int64 ends."""
        w_q, w_scale, w_zero, input_scale, bias = stack(3, 34, 96, zeros=True, static=static, bias=True)
        x = torch.randn(6, 200).half()[1:, 3:99]
        scale = None if input_scale is None else input_scale.unsqueeze(1)
        monkeypatch.setattr(op, "_forward_cpu", None)  # the kernel or nothing
        packed = (w_q, w_scale.unsqueeze(2), w_zero.unsqueeze(2), scale, bias)
        out = op._forward_cuda(x, ends_of([2, 0, 3]).long(), None, *packed)
        expected = alone(x.contiguous(), [2, 0, 3], (w_q, w_scale, w_zero, input_scale, bias))
        assert torch.equal(out, expected)

"""The formula: dequantize is (code - zero) * scale, quantizing rounds to the nearest code, grids cover their groups."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import random_quantized
from lowbit.affine import QuantizedWeight, dequantize, minmax_grid, quantize_to_grid, round_scales
from lowbit.linear import QuantLinear
from lowbit.spec import BITS, QuantSpec

SPECS = [QuantSpec(bits, group, symmetric) for bits in BITS for group in (32, -1) for symmetric in (True, False)]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)


@by_spec
def test_dequantize_is_the_formula(spec):
    """Element by element, in Python's own arithmetic."""
    qw = random_quantized(3, 96, spec, torch.float64)
    dense, size = dequantize(qw, torch.float64), 96 if spec.group_size == -1 else 32
    for n in range(3):
        for k in range(96):
            zero = 2 ** (spec.bits - 1) if qw.zeros is None else int(qw.zeros[n, k // size])
            assert dense[n, k].item() == (int(qw.codes[n, k]) - zero) * qw.scales[n, k // size].item()


@by_spec
def test_a_weight_on_the_grid_comes_back_exactly(spec):
    """Every code of every zero: quantizing what dequantize gave returns the codes."""
    qw = random_quantized(16, 256 if spec.group_size == -1 else 128, spec, torch.bfloat16)
    back = quantize_to_grid(dequantize(qw), qw.scales, qw.zeros, spec)
    assert torch.equal(back.codes, qw.codes) and back.scales is qw.scales and back.zeros is qw.zeros


@by_spec
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1e-6, 1.0, 1e6]), shift=st.sampled_from([-3.0, 0.0, 5.0]))
def test_quantizing_takes_the_nearest_code(spec, seed, size, shift):
    generator = torch.Generator().manual_seed(seed)
    weight = size * (torch.randn(3, 64, dtype=torch.float64, generator=generator) + shift)
    scales, zeros = minmax_grid(weight, spec)
    qw = quantize_to_grid(weight, scales, zeros, spec)
    every = torch.arange(spec.max_code + 1, dtype=torch.uint8).expand(3, 64, -1)
    values = [
        dequantize(QuantizedWeight(every[..., c].contiguous(), scales, zeros, spec), torch.float64)
        for c in range(spec.max_code + 1)
    ]
    nearest = (torch.stack(values) - weight).abs().amin(0)
    error = (dequantize(qw, torch.float64) - weight).abs()
    assert torch.all(error <= nearest + 1e-12 * size)


@by_spec
def test_a_minmax_grid_covers_its_group(spec):
    weight = torch.randn(8, 64, dtype=torch.float64) + 0.5
    scales, zeros = minmax_grid(weight, spec)
    groups = 1 if spec.group_size == -1 else 2
    assert scales.shape == (8, groups) and (zeros is None) == spec.symmetric
    error = (dequantize(quantize_to_grid(weight, scales, zeros, spec), torch.float64) - weight).abs()
    # half a step, and another half where the zero had to be rounded or the symmetric grid lacks its topmost step
    assert torch.all(error.view(8, groups, -1) <= 1.0001 * scales.unsqueeze(-1))


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size == 32], ids=QuantSpec.label)
def test_minmax_agrees_with_compressed_tensors(spec):
    weight = torch.randn(8, 128) + torch.linspace(-2, 2, 8).unsqueeze(1)
    groups = weight.view(8, 4, 32)
    args = QuantizationArgs(num_bits=spec.bits, symmetric=spec.symmetric, strategy="group", group_size=32)
    theirs, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scales, zeros = minmax_grid(weight, spec)
    torch.testing.assert_close(scales, theirs, rtol=1e-6, atol=0)
    ours = torch.zeros_like(zero_points) if zeros is None else zeros.to(zero_points.dtype) - spec.mid_code
    assert torch.equal(ours, zero_points)


@by_spec
def test_constant_and_zero_groups(spec):
    for value in (0.0, 3.0, -3.0):
        weight = torch.full((2, 64), value, dtype=torch.float64)
        scales, zeros = minmax_grid(weight, spec)
        assert torch.all(scales > 0) and torch.all(scales.isfinite())
        dense = dequantize(quantize_to_grid(weight, scales, zeros, spec), torch.float64)
        assert torch.all((dense - weight).abs() <= 0.5001 * scales[0, 0] * (value != 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounded_scales_stay_positive_and_finite(dtype):
    exact = torch.tensor([[0.0, 1e-300, 1e-30, 0.1, 1.0, 1e30, 1e300]], dtype=torch.float64)
    rounded = round_scales(exact, dtype)
    assert rounded.dtype == dtype and torch.all(rounded > 0) and torch.all(rounded.isfinite())
    assert rounded[0, 4] == 1 and torch.equal(rounded[0, 3], torch.tensor(0.1, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("size", [2e-3, 1e-3, 5e-4])
def test_small_weights_lose_no_more_by_float16_scales_than_by_float32_ones(size):
    """8 bits of a row of 1e-3 need a step below float16's smallest normal number."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * size
    spec = QuantSpec(8, 128)
    errors = {}
    for dtype in (torch.float16, torch.float32):
        quantized = quantize_to_grid(weight, round_scales(minmax_grid(weight, spec)[0], dtype), None, spec)
        errors[dtype] = (dequantize(quantized) - weight).square().sum()
        linear, x = QuantLinear.from_quantized(quantized), torch.randn(4, 256)
        torch.testing.assert_close(linear.repack()(x), x @ dequantize(quantized).T)
    assert errors[torch.float16] <= 1.05 * errors[torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 64, dtype=torch.int8)}, r"codes must be \(N, K\) uint8"),
        ({"codes": torch.zeros(64, dtype=torch.uint8)}, r"codes must be \(N, K\) uint8, got \(64,\)"),
        ({"codes": torch.zeros(4, 65, dtype=torch.uint8)}, "group_size 32 does not divide K = 65"),
        ({"scales": torch.ones(4, 1)}, r"scales must be \(4, 2\) floating point, got \(4, 1\)"),
        ({"scales": torch.ones(4, 2, dtype=torch.int32)}, "floating point, got .*int32"),
        ({"zeros": None}, "zeros must be given"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, r"zeros must be \(4, 2\) uint8"),
        ({"zeros": torch.zeros(4, 2, dtype=torch.int8)}, "uint8, got .*int8"),
        ({"spec": QuantSpec(4, 32, True)}, "zeros must be None"),
    ],
)
def test_a_weight_that_contradicts_its_spec_is_refused(change, message):
    good = {
        "codes": torch.zeros(4, 64, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "zeros": torch.zeros(4, 2, dtype=torch.uint8),
        "spec": QuantSpec(4, 32, False),
    }
    QuantizedWeight(**good)
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**{**good, **change})

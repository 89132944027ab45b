"""lowbit::int8_linear and Int8Linear: exact integers, the kernel's own quantization, disk names, gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers import assert_close, random_quantized, tolerance
from lowbit import int8
from lowbit.affine import dequantize
from lowbit.int8 import int8_linear, int_matmul, largest_k, quantize_activations
from lowbit.linear import Int8Linear, QuantLinear, linear_class
from lowbit.spec import ActivationSpec, QuantSpec

DYNAMIC, STATIC = ActivationSpec(), ActivationSpec(dynamic=False)
SPECS = [QuantSpec(8, -1, symmetric, a) for symmetric in (True, False) for a in (DYNAMIC, STATIC)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
N, K = 40, 96

by_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def make(spec, dtype=torch.float32, n=N, k=K, bias=True):
    qw = random_quantized(n, k, spec, dtype)
    scale = None if spec.activations.dynamic else torch.tensor([0.03])
    return qw, Int8Linear.from_quantized(qw, torch.randn(n) if bias else None, input_scale=scale)


def exact(x_q, x_scale, qw, bias):
    """The result in float64 of integers that are what they are."""
    zero = 128 if qw.zeros is None else qw.zeros.long()
    total = x_q.long().cpu() @ (qw.codes.long() - zero).cpu().t()
    out = total.double() * x_scale.double().cpu()[:, None] * qw.scales.double().cpu().t()
    return out if bias is None else out + bias.double().cpu()


# --- integers


@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (1, 1, 1), (3, 7, 5), (17, 33, 9), (2, 4096, 16), (5, 2049, 131)], ids=str
)
@pytest.mark.parametrize("native", [True, False], ids=["torch", "fp32"])
def test_the_integer_product_is_exact(shape, native, monkeypatch):
    m, k, n = shape
    if native and not int8._int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this CPU")
    monkeypatch.setattr(int8, "_int_mm_is_exact", lambda: native)
    low, high = torch.full((m, k), -128, dtype=torch.int8), torch.randint(-128, 128, (m, k), dtype=torch.int8)
    for a, b in (
        (low, torch.full((n, k), -128, dtype=torch.int8)),
        (high, torch.randint(-128, 128, (n, k)).to(torch.int8)),
    ):
        out = int_matmul(a, b)
        assert out.dtype == torch.int32 and torch.equal(out.long(), a.long() @ b.long().t())


def test_a_cpu_that_saturates_is_found_out(monkeypatch):
    """What x86 without VNNI computes: pairs of products are added in 16 bits."""

    def saturating(a, bt):
        pairs = (a.long()[:, None, :] * bt.t().long()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).to(torch.int32)

    int8._int_mm_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    try:
        assert not int8._int_mm_is_exact()
    finally:
        int8._int_mm_is_exact.cache_clear()


@by_dtype
@pytest.mark.parametrize("static", [None, 0.02])
def test_the_kernels_reference_finds_the_same_integers(dtype, static):
    """tests/test_kernels_int8.py compares the kernel with that reference, bit for bit."""
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    from lowbit_kernels.int8_quantize import quantize_activations_reference

    x = (torch.randn(300, 257) * torch.logspace(-30, 4, 300)[:, None]).to(dtype)
    x[5], x[6, 3], x[7, 4], x[8, 5] = 0, float("nan"), float("inf"), -float("inf")
    scale = None if static is None else torch.tensor([static], dtype=dtype)
    expected = quantize_activations_reference(x, scale)
    for a, b in zip(quantize_activations(x, scale), expected[:2], strict=True):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def test_a_token_that_is_not_finite_is_nan_and_no_other():
    _, module = make(SPECS[0])
    x = torch.randn(4, K)
    good = module(x)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    out = module(x)
    assert out[1:3].isnan().all() and torch.equal(out[[0, 3]], good[[0, 3]])
    assert torch.equal(module(torch.zeros(2, K)), module.bias.expand(2, N))


# --- the op


@by_dtype
@by_spec
def test_the_op_is_the_integers_times_the_scales(spec, dtype, device):
    qw, module = make(spec, dtype)
    module.to(device).repack()
    for shape in ((0, K), (1, K), (2, 3, K), (33, K)):
        x = torch.randn(shape, device=device).to(dtype)
        out = module(x)
        assert out.dtype == dtype and out.shape == (*shape[:-1], N)
        codes, scales = quantize_activations(x.reshape(-1, K).cpu(), module.input_scale and module.input_scale.cpu())
        expected = exact(codes, scales, qw, module.bias)
        assert_close(out.reshape(-1, N), expected, **tolerance(dtype, roundings=1, k=4))


def test_any_strides_and_addresses(device):
    _, module = make(SPECS[1])
    module.to(device)
    x = torch.randn(6, 2 * K, device=device)
    expected = module(x[:, 1 : K + 1].contiguous())
    assert torch.equal(module(x[:, 1 : K + 1]), expected)
    assert torch.equal(module(x[:, 1 : K + 1].t().contiguous().t()), expected)
    assert_close(module(x[0, 1 : K + 1]), expected[0], rms=1e-6, peak=1e-5)


@by_spec
def test_opcheck(spec, device):
    """Schema, fake implementation, autograd registration, and tracing with static and dynamic shapes."""
    _, module = make(spec)
    module.to(device)
    tensors = (module.weight, module.weight_scale, module.weight_zero_point, module.input_scale, module.bias)
    for x in (torch.randn(3, K, device=device), torch.randn(2, 2, K, device=device, requires_grad=True)):
        torch.library.opcheck(torch.ops.lowbit.int8_linear.default, (x, *tensors))
    grad = torch.randn(3, N, device=device)
    torch.library.opcheck(torch.ops.lowbit.int8_linear_backward.default, (grad, *tensors[:3]))


@by_spec
def test_the_gradient_is_the_straight_through_one(spec, device):
    qw, module = make(spec)
    module.to(device)
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    grad = torch.randn(2, 3, N, device=device)
    module(x).backward(grad)
    assert_close(x.grad, grad.double().cpu() @ dequantize(qw, torch.float64), **tolerance(torch.float32, k=N))


# torch itself warns while importing its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=QuantSpec.label)
def test_compiles_without_a_graph_break(spec, device):
    torch.compiler.reset()
    model = nn.Sequential(make(spec)[1].to(device), nn.GELU()).eval()
    model[0].repack()
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (1, 5, 6):
        x = torch.randn(tokens, K, device=device)
        with torch.no_grad():
            assert_close(compiled(x), model(x), **tolerance(torch.float32, roundings=4))
    x = torch.randn(2, K, device=device, requires_grad=True)
    compiled(x).sum().backward()
    alone = x.detach().clone().requires_grad_()
    model(alone).sum().backward()
    assert_close(x.grad, alone.grad, **tolerance(torch.float32, roundings=4, k=N))


# --- the module


@by_spec
def test_tensors_are_named_and_shaped_as_in_int_quantized(spec):
    qw, module = make(spec, torch.bfloat16)
    expected = {
        "weight": ((N, K), torch.int8),
        "weight_scale": ((N, 1), torch.bfloat16),
        "weight_zero_point": ((N, 1), torch.int8),
        "input_scale": ((1,), torch.bfloat16),
        "bias": ((N,), torch.bfloat16),
    }
    if spec.symmetric:
        del expected["weight_zero_point"]
    if spec.activations.dynamic:
        del expected["input_scale"]
    state = module.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected
    assert torch.equal(state["weight"].long(), qw.codes.long() - 128)
    assert spec.symmetric or torch.equal(state["weight_zero_point"].long(), qw.zeros.long() - 128)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_the_tensors_as_the_same_weight(symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    _, module = make(QuantSpec(8, -1, symmetric, DYNAMIC))
    args = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="channel")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    theirs = compressor.decompress(dict(module.state_dict()), scheme)["weight"]
    assert torch.equal(theirs.float(), module.dequantize(torch.float32))


@by_spec
def test_quantized_weight_and_dequantize_give_back_what_went_in(spec):
    qw, module = make(spec)
    back = module.quantized_weight()
    assert back.spec == spec and torch.equal(back.codes, qw.codes) and torch.equal(back.scales, qw.scales)
    assert (back.zeros is None) == spec.symmetric and (spec.symmetric or torch.equal(back.zeros, qw.zeros))
    assert torch.equal(module.dequantize(torch.float64), dequantize(qw, torch.float64))


@by_spec
def test_moves_copies_and_loads(spec, device):
    _, module = make(spec, torch.bfloat16)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(3, K).to(torch.bfloat16)
    out = module.repack()(x)
    empty = Int8Linear(K, N, spec, bias=True, dtype=torch.bfloat16, device="meta")
    assert all(p.device.type == "meta" for p in empty.repack().parameters())
    empty.load_state_dict(expected, assign=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(device).to("cpu"), empty):
        assert torch.equal(other(x), out)
        for name, tensor in other.state_dict().items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    module.float()
    assert module.weight.dtype == torch.int8 and module.weight_scale.dtype == module.bias.dtype == torch.float32


def test_the_class_follows_the_spec():
    assert linear_class(SPECS[0]) is Int8Linear and linear_class(QuantSpec(8, -1, True)) is QuantLinear
    for cls, spec, message in (
        (Int8Linear, QuantSpec(8, -1, True), "needs a spec with activations"),
        (QuantLinear, SPECS[0], "leaves its activations alone"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(K, N, spec, bias=False, dtype=torch.float32)


def test_repr_says_what_it_is():
    _, module = make(SPECS[1], torch.bfloat16)
    assert repr(module) == "Int8Linear(in_features=96, out_features=40, bias=True, w8a8staticgchsym, bfloat16)"


# --- bad input

GOOD = {
    "x": torch.zeros(2, 32),
    "weight": torch.zeros(8, 32, dtype=torch.int8),
    "weight_scale": torch.ones(8, 1),
    "weight_zero": torch.zeros(8, 1, dtype=torch.int8),
    "input_scale": torch.ones(1),
    "bias": torch.zeros(8),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 33)}, r"x must be \(..., 32\) for weight \(8, 32\), got \(2, 33\)"),
        ({"x": torch.zeros(2, 32, dtype=torch.float64)}, "x must be .* got .*float64"),
        ({"x": torch.tensor(1.0)}, r"x must be \(..., K\)"),
        ({"weight": torch.zeros(8, 32, dtype=torch.uint8)}, r"weight must be \(N, K\) int8"),
        ({"weight": torch.zeros(8, 32, dtype=torch.int8, device="meta")}, "weight is on meta, but x is on cpu"),
        ({"weight_scale": torch.ones(8)}, r"weight_scale must be \(8, 1\)"),
        ({"weight_zero": torch.zeros(8, 1)}, "weight_zero must be .*int8.* got .*float32"),
        ({"input_scale": torch.ones(8, 1)}, r"input_scale must be \(1,\)"),
        ({"bias": torch.zeros(9)}, r"bias must be \(8,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    assert int8_linear(**GOOD).shape == (2, 8)
    with pytest.raises(ValueError, match=message):
        int8_linear(**{**GOOD, **change})


def test_a_row_too_long_for_int32_is_refused():
    k = largest_k(False) + 1
    assert k == 131072
    with pytest.raises(ValueError, match="K from 1 to 131071"):
        int8_linear(torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"at most 65793 .*got 65794"):
        Int8Linear(65794, 1, SPECS[2], bias=False, dtype=torch.float32)


def test_bad_constructions_are_named():
    qw = random_quantized(8, 32, SPECS[1])
    for scale, message in (
        (None, "input_scale must be given for static"),
        (torch.tensor([0.0]), "one finite positive number"),
        (torch.ones(2), "one finite positive number"),
        (torch.tensor(float("nan")), "one finite positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            Int8Linear.from_quantized(qw, input_scale=scale)
    with pytest.raises(ValueError, match="input_scale must be given for static activations only"):
        Int8Linear.from_quantized(random_quantized(8, 32, SPECS[0]), input_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"bias must be \(8,\), got \(9,\)"):
        Int8Linear.from_quantized(random_quantized(8, 32, SPECS[0]), torch.zeros(9))
    with pytest.raises(ValueError, match="dtype must be"):
        Int8Linear(32, 8, SPECS[0], bias=False, dtype=torch.float64)

"""float32 linears through oneDNN are F.linear, wherever they are taken there, and the rest is F.linear itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import blockwise, onednn
from lowbit.cpu_forward import CpuForward

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


def _linear(rows, k, n, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, k), (n, k), (n,))
    x, weight, shift = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, weight, shift if bias else None


@pytest.fixture
def everywhere(monkeypatch):
    """As on a machine where oneDNN was found faster, whatever this one is and however little there is to do."""
    monkeypatch.setattr(onednn, "_here", lambda: True)
    monkeypatch.setattr(onednn, "_FEWEST_PRODUCTS", 1)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 140), st.booleans(), st.integers(0, 9))
def test_the_result_is_the_linears(rows, k, n, bias, seed):
    """A float32 sum of K products and the bias in any order: K + 1 roundings of the sum of their sizes."""
    x, weight, shift = _linear(rows, k, n, bias=bias, seed=seed)
    assert onednn.is_faster(x, weight, shift)
    out = onednn.linear(x.view(1, rows, k), weight, shift)
    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    exact, size = F.linear(*wide), F.linear(*[None if t is None else t.abs() for t in wide])
    assert out.shape == (1, rows, n) and out.dtype == torch.float32
    assert bool(((out[0].double() - exact).abs() <= (k + 1) * torch.finfo(torch.float32).eps * size).all())


@needs_onednn
def test_large_linears_go_there_on_the_machines_that_were_measured(monkeypatch):
    monkeypatch.setattr(onednn, "_here", lambda: True)
    x, weight, _ = _linear(32, 512, 512)
    assert onednn.is_faster(x, weight) and not onednn.is_faster(x[:31], weight)
    monkeypatch.setattr(onednn, "_here", lambda: False)
    assert not onednn.is_faster(x, weight)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "cpu_name": "AMD EPYC 9004"}, True),
        ({"architecture": "x86_64", "avx512_f": True, "cpu_name": "Intel(R) Xeon(R) 6"}, False),
        ({"architecture": "x86_64", "avx512_f": False, "cpu_name": "AMD EPYC 7003"}, False),
        ({"architecture": "arm64", "cpu_name": "Neoverse V1"}, False),
        ({}, False),
    ],
)
@needs_onednn
def test_which_machines_those_are(monkeypatch, cpu, expected):
    monkeypatch.setattr(onednn, "_cpu", lambda: cpu)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn._here.__wrapped__() is expected


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("what", ["bfloat16", "a transposed input", "a transposed weight", "gradients", "switched off"])
def test_what_is_left_to_torch(monkeypatch, what):
    x, weight, bias = _linear(8, 16, 16)
    if what == "bfloat16":
        x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    elif what == "a transposed input":
        x = torch.randn(16, 8).t()
    elif what == "a transposed weight":
        weight = weight.t()
    elif what == "gradients":
        weight.requires_grad_()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", what != "switched off")
    assert not onednn.is_faster(x, weight, bias)
    out = onednn.linear(x, weight, bias)
    assert torch.equal(out, F.linear(x, weight, bias)) and out.requires_grad == (what == "gradients")
    if what == "gradients":
        with torch.no_grad():
            assert onednn.is_faster(x, weight, bias)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_a_models_own_linears_go_there_while_blocks_are_run(monkeypatch):
    seen = []
    real = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args, **kwargs: seen.append(len(args)) or real(*args, **kwargs))
    x, weight, bias = _linear(8, 16, 16)
    expected, module = F.linear(x, weight, bias), torch.nn.Linear(16, 16)
    with torch.no_grad(), CpuForward():
        for out in (F.linear(x, weight, bias), F.linear(input=x, weight=weight, bias=bias)):
            torch.testing.assert_close(out, expected)
        module(x)
    assert seen == [3, 0, 3]


@pytest.mark.usefixtures("everywhere")
def test_tensors_of_other_types_are_left_to_torch():
    """A subclass answers for the functions of torch that it knows, which a nameless operator is not among."""

    class Known(torch.Tensor):
        pass

    x, weight, bias = _linear(8, 16, 16)
    for wrapped in range(3):
        args = [t.as_subclass(Known) if i == wrapped else t for i, t in enumerate((x, weight, bias))]
        assert not onednn.is_faster(*args)
        assert isinstance(onednn.linear(*args), Known)


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("batches", [1, 31, 32, 1000])
def test_what_inputs_of_a_hessian_are_multiplied_in(monkeypatch, here, batches):
    """bfloat16 where a CPU is faster at it, and only so many batches that its rounding averages out."""
    monkeypatch.setattr(blockwise, "has_fast_bfloat16_products", lambda: here)
    expected = torch.bfloat16 if here and batches >= 32 else torch.float32
    assert blockwise.product_dtype(batches, torch.device("cpu")) == expected
    assert blockwise.product_dtype(batches, torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(
    ("other", "expected"), [((True, 16), torch.bfloat16), ((True, 15), torch.float32), ((False, 16), torch.float32)]
)
def test_all_ranks_multiply_alike_and_count_their_batches_together(monkeypatch, other, expected):
    class Two:
        def collect(self, value):
            return [value, other]

    monkeypatch.setattr(blockwise, "has_fast_bfloat16_products", lambda: True)
    assert blockwise.product_dtype(16, torch.device("cpu"), Two()) == expected


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD Genoa"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_f": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_which_cpus_are_faster_at_bfloat16(monkeypatch, cpu, expected):
    monkeypatch.setattr(onednn, "_cpu", lambda: cpu)
    assert onednn.has_fast_bfloat16_products.__wrapped__() is expected


# --- bfloat16 where float32 is faster


@pytest.fixture
def no_bfloat16(monkeypatch):
    """As on a CPU without instructions for bfloat16, whatever this one has."""
    monkeypatch.setattr(onednn, "_cpu", lambda: {"architecture": "x86_64"})
    monkeypatch.setattr(onednn, "has_fast_bfloat16_products", lambda: False)


@pytest.mark.usefixtures("no_bfloat16")
@settings(max_examples=40)
@given(st.integers(128, 1100), st.integers(1, 300), st.integers(1, 140), st.booleans(), st.integers(0, 9))
def test_a_bfloat16_result_is_the_exact_one_rounded_once(rows, k, n, bias, seed):
    """K + 1 roundings of float32 on the way to the one of bfloat16."""
    x, weight, shift = (None if t is None else t.bfloat16() for t in _linear(rows, k, n, bias=bias, seed=seed))
    assert onednn.is_faster_in_float32(x, weight, shift)
    out = onednn.linear(x.view(1, rows, k), weight, shift)
    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    exact, size = F.linear(*wide), F.linear(*[None if t is None else t.abs() for t in wide])
    summed = (k + 1) * torch.finfo(torch.float32).eps * size
    assert out.shape == (1, rows, n) and out.dtype == torch.bfloat16
    assert bool(((out[0].double() - exact).abs() <= summed + 2**-8 * (exact.abs() + summed)).all())


@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize(
    "what", ["few rows", "no tokens", "no columns", "float32", "gradients", "fast bfloat16", "arm"]
)
def test_which_bfloat16_linears_stay_where_they_are(monkeypatch, what):
    x, weight, bias = (t.bfloat16() for t in _linear(128, 16, 16))
    assert onednn.is_faster_in_float32(x, weight, bias)
    if what == "few rows":
        x = x[:127]
    elif what == "no tokens":
        x = x[:0]
    elif what == "no columns":
        x, weight = x[:, :0], weight[:, :0]
    elif what == "float32":
        x, weight, bias = (t.float() for t in (x, weight, bias))
    elif what == "gradients":
        weight.requires_grad_()
    elif what == "fast bfloat16":
        monkeypatch.setattr(onednn, "has_fast_bfloat16_products", lambda: True)
    else:
        monkeypatch.setattr(onednn, "_cpu", lambda: {"architecture": "arm64"})
    assert not onednn.is_faster_in_float32(x, weight, bias)
    assert torch.equal(onednn.linear(x, weight, bias), F.linear(x, weight, bias))

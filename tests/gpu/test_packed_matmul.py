"""QuantLinear on a real GPU: bf16 as well, every layout, graphs, and what only a GPU can show."""

import pytest
import torch

from helpers import MATMUL_CASES, Case, assert_close, random_quantized, tolerance
from lowbit.affine import dequantize
from lowbit.linear import QuantLinear
from lowbit.ops import set_batch_invariant
from lowbit.spec import QuantSpec

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU here (torch.cuda.is_available() is False)"
)

MODEL_CASES = [
    Case(m, n, k, bits, group, symmetric, bias=m == 16)
    for m in (1, 16, 17, 64, 257, 2048)
    for n, k, bits, group, symmetric in (
        (4096, 4096, 4, 128, True),
        (1024, 4096, 4, 128, False),
        (4096, 11008, 8, 128, True),
        (4096, 4096, 8, -1, False),
        (2048, 2048, 2, 64, False),
    )
]


def module_and_input(case, dtype):
    """A repacked layer on the GPU, its unpacked weight, and activations."""
    qw = random_quantized(case.n, case.k, case.spec, dtype, "cuda")
    bias = torch.randn(case.n).to("cuda", dtype) if case.bias else None
    module = QuantLinear.from_quantized(qw, bias, dtype=dtype).repack()
    return module, qw, torch.randn(case.m, case.k).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", MATMUL_CASES + MODEL_CASES, ids=str)
def test_matches_float64(case, dtype):
    module, qw, x = module_and_input(case, dtype)
    expected = x.double() @ dequantize(qw, torch.float64).t()
    if case.bias:
        expected += module.bias.double()
    actual = module(x)
    assert actual.dtype == dtype
    # many tokens may take the scaled or the dequant family, which round the weights too; and the largest of millions of
    # results may lie past 5 rms, hence the factor
    close = tolerance(dtype, roundings=2 if case.m > 16 else 1, k=case.k)
    assert_close(actual, expected, rms=close["rms"], peak=2 * close["peak"])


@pytest.mark.parametrize("case", [Case(1, 4096, 4096), Case(100, 1000, 4096, symmetric=False)], ids=str)
def test_the_same_input_gives_the_same_bits(case):
    module, _, x = module_and_input(case, torch.bfloat16)
    first = module(x)
    for _ in range(20):
        assert torch.equal(module(x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_rows_can_be_made_independent_of_the_batch(dtype):
    module, _, x = module_and_input(Case(300, 4096, 4096, symmetric=False), dtype)
    set_batch_invariant(True)
    try:
        whole = module(x)
        for m in (1, 16, 17, 64, 129):
            assert torch.equal(module(x[:m]), whole[:m])
    finally:
        set_batch_invariant(False)


def test_it_can_be_captured_in_a_cuda_graph():
    module, _, x = module_and_input(Case(4, 256, 512, symmetric=False), torch.float16)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_a_module_gives_on_the_gpu_what_it_gives_on_the_cpu():
    module = QuantLinear.from_quantized(random_quantized(256, 512, QuantSpec(4, 128, False), torch.bfloat16))
    x = torch.randn(5, 512).to(torch.bfloat16)
    expected = module.repack()(x)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.cuda()
    assert_close(module(x.cuda()), expected, **tolerance(torch.bfloat16, roundings=3))
    for name, tensor in module.state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), state[name])

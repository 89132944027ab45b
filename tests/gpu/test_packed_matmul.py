"""The Triton kernel on a real GPU: the interpreter's cases, bf16 as well, and what only a GPU can show."""

import pytest
import torch

from helpers import MATMUL_CASES, Case, assert_close, random_quantized, tolerance
from lowbit.affine import dequantize
from lowbit.linear import QuantLinear
from lowbit.ops import packed_linear
from lowbit.packing import pack_codes
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


def tensors(case, dtype):
    qw = random_quantized(case.n, case.k, case.spec, dtype, "cuda")
    zeros = None if qw.zeros is None else pack_codes(qw.zeros, case.bits, dim=0)
    bias = torch.randn(case.n).to("cuda", dtype) if case.bias else None
    x = torch.randn(case.m, case.k).to("cuda", dtype)
    return qw, (x, pack_codes(qw.codes, case.bits), qw.scales, zeros, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", MATMUL_CASES + MODEL_CASES, ids=str)
def test_matches_float64(case, dtype):
    qw, args = tensors(case, dtype)
    expected = args[0].double() @ dequantize(qw, torch.float64).t()
    if case.bias:
        expected += args[4].double()
    actual = packed_linear(*args, bits=case.bits, group_size=case.group_size)
    assert actual.dtype == dtype
    # the largest of millions of results may lie past 5 rms, hence the factor
    close = tolerance(dtype, k=case.k)
    assert_close(actual, expected, rms=close["rms"], peak=2 * close["peak"])


@pytest.mark.parametrize("case", [Case(1, 4096, 4096), Case(100, 1000, 4096, symmetric=False)], ids=str)
def test_the_same_input_gives_the_same_bits(case):
    _, args = tensors(case, torch.bfloat16)
    first = packed_linear(*args, bits=case.bits, group_size=case.group_size)
    for _ in range(20):
        assert torch.equal(packed_linear(*args, bits=case.bits, group_size=case.group_size), first)


def test_offsets_past_two_to_the_31():
    """Rows of x and of the result whose offset needs 64 bits."""
    m, n, k = 70_001, 32_768, 64
    if torch.cuda.mem_get_info()[0] < 3 * m * n * 2:
        pytest.skip(f"needs {3 * m * n * 2 / 2**30:.0f} GiB of free GPU memory")
    _, (_, words, scales, zeros, _) = tensors(Case(1, n, k, 4, 64, False), torch.float16)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    out = packed_linear(x, words, scales, zeros, None, bits=4, group_size=64)
    last = packed_linear(x[-7:], words, scales, zeros, None, bits=4, group_size=64)
    assert_close(out[-7:], last, **tolerance(torch.float16))


def test_it_can_be_captured_in_a_cuda_graph():
    _, args = tensors(Case(4, 256, 512, symmetric=False), torch.float16)
    expected = packed_linear(*args, bits=4, group_size=128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_linear(*args, bits=4, group_size=128)
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

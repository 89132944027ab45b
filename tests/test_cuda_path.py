"""What lowbit does on CUDA around the kernels, run by Triton's interpreter on CPU tensors: layouts, strides, addresses.

Triton decides at import whether to interpret, so these tests run in a process of their own.
"""

import pytest
import torch

from helpers import MATMUL_CASES, Case, assert_close, random_quantized, tolerance
from interpreted import BOUNDS_FROM_ARRAYS, INTERPRETING, assert_passes_interpreted
from lowbit import int8, linear, ops
from lowbit.affine import dequantize
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.ops import CUDA_TILES
from lowbit.spec import ActivationSpec, QuantSpec

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

pytestmark = BOUNDS_FROM_ARRAYS

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:

    def packed(case, monkeypatch):
        monkeypatch.setattr(linear, "best_layout", lambda n, k, **_: CUDA_TILES)
        qw = random_quantized(case.n, case.k, case.spec, torch.float16)
        bias = torch.randn(case.n) if case.bias else None
        return qw, QuantLinear.from_quantized(qw, bias).repack()

    def on_cuda(module, x):
        spec = module.spec
        return ops._forward_cuda(
            x, module.weight_packed, module.weight_scale, module.weight_zero_point, module.bias, spec.bits,
            spec.group_size, module._layout,
        )  # fmt: skip

    def test_rows_can_be_made_independent_of_the_batch(monkeypatch):
        _, module = packed(Case(33, 48, 512), monkeypatch)
        x = torch.randn(33, module.in_features).half()
        ops.set_batch_invariant(True)
        try:
            whole = on_cuda(module, x)
            assert all(torch.equal(on_cuda(module, x[:m]), whole[:m]) for m in (1, 5, 16, 17))
        finally:
            ops.set_batch_invariant(False)

    # prefill's cuBLAS family compiles for a GPU only where the dispatcher takes it, which needs more tokens
    @pytest.mark.parametrize("case", [c for c in MATMUL_CASES if c.m <= 33], ids=str)
    def test_a_repacked_module_runs_the_kernels(case, monkeypatch):
        qw, module = packed(case, monkeypatch)
        x = torch.randn(case.m, case.k).half()
        expected = x.double() @ dequantize(qw, torch.float64).t()
        expected = expected if module.bias is None else expected + module.bias.double()
        with monkeypatch.context() as only:
            only.setattr(ops, "unpacked_linear", None)  # the kernels or nothing
            out = on_cuda(module, x)
        assert out.dtype == torch.float16
        assert_close(out, expected, **tolerance(torch.float16, k=case.k))
        wide = on_cuda(module, x.float())
        assert wide.dtype == torch.float32
        assert_close(wide, expected, rms=1e-5, peak=1e-4)

    def test_any_leading_shape_stride_and_address(monkeypatch):
        case = next(c for c in MATMUL_CASES if c.k == 13)
        _, module = packed(case, monkeypatch)
        x = torch.randn(2, 3, case.k).half()
        flat = on_cuda(module, x.reshape(6, case.k))
        assert torch.equal(on_cuda(module, x), flat.view(2, 3, case.n))
        assert torch.equal(on_cuda(module, x[1, 2]), flat[5])
        later = x.reshape(6, case.k)[1:]
        assert later.data_ptr() % 16 and torch.equal(on_cuda(module, later), flat[1:])
        turned = x.reshape(6, case.k).t().contiguous().t()
        assert torch.equal(on_cuda(module, turned), flat)
        assert on_cuda(module, x[:0]).shape == (0, 3, case.n)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_int8_has_the_cpus_bits(symmetric, dynamic):
        """The same integers, and the same fp32 operations on them in the same order."""
        spec = QuantSpec(8, -1, symmetric, ActivationSpec(dynamic=dynamic))
        for m, n, k in ((0, 5, 9), (1, 33, 64), (7, 40, 130), (20, 17, 13)):
            qw = random_quantized(n, k, spec, torch.float16)
            scale = None if dynamic else torch.tensor([0.02])
            module = Int8Linear.from_quantized(qw, torch.randn(n), input_scale=scale).repack()
            tensors = (module.weight, module.weight_scale, module.weight_zero_point, module.input_scale, module.bias)
            for x in (torch.randn(m, k).half(), torch.randn(m, k), torch.randn(k, m).half().t()):
                out = int8._forward_cuda(x, *tensors)
                assert out.dtype == x.dtype and torch.equal(out, module(x)), (m, n, k)

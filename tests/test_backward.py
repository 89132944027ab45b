"""Gradients through lowbit::packed_linear: x and bias get theirs, the packed weight is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import random_quantized
from lowbit.affine import dequantize
from lowbit.cpu import CPU_INT4, CPU_INT8, DISK, best_layout
from lowbit.linear import QuantLinear
from lowbit.ops import CUDA_TILES, from_disk, packed_linear, to_disk
from lowbit.packing import pack_codes
from lowbit.spec import PACKED_BITS, QuantSpec

SPECS = [QuantSpec(bits, group, symmetric) for bits in PACKED_BITS for group in (32, -1) for symmetric in (True, False)]


def tensors_of(
    spec: QuantSpec, n: int, k: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    qw = random_quantized(n, k, spec)
    zeros = None if qw.zeros is None else pack_codes(qw.zeros, spec.bits, dim=0)
    return from_disk(pack_codes(qw.codes, spec.bits), qw.scales.to(dtype), zeros, bits=spec.bits, k=k, layout=layout)


def exact_weight(tensors: tuple[Tensor, Tensor, Tensor | None], spec: QuantSpec, k: int, layout: str) -> Tensor:
    """(N, K) float64."""
    module = QuantLinear(k, 1, spec, bias=False, dtype=torch.float32)  # only its unpacking is used
    module._layout, module.out_features = layout, tensors[1].shape[1 if layout == CUDA_TILES else 0]
    module._set_tensors(*tensors)
    return dequantize(module.quantized_weight(), torch.float64)


def check_gradient(spec: QuantSpec, n: int, k: int, dtype: torch.dtype, layout: str, m: int = 7) -> None:
    tensors = tensors_of(spec, n, k, dtype, layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, m, k, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, m, n, generator=generator).to(dtype)
    out = packed_linear(x, *tensors, None, bits=spec.bits, group_size=spec.group_size, layout=layout)
    out.backward(grad)
    w = exact_weight(tensors, spec, k, layout)
    expected, magnitude = grad.double() @ w, grad.double().abs() @ w.abs()
    # bf16: W is rounded to it (2**-9 of each term) and the result once; sums are fp32, n terms in any order.
    unit = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    bound = magnitude * (unit + n * 2**-23) + expected.abs() * unit + 1e-6
    assert x.grad is not None and x.grad.dtype == dtype
    assert bool(((x.grad.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_the_gradient_of_x_is_grad_times_the_exact_weight(spec: QuantSpec, dtype: torch.dtype) -> None:
    for layout in (DISK, CUDA_TILES):
        check_gradient(spec, 33, 96, dtype, layout)
    if spec.group_size == -1:
        check_gradient(spec, 17, 77, dtype, DISK)  # padding words along K and N


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(4, 64, False), QuantSpec(8, 64, True)], ids=str)
def test_layouts_of_the_cpu(spec: QuantSpec) -> None:
    layout = best_layout(
        128, 256, bits=spec.bits, symmetric=spec.symmetric, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    if layout == DISK:
        pytest.skip("this CPU has no layout of its own")
    assert layout in (CPU_INT4, CPU_INT8)
    check_gradient(spec, 128, 256, torch.bfloat16, layout)


def test_more_columns_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.cpu._CHUNK", 1)
    for spec in (QuantSpec(4, 128, False), QuantSpec(2, 32, True), QuantSpec(8, -1, True)):
        check_gradient(spec, 9, 384 + (0 if spec.group_size != -1 else 5), torch.float32, DISK)


def test_no_tokens() -> None:
    tensors = tensors_of(QuantSpec(4, 32), 8, 64, torch.float32, DISK)
    x = torch.zeros(0, 64, requires_grad=True)
    packed_linear(x, *tensors, None, bits=4, group_size=32).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 64)


def test_a_bias_may_be_trained() -> None:
    tensors, bias = tensors_of(QuantSpec(4, 32), 8, 64, torch.float32, DISK), torch.zeros(8, requires_grad=True)
    grad = torch.randn(3, 5, 8)
    packed_linear(torch.randn(3, 5, 64), *tensors, bias, bits=4, group_size=32).backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_scales_are_frozen() -> None:
    weight, scales, zeros = tensors_of(QuantSpec(4, 32), 8, 64, torch.float32, DISK)
    out = packed_linear(torch.randn(3, 64), weight, scales.requires_grad_(), zeros, None, bits=4, group_size=32)
    with pytest.raises(RuntimeError, match="no gradient for scales"):
        out.sum().backward()


def test_double_backward_is_refused() -> None:
    tensors = tensors_of(QuantSpec(4, 32), 8, 64, torch.float32, DISK)
    x = torch.randn(3, 64, requires_grad=True)
    out = packed_linear(x, *tensors, None, bits=4, group_size=32)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        first.sum().backward()


def test_no_dense_copy_of_the_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, sizes = 256, 8192, []
    tensors = tensors_of(QuantSpec(4, 128), n, k, torch.float32, DISK)
    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: sizes.append(self.numel()) or original(self))
    monkeypatch.setattr("lowbit.cpu._CHUNK", n * 1024)
    x = torch.randn(3, k, requires_grad=True)
    packed_linear(x, *tensors, None, bits=4, group_size=128).sum().backward()
    assert 0 < max(sizes) <= n * 1024


def test_opcheck() -> None:
    for spec, layout in ((QuantSpec(4, 32, False), DISK), (QuantSpec(8, -1, True), CUDA_TILES)):
        tensors = tensors_of(spec, 16, 64, torch.float32, layout)
        args = (torch.randn(3, 16), *tensors, spec.bits, spec.group_size, layout, 64)
        torch.library.opcheck(torch.ops.lowbit.packed_linear_backward.default, args)
        x, bias = torch.randn(3, 64, requires_grad=True), torch.zeros(16, requires_grad=True)
        # The step that compares gradients compiles the backward pass too.
        args = (x, *tensors, bias, spec.bits, spec.group_size, layout)
        torch.library.opcheck(torch.ops.lowbit.packed_linear.default, args)


# torch itself warns while importing its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_gradients_are_the_eager_ones() -> None:
    torch.compiler.reset()
    qw = random_quantized(48, 64, QuantSpec(4, 32, False))
    module = nn.Sequential(nn.Linear(64, 64), QuantLinear.from_quantized(qw, dtype=torch.float32), nn.GELU())
    compiled, found = torch.compile(module, fullgraph=True), []
    x = torch.randn(5, 64)
    for run in (module, compiled):
        module.zero_grad()
        run(x).square().sum().backward()
        found.append(module[0].weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


def test_to_disk_is_what_the_gradient_reads() -> None:
    """The backward pass sees the weight that the forward pass multiplied with, whatever its layout."""
    for layout in (DISK, CUDA_TILES):
        spec = QuantSpec(4, 32, False)
        tensors = tensors_of(spec, 24, 64, torch.float32, layout)
        x = torch.eye(64).requires_grad_()
        out = packed_linear(x, *tensors, None, bits=4, group_size=32, layout=layout)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        torch.testing.assert_close(grad[0], out.sum(1).detach())
        assert to_disk(*tensors, bits=4, k=64, layout=layout)[0].shape == (24, 8)

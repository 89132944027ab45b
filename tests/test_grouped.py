"""lowbit::grouped_packed_linear: against float64 and against expert by expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import assert_close, tolerance
from lowbit import QuantSpec, set_batch_invariant
from lowbit.affine import dequantize
from lowbit.cpu import DISK, best_layout
from lowbit.grouped import grouped_packed_linear
from lowbit.ops import CUDA_TILES, packed_linear
from lowbit.spec import PACKED_BITS
from merged_experts import COUNTS, ends_of, float64, stack

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SPECS = [QuantSpec(bits, group, symmetric) for bits in PACKED_BITS for group in (32, -1) for symmetric in (True, False)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_matches_float64_and_has_the_bits_of_expert_by_expert(spec: QuantSpec, dtype: torch.dtype) -> None:
    """In the layout of the disk and in the one that this CPU multiplies fastest with; rows 46 .. 49 are nobody's."""
    n, k = 64, 96
    fastest = best_layout(
        n, k, bits=spec.bits, symmetric=spec.symmetric, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    for layout in dict.fromkeys((DISK, fastest, CUDA_TILES)):
        weights, packed = stack(spec, len(COUNTS), n, k, dtype, layout)
        x, bias = torch.randn(sum(COUNTS) + 4, k).to(dtype), torch.randn(len(COUNTS), n).to(dtype)
        how = {"bits": spec.bits, "group_size": spec.group_size, "layout": layout}
        out = grouped_packed_linear(x, ends_of(COUNTS), *packed, bias, **how)
        assert out.dtype == dtype and not bool(out[sum(COUNTS) :].any())
        roundings = 3 if dtype == torch.bfloat16 else 1  # weights and bias are rounded to bf16 too
        assert_close(out, float64(x, COUNTS, weights, bias), **tolerance(dtype, roundings, k))
        begin = 0
        for e, rows in enumerate(COUNTS):
            one = [None if t is None else t[e] for t in packed]
            alone = packed_linear(x[begin : begin + rows], *one, bias[e], **how)
            assert torch.equal(out[begin : begin + rows], alone)
            begin += rows


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows: int, dtype: torch.dtype) -> None:
    weights, packed = stack(QuantSpec(8, -1), 3, 5, 7, torch.float32)
    counts = [0, rows, 0]
    x = torch.randn(rows, 7)
    out = grouped_packed_linear(x, ends_of(counts, dtype), *packed, None, bits=8, group_size=-1)
    assert out.shape == (rows, 5)
    assert_close(out, float64(x, counts, weights, None), **tolerance(torch.float32, k=7))


@pytest.mark.parametrize("layout", [DISK, CUDA_TILES])
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric: bool, layout: str) -> None:
    spec = QuantSpec(4, 32, symmetric)
    _, packed = stack(spec, 3, 16, 64, torch.float32, layout)
    x, bias = torch.randn(6, 64, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(
        torch.ops.lowbit.grouped_packed_linear.default, (x, ends_of([1, 0, 4]), None, *packed, bias, 4, 32, layout)
    )
    torch.library.opcheck(
        torch.ops.lowbit.grouped_packed_linear_backward.default,
        (torch.randn(6, 16), ends_of([1, 0, 4]), None, *packed, 4, 32, layout, 64),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32, False), QuantSpec(8, -1), QuantSpec(2, 64)], ids=QuantSpec.label)
def test_gradients_of_x_and_bias(spec: QuantSpec, dtype: torch.dtype) -> None:
    n, k = 33, 128
    for layout in (DISK, CUDA_TILES):
        weights, packed = stack(spec, len(COUNTS), n, k, dtype, layout)
        x = torch.randn(sum(COUNTS) + 2, k).to(dtype).requires_grad_()
        bias = torch.randn(len(COUNTS), n).to(dtype).requires_grad_()
        grad = torch.randn(len(x), n).to(dtype)
        grouped_packed_linear(
            x, ends_of(COUNTS), *packed, bias, bits=spec.bits, group_size=spec.group_size, layout=layout
        ).backward(grad)
        assert x.grad is not None and bias.grad is not None and x.grad.dtype == dtype
        expected, sums, begin = torch.zeros(len(x), k).double(), torch.zeros(len(COUNTS), n).double(), 0
        for e, rows in enumerate(COUNTS):
            mine = slice(begin, begin + rows)
            expected[mine] = grad[mine].double() @ dequantize(weights[e], torch.float64)
            sums[e] = grad[mine].double().sum(0)
            begin += rows
        assert not bool(x.grad[sum(COUNTS) :].any())
        assert_close(x.grad, expected, **tolerance(dtype, 2 if dtype == torch.bfloat16 else 1, n))
        assert_close(bias.grad, sums, **tolerance(dtype, 1, max(COUNTS)))


@pytest.mark.parametrize("layout", [DISK, CUDA_TILES])
def test_experts_of_two_kinds_are_two_calls_that_add_up(layout: str) -> None:
    """Rows of experts without a weight in a stack are zeros there, and no gradient passes them."""
    kinds = {QuantSpec(4, 32, False): [1, 3], QuantSpec(8, -1): [0, 4, 5]}  # expert 2 is of neither
    counts, total, grad = [3, 0, 4, 2, 30, 1], None, None
    x, bias = torch.randn(sum(counts) + 2, 64, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    expected = torch.zeros(len(x), 16).double()
    for spec, members in kinds.items():
        weights, packed = stack(spec, len(members), 16, 64, torch.float32, layout)
        slots = torch.tensor([members.index(e) if e in members else -1 for e in range(6)], dtype=torch.int32)
        how = {"bits": spec.bits, "group_size": spec.group_size, "layout": layout, "slots": slots}
        out = grouped_packed_linear(x, ends_of(counts), *packed, bias[members], **how)
        total, begin, dense = out if total is None else total + out, 0, torch.zeros(len(x), 64).double()
        for e, rows in enumerate(counts):
            mine = slice(begin, begin + rows)
            if e in members:
                one = [None if t is None else t[members.index(e)] for t in packed]
                del how["slots"]
                assert torch.equal(out[mine], packed_linear(x[mine], *one, bias[e], **how))
                how["slots"] = slots
                weight = dequantize(weights[members.index(e)], torch.float64)
                expected[mine] = x[mine].double() @ weight.t() + bias[e].double()
                dense[mine] = weight.sum(0)
            else:
                assert not bool(out[mine].any())
            begin += rows
        grad = dense if grad is None else grad + dense
    assert_close(total, expected.detach(), **tolerance(torch.float32, k=64))
    total.sum().backward()
    assert_close(x.grad, grad, **tolerance(torch.float32, k=16))
    rows_of = torch.tensor([rows if e != 2 else 0 for e, rows in enumerate(counts)])
    assert torch.equal(bias.grad, rows_of.float()[:, None].expand(6, 16))


def test_what_is_frozen_and_what_is_not_there() -> None:
    _, (weight, scales, _) = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    how = {"bits": 4, "group_size": 32}
    out = grouped_packed_linear(x, ends_of([1, 2]), weight, scales.clone().requires_grad_(), None, None, **how)
    with pytest.raises(RuntimeError, match="no gradient for scales"):
        out.sum().backward()
    out = grouped_packed_linear(x, ends_of([1, 2]), weight, scales, None, None, **how)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_torch_compile_needs_no_break_and_sees_any_split() -> None:
    weights, packed = stack(QuantSpec(4, 32), 3, 16, 64, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def twice(x: Tensor, ends: Tensor) -> Tensor:
        return 2 * grouped_packed_linear(x, ends, *packed, None, bits=4, group_size=32)

    for counts in ([2, 0, 3], [0, 0, 9], [4, 4, 0]):
        x = torch.randn(sum(counts), 64)
        assert_close(twice(x, ends_of(counts)), 2 * float64(x, counts, weights, None), **tolerance(torch.float32, k=64))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(2, 3, 64)}, r"x must be \(T, K\)"),
        ({"x": torch.zeros(4, 32)}, "weight must be"),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, "x must be"),
        ({"ends": torch.tensor([1.0, 2.0])}, r"ends must be \(E,\) int32 or int64 .* got \(2,\) torch.float32"),
        ({"ends": torch.tensor([1, 2, 4])}, "weight must hold the 3 experts of ends"),
        ({"ends": torch.tensor([], dtype=torch.int64)}, "with E at least 1"),
        ({"ends": torch.tensor([3, 2])}, r"ends must not decrease and lie in 0 \.\. 4"),
        ({"ends": torch.tensor([-1, 2])}, "ends must not decrease"),
        ({"ends": torch.tensor([1, 5])}, "ends must not decrease"),
        ({"slots": torch.tensor([0, 1])}, r"slots must be \(2,\) int32 as ends, got \(2,\) torch.int64"),
        ({"slots": torch.tensor([0], dtype=torch.int32)}, r"slots must be \(2,\) int32"),
        ({"slots": torch.tensor([0, 2], dtype=torch.int32)}, "slots must be from -1 to 1, the last weight"),
        ({"slots": torch.zeros(2, dtype=torch.int32), "bias": torch.zeros(1, 8)}, "bias must hold the 2 weights of"),
        ({"slots": torch.zeros(2, dtype=torch.int32, device="meta")}, "slots is on meta, but x is on cpu"),
        ({"bias": torch.zeros(1, 8)}, "bias must hold the 2 experts of ends"),
        ({"bias": torch.zeros(2, 7)}, "bias must be"),
        ({"zeros": torch.zeros(2, 8, 2, dtype=torch.int32)}, "zeros must be"),
        ({"bits": 3}, "packed widths are"),
        ({"layout": "mine"}, "layout must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_what_it_refuses(changed: dict[str, object], message: str) -> None:
    _, (weight, scales, _) = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    arguments = {"x": torch.zeros(4, 64), "ends": torch.tensor([1, 2]), "weight": weight, "scales": scales}
    arguments |= {"zeros": None, "bias": None, "bits": 4, "group_size": 32, "layout": DISK} | changed
    with pytest.raises(ValueError, match=message):
        grouped_packed_linear(**arguments)


def test_batch_invariance_is_refused_where_it_does_not_hold() -> None:
    _, packed = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    set_batch_invariant(True)
    try:
        with pytest.raises(RuntimeError, match="batch-invariant"):
            grouped_packed_linear(torch.zeros(4, 64), ends_of([1, 2]), *packed, None, bits=4, group_size=32)
    finally:
        set_batch_invariant(False)

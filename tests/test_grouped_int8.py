"""lowbit::grouped_int8_linear: the bits of int8_linear for each expert alone, its registration, and its errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import assert_close, tolerance
from lowbit.grouped_int8 import grouped_int8_linear
from lowbit.int8 import int8_linear
from merged_experts import COUNTS, ends_of

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
N, K = 40, 96
KINDS = [(static, zeros) for static in (False, True) for zeros in (False, True)]

by_kind = pytest.mark.parametrize("static, zeros", KINDS, ids=["dynamic", "dynamic-asym", "static", "static-asym"])


def stack(
    count: int, static: bool, zeros: bool, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """weight, weight_scale, weight_zero, input_scale and bias of ``count`` experts."""
    return (
        torch.randint(-128, 128, (count, N, K), dtype=torch.int8),
        (0.01 + 0.02 * torch.rand(count, N, 1)).to(dtype),
        torch.randint(-128, 128, (count, N, 1), dtype=torch.int8) if zeros else None,
        (0.02 + 0.02 * torch.rand(count, 1)).to(dtype) if static else None,
        torch.randn(count, N).to(dtype) if bias else None,
    )


def of(tensors: tuple[Tensor | None, ...], e: int) -> list[Tensor | None]:
    return [None if tensor is None else tensor[e] for tensor in tensors]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@by_kind
def test_every_row_has_the_bits_that_its_expert_alone_gives_it(static: bool, zeros: bool, dtype: torch.dtype) -> None:
    """Rows 46 .. 49 are nobody's. With slots only experts 1, 3 and 4 have a weight."""
    x = torch.randn(sum(COUNTS) + 4, K).to(dtype)
    for slots in (None, torch.tensor([-1, 2, -1, 0, 1, -1], dtype=torch.int32)):
        tensors = stack(len(COUNTS) if slots is None else 3, static, zeros, dtype)
        for ends in (ends_of(COUNTS), ends_of(COUNTS, torch.int64)):
            out, begin = grouped_int8_linear(x, ends, *tensors, slots=slots), 0
            assert out.dtype == dtype and not bool(out[sum(COUNTS) :].any())
            for e, rows in enumerate(COUNTS):
                mine, weight = slice(begin, begin + rows), e if slots is None else int(slots[e])
                alone = int8_linear(x[mine], *of(tensors, weight)) if weight >= 0 else torch.zeros(rows, N, dtype=dtype)
                assert torch.equal(out[mine], alone)
                begin += rows


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 1, 0], [3, 0, 0]], ids=str)
@by_kind
def test_few_rows_and_none(static: bool, zeros: bool, counts: list[int]) -> None:
    tensors, x = stack(3, static, zeros), torch.randn(sum(counts), K)
    out = grouped_int8_linear(x, ends_of(counts), *tensors)
    assert out.shape == (sum(counts), N)
    assert torch.equal(out, int8_linear(x, *of(tensors, 1 if counts[1] else 0)))


def test_a_row_that_is_not_finite_is_nan_and_no_other() -> None:
    tensors, x = stack(2, False, False), torch.randn(6, K)
    good = grouped_int8_linear(x, ends_of([2, 3]), *tensors)
    x[1, 3], x[5, 2] = float("nan"), float("inf")  # the latter is nobody's
    out = grouped_int8_linear(x, ends_of([2, 3]), *tensors)
    assert out[1].isnan().all() and torch.equal(out[[0, 2, 3, 4, 5]], good[[0, 2, 3, 4, 5]])


@by_kind
def test_opcheck(static: bool, zeros: bool) -> None:
    """Schema, fake implementation, autograd registration, and tracing with static and dynamic shapes."""
    ends, slots = ends_of([1, 0, 4]), torch.tensor([1, -1, 0], dtype=torch.int32) if zeros else None
    tensors = stack(2 if zeros else 3, static, zeros)
    for x in (torch.randn(6, K), torch.randn(5, K, requires_grad=True)):
        torch.library.opcheck(torch.ops.lowbit.grouped_int8_linear.default, (x, ends, slots, *tensors))
    args = (torch.randn(6, N), ends, slots, *tensors[:3])
    torch.library.opcheck(torch.ops.lowbit.grouped_int8_linear_backward.default, args)


@by_kind
def test_the_gradient_is_the_straight_through_one(static: bool, zeros: bool) -> None:
    weight, scale, zero, *rest = stack(len(COUNTS), static, zeros)
    x = torch.randn(sum(COUNTS) + 2, K, requires_grad=True)
    grad, expected, begin = torch.randn(len(x), N), torch.zeros(len(x), K).double(), 0
    grouped_int8_linear(x, ends_of(COUNTS), weight, scale, zero, *rest).backward(grad)
    for e, rows in enumerate(COUNTS):
        mine = slice(begin, begin + rows)
        dense = (weight[e].double() - (0 if zero is None else zero[e].double())) * scale[e].double()
        expected[mine] = grad[mine].double() @ dense
        begin += rows
    assert x.grad is not None and not bool(x.grad[sum(COUNTS) :].any())
    assert_close(x.grad, expected, **tolerance(torch.float32, k=N))


def test_double_backward_is_refused() -> None:
    x = torch.randn(3, K, requires_grad=True)
    out = grouped_int8_linear(x, ends_of([1, 2]), *stack(2, False, False))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_int8_linear has no second derivative"):
        grad.sum().backward()


def test_torch_compile_needs_no_break_and_sees_any_split() -> None:
    tensors = stack(3, True, True)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def twice(x: Tensor, ends: Tensor) -> Tensor:
        return 2 * grouped_int8_linear(x, ends, *tensors)

    for counts in ([2, 0, 3], [0, 0, 9], [4, 4, 0]):
        x = torch.randn(sum(counts), K)
        assert torch.equal(twice(x, ends_of(counts)), 2 * grouped_int8_linear(x, ends_of(counts), *tensors))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(2, 3, K)}, r"x must be \(T, K\)"),
        ({"x": torch.zeros(4, K + 1)}, r"x must be \(..., 96\)"),
        ({"x": torch.zeros(4, K, dtype=torch.float64)}, "x must be .* torch.float64"),
        ({"ends": torch.tensor([1.0, 2.0])}, r"ends must be \(E,\) int32 or int64 .* torch.float32"),
        ({"ends": torch.tensor([1, 2, 4])}, "weight must hold the 3 experts of ends"),
        ({"ends": torch.tensor([3, 2])}, r"ends must not decrease and lie in 0 \.\. 4"),
        ({"ends": torch.tensor([1, 5])}, "ends must not decrease"),
        ({"slots": torch.tensor([0, 2], dtype=torch.int32)}, "slots must be from -1 to 1"),
        ({"weight": torch.zeros(2, N, K)}, "weight must be .*int8"),
        ({"weight_scale": torch.zeros(2, N)}, r"weight_scale must be \(40, 1\)"),
        ({"weight_zero": torch.zeros(2, N, 1)}, "weight_zero must be one of .*int8"),
        ({"input_scale": torch.zeros(1, 1)}, "input_scale must hold the 2 experts of ends"),
        ({"input_scale": torch.zeros(2, 3)}, r"input_scale must be \(1,\)"),
        ({"bias": torch.zeros(2, N + 1)}, r"bias must be \(40,\)"),
        ({"bias": torch.zeros(2, N, device="meta")}, "bias is on meta, but x is on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_what_it_refuses(changed: dict[str, Tensor], message: str) -> None:
    names = ("weight", "weight_scale", "weight_zero", "input_scale", "bias")
    good = {"x": torch.zeros(4, K), "ends": torch.tensor([1, 2]), **dict(zip(names, stack(2, True, True), strict=True))}
    assert grouped_int8_linear(**good).shape == (4, N)
    with pytest.raises(ValueError, match=message):
        grouped_int8_linear(**{**good, **changed})

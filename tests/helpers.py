"""What several test files share: comparison with a reference, random packed weights, the matmul cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowbit.affine import QuantizedWeight
from lowbit.spec import QuantSpec

HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Largest relative error of rounding a number to the dtype once."""


def assert_close(actual: Tensor, expected: Tensor, *, rms: float, peak: float) -> None:
    """Compare with a reference, both errors relative to the reference's root mean square.

    Args:
        rms: largest allowed root mean square error.
        peak: largest allowed error of any element.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    expected = expected.detach().double().cpu()
    error = actual.detach().double().cpu() - expected
    size = expected.square().mean().sqrt().clamp(min=1e-300)
    rms_error, peak_error = (error.square().mean().sqrt() / size).item(), (error.abs().max() / size).item()
    if rms_error <= rms and peak_error <= peak:  # False for NaN
        return
    bad = (~(error.abs() / size <= min(peak, 4 * rms))).nonzero()
    first = [tuple(i.tolist()) for i in bad[:5]]
    values = [(actual[i].item(), expected[i].item()) for i in first]
    raise AssertionError(
        f"rms error {rms_error:.2e} (allowed {rms:.2e}), peak {peak_error:.2e} (allowed {peak:.2e}); "
        f"{len(bad)} of {error.numel()} elements stand out, first {first}: (actual, expected) {values}"
    )


def tolerance(dtype: torch.dtype, roundings: int = 1, k: int = 1) -> dict[str, float]:
    """``assert_close``'s tolerances for a matmul over ``k`` columns whose result saw ``roundings`` roundings to dtype.

    One rounding is at most half an ulp u relative to the number; over many numbers the error is spread evenly below
    that, so its rms is at most u / sqrt(3). Independent roundings add in squares. The largest of some thousand results
    is below 7 rms: 4.8 of a normal number's, in a row whose scale is 1.44 times the mean. fp32 accumulation adds at
    most sqrt(k) of its own u, in the mean.
    """
    u, accumulated = HALF_ULP[dtype], math.sqrt(k) * HALF_ULP[torch.float32]
    once = u * math.sqrt(roundings)
    # A few results stand for the mean: 1.5 leaves room for their scatter.
    return {"rms": 1.5 * once / math.sqrt(3) + accumulated, "peak": 7 * (once + accumulated)}


def message(work: Callable[[], object]) -> str:
    """``Class: text`` of the exception ``work`` raises, for a process that writes down what it saw."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def random_quantized(
    n: int, k: int, spec: QuantSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> QuantizedWeight:
    """Codes and zeros over their whole range, scales between 0.01 and 0.03; from torch's current seed."""
    groups = spec.num_groups(k)
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    scales = (0.01 + 0.02 * torch.rand(n, groups)).to(dtype)
    zeros = None if spec.symmetric else torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8).to(device)
    return QuantizedWeight(codes.to(device), scales.to(device), zeros, spec)


@dataclass(frozen=True)
class Case:
    """One matmul ``(m, k) @ (n, k).T``."""

    m: int
    n: int
    k: int
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    bias: bool = False

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}-{self.spec.label()}{'-bias' if self.bias else ''}"


MATMUL_CASES = [
    Case(1, 64, 128),
    Case(1, 33, 256, symmetric=False, bias=True),
    Case(0, 16, 128, bias=True),
    Case(17, 1, 128, group_size=64, symmetric=False),  # one row: its zero alone in a word
    Case(3, 130, 96, group_size=32, bias=True),
    Case(5, 47, 160, group_size=32, symmetric=False),
    Case(70, 65, 192, group_size=64, symmetric=False, bias=True),
    Case(131, 129, 128, bias=True),  # one past the tiles
    Case(2, 40, 1, group_size=-1),  # one column
    Case(4, 37, 13, group_size=-1, symmetric=False),  # K ends inside a word
    Case(9, 20, 200, group_size=-1, symmetric=False, bias=True),  # K ends inside a tile
    Case(1, 64, 128, bits=8),
    Case(3, 35, 192, bits=8, group_size=64, symmetric=False, bias=True),
    Case(33, 31, 64, bits=8, group_size=32, symmetric=False),
    Case(5, 18, 7, bits=8, group_size=-1, bias=True),
    Case(2, 50, 131, bits=8, group_size=-1, symmetric=False),
    Case(1, 64, 128, bits=2, group_size=64, symmetric=False),
    Case(6, 45, 64, bits=2, group_size=32, bias=True),
    Case(3, 21, 35, bits=2, group_size=-1, symmetric=False),
]
"""Odd, tiny, empty and one-past shapes; every width, group size and symmetry."""


def needs_gluon() -> pytest.MarkDecorator:
    """``pytestmark`` of a module that is skipped where Triton has no Gluon for the kernels in it."""
    from lowbit_kernels.releases import gluon_missing

    missing = gluon_missing()
    return pytest.mark.skipif(missing is not None, reason=missing or "")

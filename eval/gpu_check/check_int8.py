"""Checks of W8A8: activations to int8, the int8 matmul against exact integers, the same bits on every run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from check_correct import RUNS, Check, CheckFailed, limit_of
from check_layers import poisoned_empty, relative_rms
from torch import Tensor

__all__ = ["int8_checks"]


def int8_checks(device: torch.device, dtypes: tuple[torch.dtype, ...], *, tiny: bool) -> Iterator[Check]:
    """Every check of the two kernels."""
    small = [(1, 48, 256, False, True), (5, 33, 100, True, False), (19, 64, 512, False, False)]
    large = [
        (1, 4096, 4096, False, False),
        (16, 1032, 4096, True, True),
        (64, 4096, 14336, False, False),
        (300, 2048, 4096, True, True),
        (2049, 6144, 4096, False, False),
    ]
    for dtype in dtypes:
        for m, n, k, asymmetric, with_bias in small if tiny else small + large:
            name = f"w8a8 {str(dtype)[6:]} {m}x{n}x{k} {'asym' if asymmetric else 'sym'}"
            yield Check(name, partial(_linear, m, n, k, asymmetric, with_bias, dtype, device, name))
        yield Check(f"w8a8 {str(dtype)[6:]} rows that are not numbers", partial(_not_numbers, dtype, device))
    yield Check("w8a8 same bits on every run", partial(_same_bits, dtypes[0], device, tiny))


def _weights(n: int, k: int, asymmetric: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    scales = 0.005 + 0.01 * torch.rand(n, device=device)
    zeros = torch.randint(-128, 128, (n,), dtype=torch.int8, device=device) if asymmetric else None
    return codes, scales, zeros


def _linear(
    m: int, n: int, k: int, asymmetric: bool, with_bias: bool, dtype: torch.dtype, device: torch.device, where: str
) -> float:
    """int8_linear against float64 on the quantized activations; those against their own formula."""
    from lowbit_kernels.int8 import int8_linear
    from lowbit_kernels.int8_quantize import quantize_activations, quantize_activations_reference

    torch.manual_seed(m + n + k)
    codes, scales, zeros = _weights(n, k, asymmetric, device)
    x = torch.randn(m, k, device=device).to(dtype)
    x[0, 0] = 40  # one outlier
    bias = torch.randn(n, device=device).to(dtype) if with_bias else None
    with poisoned_empty():
        x_q, x_scale, _ = quantize_activations(x)
        out = int8_linear(x, codes, scales, zeros, None, bias)
    expected_q, expected_scale, _ = quantize_activations_reference(x)
    if not torch.equal(x_q, expected_q) or not torch.equal(x_scale, expected_scale):
        different = int((x_q != expected_q).sum())
        raise CheckFailed(f"{where}: {different} quantized activations differ from the formula")
    offset = 0.0 if zeros is None else zeros.double()[:, None]
    exact = x_q.double() @ (codes.double() - offset).t() * x_scale.double()[:, None] * scales.double()
    exact = exact if bias is None else exact + bias.double()
    error = relative_rms(out, exact)
    limit = limit_of(dtype, out.numel())
    if out.dtype != dtype or not error <= limit:
        raise CheckFailed(f"{where}: {out.dtype}, relative RMS error {error:.2e}, allowed {limit:.1e}")
    return error


def _not_numbers(dtype: torch.dtype, device: torch.device) -> float:
    """A NaN or an infinity in one token makes that row NaN and changes no other."""
    from lowbit_kernels.int8 import int8_linear

    torch.manual_seed(3)
    codes, scales, _ = _weights(40, 128, False, device)
    x = torch.randn(6, 128, device=device).to(dtype)
    clean = int8_linear(x, codes, scales, None, None, None)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    out = int8_linear(x, codes, scales, None, None, None)
    rows = [0, 1, 3, 5]
    if not out[[2, 4]].isnan().all() or not torch.equal(out[rows], clean[rows]):
        raise CheckFailed("w8a8: a token that is not a number did not stay in its row")
    return 0.0


def _same_bits(dtype: torch.dtype, device: torch.device, tiny: bool) -> float:
    from lowbit_kernels.int8 import int8_linear

    torch.manual_seed(4)
    m, n, k = (2, 32, 1024) if tiny else (3, 4096, 14336)
    codes, scales, zeros = _weights(n, k, True, device)
    x = torch.randn(m, k, device=device).to(dtype)
    first = int8_linear(x, codes, scales, zeros, None, None)
    runs = 3 if tiny else RUNS
    for number in range(runs):
        if not torch.equal(int8_linear(x, codes, scales, zeros, None, None), first):
            raise CheckFailed(f"w8a8: run {number + 2} of the same input gave other bits")
    return float(runs)

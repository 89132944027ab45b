"""Checks of W8A8: activations to int8, the int8 matmul against exact integers, the same bits on every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from check_correct import RUNS, Check, CheckFailed, limit_of
from check_layers import poisoned_empty, relative_rms
from torch import Tensor

from lowbit_kernels.int8_tiles import HOPPER_TILES, Int8Tile

__all__ = ["int8_checks", "int8_hopper_checks"]


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


def int8_hopper_checks(device: torch.device, dtypes: tuple[torch.dtype, ...], *, tiny: bool) -> Iterator[Check]:
    """The tiles in Gluon, which sm_90 alone has: against exact integers, whole tiles and shared ones."""
    shapes = [(5, 33, 112, True), (70, 130, 256, False)]
    if not tiny:
        shapes += [(64, 4096, 14336, False), (300, 2048, 4096, True), (2049, 6144, 4096, False)]
    for number, (m, n, k, asymmetric) in enumerate(shapes):
        for tile in HOPPER_TILES:
            for split in (1 + 2 * (number % 2),) if tiny else (1, 3):
                dtype = dtypes[(number + split) % len(dtypes)]
                name = (
                    f"gluon w8a8 {str(dtype)[6:]} {m}x{n}x{k} {'asym' if asymmetric else 'sym'} {tile.block_m} tokens"
                )
                shared = replace(tile, split_k=split)
                case = partial(_hopper, m, n, k, asymmetric, dtype, device, shared, tiny)
                yield Check(f"{name}, {split} share", case)


def _hopper(
    m: int, n: int, k: int, asymmetric: bool, dtype: torch.dtype, device: torch.device, tile: Int8Tile, tiny: bool
) -> float:
    """int8_matmul with this tile: right, and the same bits again."""
    from lowbit_kernels.int8 import int8_matmul

    torch.manual_seed(m + n + k)
    codes, scales, zeros = _weights(n, k, asymmetric, device)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
    x_scale, bias = 0.001 + 0.001 * torch.rand(m, device=device), torch.randn(n, device=device)
    sums = None if zeros is None else x.sum(1, dtype=torch.int32)
    arguments = {"out_dtype": dtype, "w_zero": zeros, "row_sums": sums, "tile": tile}
    with poisoned_empty():
        out = int8_matmul(x, x_scale, codes, scales, bias, **arguments)
    offset = 0.0 if zeros is None else zeros.double()[:, None]
    exact = x.double() @ (codes.double() - offset).t() * x_scale.double()[:, None] * scales.double() + bias.double()
    error, limit = relative_rms(out, exact), limit_of(dtype, out.numel())
    if not error <= limit:
        raise CheckFailed(f"{tile}, {m}x{n}x{k}: relative RMS error {error:.2e}, allowed {limit:.1e}")
    for number in range(1 if tiny else 5):
        if not torch.equal(int8_matmul(x, x_scale, codes, scales, bias, **arguments), out):
            raise CheckFailed(f"{tile}, {m}x{n}x{k}: run {number + 2} of the same input gave other bits")
    return error


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

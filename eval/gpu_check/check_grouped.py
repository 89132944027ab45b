"""Checks of the experts' grouped matmul: against float64 and, bit for bit, against the matmul of one expert alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from check_correct import RUNS, Check, CheckFailed, limit_of
from check_layers import Packed, poisoned_empty, random_packed, reference, relative_rms
from torch import Tensor

from lowbit_kernels.grouped import grouped_matmul
from lowbit_kernels.grouped_int8 import grouped_int8_linear
from lowbit_kernels.grouped_tiles import MIN_ARCH, grouped_tile
from lowbit_kernels.int8 import int8_linear

__all__ = ["grouped_checks"]

Stack = tuple[Tensor, Tensor, Tensor | None]


def grouped_checks(device: torch.device, dtypes: tuple[torch.dtype, ...], arch: int, *, tiny: bool) -> Iterator[Check]:
    """Every check of the kernel; none where it does not run."""
    if arch < MIN_ARCH:
        return
    small = [
        ([0, 3, 0, 18, 1], 40, 256, 4, 64, True),
        ([2, 0], 33, 200, 8, -1, False),
        ([0, 0, 5], 16, 256, 2, 64, True),
    ]
    large = [
        ([1] * 8 + [0] * 120, 1536, 2048, 4, 128, False),  # one token, eight of 128 experts
        ([3, 0, 700, 40, 0, 0, 129, 64], 2048, 4096, 4, 128, True),
        ([17, 30, 0, 1], 4104, 4096, 4, 32, True),
        ([0, 64, 33, 8], 4096, 4096, 8, 128, False),
    ]
    for dtype in dtypes:
        for counts, n, k, bits, group, asymmetric in small if tiny else small + large:
            kind = f"{bits}b g{group} {'asym' if asymmetric else 'sym'}"
            name = f"grouped {str(dtype)[6:]} {sum(counts)} rows, {len(counts)} x {n}x{k} {kind}"
            yield Check(name, partial(_case, counts, n, k, bits, group, asymmetric, dtype, device, arch, name))
    for dtype in dtypes:
        name = f"grouped w8a8 {str(dtype)[6:]}"
        yield Check(name, partial(_int8_case, dtype, device, tiny, name))
    yield Check("grouped same bits on every run", partial(_same_bits, dtypes[0], device, tiny))
    if device.type == "cuda":
        yield Check("grouped CUDA graph, other ends on replay", partial(_captured, dtypes[0], device))


def _experts(
    count: int, n: int, k: int, bits: int, group: int, asymmetric: bool, dtype: torch.dtype, device: torch.device
) -> tuple[list[Packed], Stack]:
    weights = [random_packed(n, k, bits, group, dtype, device, asymmetric=asymmetric) for _ in range(count)]
    zeros = [weight.zeros_gn for weight in weights if weight.zeros_gn is not None]
    tiles, scales = (torch.stack([getattr(weight, part) for weight in weights]) for part in ("tiles", "scales_gn"))
    return weights, (tiles, scales, torch.stack(zeros) if zeros else None)


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)


def _case(
    counts: list[int], n: int, k: int, bits: int, group: int, asymmetric: bool, dtype: torch.dtype,
    device: torch.device, arch: int, where: str,
) -> float:  # fmt: skip
    """Result, rows of nobody, and that row i is what its expert's own matmul gives with the same tile."""
    torch.manual_seed(n + k)
    weights, stack = _experts(len(counts), n, k, bits, group, asymmetric, dtype, device)
    x = torch.randn(sum(counts) + 5, k, device=device).to(dtype)
    bias = torch.randn(len(counts), n, device=device).to(dtype)
    with poisoned_empty():
        out = grouped_matmul(x, _ends(counts, device), *stack, bias, bits=bits, group_size=group, n=n)
    if bool(out[sum(counts) :].any()):
        raise CheckFailed(f"{where}: rows past the last expert's are not zero")
    tile, begin, parts = grouped_tile(weights[0].problem(len(x)), len(counts), arch), 0, []
    for e, rows in enumerate(counts):
        mine = x[begin : begin + rows].contiguous()
        parts.append(reference(mine, weights[e], bias[e]))
        if not torch.equal(weights[e](mine, bias[e].clone(), tile=tile), out[begin : begin + rows]):
            raise CheckFailed(f"{where}: rows of expert {e} differ from its own matmul with {tile}")
        begin += rows
    error = relative_rms(out[:begin], torch.cat(parts))
    limit = limit_of(dtype, out[:begin].numel())
    if not error <= limit:
        raise CheckFailed(f"{where}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}")
    return error


def _int8_case(dtype: torch.dtype, device: torch.device, tiny: bool, where: str) -> float:
    """Row i has the bits that its expert's own W8A8 layer gives it; rows of an expert elsewhere and of nobody are 0."""
    torch.manual_seed(3)
    n, k, counts = (33, 64, [3, 0, 20, 2]) if tiny else (2048, 4096, [3, 0, 300, 17])
    slots = torch.tensor([1, 0, 2, -1], dtype=torch.int32, device=device)
    codes = torch.randint(-128, 128, (3, n, k), dtype=torch.int8, device=device)
    scales, bias = 0.001 + 0.001 * torch.rand(3, n, device=device), torch.randn(3, n, device=device)
    zeros = torch.randint(-128, 128, (3, n), dtype=torch.int8, device=device)
    x, ends = torch.randn(sum(counts) + 4, k, device=device).to(dtype), _ends(counts, device)
    with poisoned_empty():
        out = grouped_int8_linear(x, ends, slots, codes, scales, zeros, None, bias)
    begin = 0
    for weight, rows in zip((1, 0, 2, None), counts, strict=True):
        mine = slice(begin, begin + rows)
        if weight is None:
            expected = torch.zeros_like(out[mine])
        else:
            one = (codes[weight], scales[weight], zeros[weight])
            expected = int8_linear(x[mine].contiguous(), *one, None, bias[weight])
        if not torch.equal(out[mine], expected):
            raise CheckFailed(f"{where}: rows {begin} to {begin + rows} differ from their expert's own layer")
        begin += rows
    if bool(out[begin:].any()):
        raise CheckFailed(f"{where}: rows past the last expert's are not zero")
    return float(begin)


def _same_bits(dtype: torch.dtype, device: torch.device, tiny: bool) -> float:
    torch.manual_seed(1)
    n, k, counts = (32, 256, [3, 0, 9]) if tiny else (2048, 4096, [40, 0, 200, 5])
    _, stack = _experts(len(counts), n, k, 4, 128, True, dtype, device)
    x = torch.randn(sum(counts), k, device=device).to(dtype)
    runs = [
        grouped_matmul(x, _ends(counts, device), *stack, None, bits=4, group_size=128, n=n)
        for _ in range(3 if tiny else RUNS)
    ]
    if not all(torch.equal(run, runs[0]) for run in runs):
        raise CheckFailed("the same input of the grouped matmul gave other bits")
    return float(len(runs))


def _captured(dtype: torch.dtype, device: torch.device) -> float:
    """A graph that was captured with one routing replays with another."""
    torch.manual_seed(2)
    n, k, first, then = 512, 1024, [4, 0, 4, 0], [0, 7, 0, 1]
    _, stack = _experts(4, n, k, 4, 128, False, dtype, device)
    x, ends = torch.randn(8, k, device=device).to(dtype), _ends(first, device)

    def multiply() -> Tensor:
        return grouped_matmul(x, ends, *stack, None, bits=4, group_size=128, n=n)

    multiply()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply()
    for counts in (first, then):
        ends.copy_(_ends(counts, device))
        graph.replay()
        if not torch.equal(out, multiply()):
            raise CheckFailed(f"a replayed graph gave another result for the rows per expert {counts}")
    return 0.0

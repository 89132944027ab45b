"""The correctness suite: what must hold before anything is measured. Each check returns what it found, or raises.

On a GPU every family, both dtypes, odd shapes (``--tiny``: small ones alone); with ``--interpret`` the same checks on
Triton's interpreter, tiny, in float16 and for the Triton and the dequant family alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from check_layers import Packed, dense_weight, poisoned_empty, random_packed, reference, relative_rms
from torch import Tensor
from tune_model import CHIPS, predict
from tune_table import shipped_tiles

from lowbit_kernels.dispatch import choose, fill_split
from lowbit_kernels.releases import gluon_missing
from lowbit_kernels.tiles import HOPPER, Problem, Tile, cdiv, fits, step_columns
from lowbit_kernels.weight_only import device_arch, gpu_name

__all__ = ["LIMITS", "Check", "CheckFailed", "checks", "family_tile", "limit_of"]

LIMITS = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}
"""Largest relative RMS error against float64, by the result's dtype: one rounding and little more."""
HALF = torch.float16
ROUNDING = ("scaled", "dequant")
"""Families that round weights, to fp16: scaled in the register operand, dequant for cuBLAS."""
ROUNDED_WEIGHTS = 1.3
"""Factor on LIMITS for them with fp16 results: sqrt(2) of 2.07e-4 in the mean, and a little for results of few
elements. With bf16 results, whose own rounding is eight times as coarse, they keep to the limit."""
RUNS = 20


class CheckFailed(AssertionError):
    """A kernel's result is wrong; the message has the case and the figures."""


@dataclass(frozen=True)
class Check:
    """One case of the suite: ``run`` returns a figure to report, such as the error, or raises."""

    name: str
    run: Callable[[], float]


def checks(device: torch.device, arch: int, *, tiny: bool, without: Sequence[str] = ()) -> Iterator[Check]:
    """Every check for this machine: on a CPU (the interpreter) in float16 alone, without what only a GPU has.

    The Gluon kernels come last: they synchronise by hand, and if one never ends, everything else has been checked.

    Args:
        tiny: shapes that take no time, for a first look and for the interpreter.
        without: families to leave out.
    """
    on_gpu = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16) if on_gpu and arch >= 80 else (torch.float16,)
    for family in ("triton", "dequant"):
        yield from _of_family(family, dtypes, device, arch, tiny)
    from check_grouped import grouped_checks  # which use this module
    from check_int8 import int8_checks, int8_hopper_checks
    from check_overlap import overlap_checks

    yield from grouped_checks(device, dtypes, arch, tiny=tiny)
    yield from int8_checks(device, dtypes, tiny=tiny)
    yield from _invariant(dtypes[0], device, tiny)
    yield from _dispatched(dtypes[0], device, tiny)
    if on_gpu:
        yield from _machinery(device, dtypes[0], tiny)
    for family in HOPPER if on_gpu and arch == 90 else ():
        if family not in without:
            yield from _of_family(family, dtypes, device, arch, tiny)
    if on_gpu and arch == 90 and "gluon" not in without:
        yield from int8_hopper_checks(device, dtypes, tiny=tiny)
    if on_gpu:
        yield from overlap_checks(device, dtypes[0], arch, tiny=tiny, without=without)


def _of_family(
    family: str, dtypes: Sequence[torch.dtype], device: torch.device, arch: int, tiny: bool
) -> Iterator[Check]:
    for dtype in dtypes:
        yield from _random(family, dtype, device, arch, tiny)
        yield from _adversarial(family, dtype, device, arch, tiny)
    if family != "dequant":
        yield from _same_bits(family, dtypes[0], device, arch, tiny)


def limit_of(dtype: torch.dtype, elements: int, tile: Tile | None = None) -> float:
    """Largest relative RMS error allowed for a result of ``dtype`` and so many elements, by ``tile`` if it matters.

    LIMITS are for many elements. The error of few scatters: rounded to bf16 and nothing else, one result in seven of 16
    normal elements is off by more than 2e-3, and none of 10**5 by more than half as much again (1.36 for 64, 1.13 for
    120, 1.0 for 400; simulated). So results of less than 1024 get ``1 + 4 / sqrt(elements)``.
    """
    few = 1 + 4 / max(1, elements) ** 0.5 if elements < 1024 else 1.0
    return few * LIMITS[dtype] * (ROUNDED_WEIGHTS if tile and tile.family in ROUNDING and dtype == HALF else 1.0)


def family_tile(family: str, problem: Problem, arch: int, multiprocessors: int = 132) -> Tile | None:
    """The tile of one family that the model expects most of; None when none fits."""
    if family == "dequant":
        return Tile("dequant", 1, 16)
    chip = min(CHIPS, key=lambda chip: (abs(chip.arch - arch), chip.name))
    tiles = [
        replace(tile, split_k=fill_split(tile, problem, arch, multiprocessors))
        for tile in shipped_tiles(arch, (family,), problem, fits)
        if tile.family == family
    ]
    return min(tiles, key=lambda tile: (predict(tile, problem, chip).seconds, repr(tile)), default=None)


def _shapes(tiny: bool) -> list[tuple[int, int, int, int, int, bool, bool]]:
    """(m, n, k, bits, group, asymmetric, bias)."""
    small = [
        (1, 64, 128, 4, 128, False, False),
        (3, 40, 256, 4, 64, True, True),
        (17, 33, 96, 4, 32, True, False),
        (2, 24, 200, 8, -1, False, True),
        (5, 48, 192, 8, 64, True, False),
        (1, 16, 256, 2, 64, True, False),
    ]
    if tiny:
        return small
    return [
        *small,
        (1, 4096, 4096, 4, 128, False, False),
        (8, 4104, 4096, 4, 128, True, True),
        (16, 6144, 4096, 4, 64, False, False),
        (17, 1000, 4096, 4, 32, True, True),
        (64, 4096, 14336, 4, 128, False, False),
        (129, 1032, 4096, 4, -1, True, False),
        (300, 2048, 4096, 4, 128, True, True),
        (1, 4096, 4096, 8, 128, False, True),
        (33, 4096, 4096, 8, -1, True, False),
        (257, 2048, 11008, 8, 128, True, False),
        (4, 2048, 2048, 2, 64, True, True),
    ]


def _compare(packed: Packed, x: Tensor, tile: Tile | None, bias: Tensor | None, where: str) -> float:
    with poisoned_empty():
        out = packed(x, bias, tile=tile)
    if tile is None:
        hopper = gluon_missing() is None
        tile = choose(packed.problem(len(x)), device_arch(x.device), gpu_name=gpu_name(x.device), hopper=hopper)
    expected = reference(x, packed, bias)
    if out.shape != expected.shape or out.dtype != x.dtype:
        raise CheckFailed(f"{where}: got {tuple(out.shape)} {out.dtype}, expected {tuple(expected.shape)} {x.dtype}")
    error = relative_rms(out, expected)
    limit = limit_of(x.dtype, out.numel(), tile)
    if not error <= limit:
        bad = (~((out.double() - expected).abs() <= 16 * limit * expected.square().mean().sqrt())).nonzero()
        raise CheckFailed(
            f"{where}, {tile}: relative RMS error {error:.2e}, allowed {limit:.1e}; "
            f"{len(bad)} elements stand out, first {bad[:4].tolist()}"
        )
    return error


def _random(family: str, dtype: torch.dtype, device: torch.device, arch: int, tiny: bool) -> Iterator[Check]:
    for m, n, k, bits, group, asymmetric, with_bias in _shapes(tiny):
        problem = Problem(m, n, k, bits, group, dtype, asymmetric)
        tile = family_tile(family, problem, arch)
        if tile is None:
            continue
        name = f"{family} {str(dtype)[6:]} {m}x{n}x{k} {bits}b g{group} {'asym' if asymmetric else 'sym'}"

        yield Check(name, partial(_random_case, problem, tile, with_bias, device, name))


def _random_case(problem: Problem, tile: Tile, with_bias: bool, device: torch.device, name: str) -> float:
    m, n, k = problem.m, problem.n, problem.k
    torch.manual_seed(m * 1000 + n + k)
    packed = random_packed(n, k, problem.bits, problem.group_size, problem.dtype, device, asymmetric=problem.asymmetric)
    bias = torch.randn(n, device=device).to(problem.dtype) if with_bias else None
    return _compare(packed, torch.randn(m, k, device=device).to(problem.dtype), tile, bias, name)


def _inputs(m: int, k: int, device: torch.device) -> dict[str, Tensor]:
    """Activations that break kernels which round weights, accumulate in 16 bits or mix rows."""
    x = torch.randn(m, k, device=device)
    outliers = x.clone()
    outliers[:, ::61] *= 300
    one_sided = x.abs() + 1
    tiny = x * 1e-4
    alternating = torch.ones(m, k, device=device)
    alternating[:, 1::2] = -1
    return {
        "outlier channels": outliers,
        "mean 1": one_sided,
        "tiny": tiny,
        "cancelling": alternating + 0.01 * x,
        "zeros": x * 0,
    }


def _adversarial(family: str, dtype: torch.dtype, device: torch.device, arch: int, tiny: bool) -> Iterator[Check]:
    m, n, k = (3, 48, 256) if tiny else (24, 1040, 4096)
    for bits, asymmetric in ((4, True), (8, False)):
        problem = Problem(m, n, k, bits, 128, dtype, asymmetric)
        tile = family_tile(family, problem, arch)
        if tile is None:
            continue
        where = f"{family} {str(dtype)[6:]} {bits}b"

        def run(bits: int = bits, asymmetric: bool = asymmetric, tile: Tile = tile, where: str = where) -> float:
            torch.manual_seed(bits)
            packed = random_packed(n, k, bits, 128, dtype, device, asymmetric=asymmetric)
            inputs = _inputs(m, k, device).items()
            # the group sums cancel almost wholly in "cancelling": its scale is the sum of the terms, not the result's
            worst = 0.0
            for name, x in inputs:
                if name in ("cancelling", "mean 1") and family in ROUNDING:
                    continue  # errors of rounded weights do not cancel as the sums do
                if name == "zeros":
                    if packed(x.to(dtype), tile=tile).abs().max().item() != 0:
                        raise CheckFailed(f"{where}, {name}: the result of zeros is not zero")
                    continue
                worst = max(worst, _compare(packed, x.to(dtype), tile, None, f"{where}, {name}"))
            _one_hot(packed, dtype, device, tile, where)
            _rows_do_not_mix(packed, m, dtype, device, tile, where)
            return worst

        yield Check(f"{where} adversarial inputs", run)


def _one_hot(packed: Packed, dtype: torch.dtype, device: torch.device, tile: Tile, where: str) -> None:
    """x with a single 1 reads one column of W, rounded once: equal bit for bit.

    Families that round to float16 before they round to bf16 may end one unit in the last place away.
    """
    columns = torch.linspace(0, packed.k - 1, 8).long().tolist()
    x = torch.zeros(len(columns), packed.k, device=device, dtype=dtype)
    for row, column in enumerate(columns):
        x[row, column] = 1
    expected = dense_weight(packed, torch.float64)[:, columns].t().to(dtype)
    out = packed(x, tile=tile)
    unit = 2**-7 if tile.family in ROUNDING and dtype == torch.bfloat16 else 0.0
    right = (out.double() - expected.double()).abs() <= unit * expected.double().abs()
    if not bool(right.all()):
        bad = (~right).nonzero()
        raise CheckFailed(f"{where}, {tile}: {len(bad)} of {out.numel()} weights differ, first {bad[:4].tolist()}")


def _rows_do_not_mix(packed: Packed, m: int, dtype: torch.dtype, device: torch.device, tile: Tile, where: str) -> None:
    x = torch.randn(m, packed.k, device=device).to(dtype)
    clean = packed(x, tile=tile)
    x[1] = float("nan")
    out = packed(x, tile=tile)
    others = [row for row in range(m) if row != 1]
    if not out[1].isnan().all() or not torch.equal(out[others], clean[others]):
        raise CheckFailed(f"{where}, {tile}: NaN in one row of x did not stay in that row of the result")


def _same_bits(family: str, dtype: torch.dtype, device: torch.device, arch: int, tiny: bool) -> Iterator[Check]:
    m, n, k = (2, 32, 1024) if tiny else (5, 4096, 14336)
    problem = Problem(m, n, k, 4, 128, dtype, True)
    tile = family_tile(family, problem, arch)
    if tile is None:
        return
    splits = sorted({1, min(4, cdiv(k, step_columns(4))), tile.split_k})
    for split in splits:
        split_tile = replace(tile, split_k=split)
        if not fits(split_tile, problem, arch):
            continue

        def run(split_tile: Tile = split_tile) -> float:
            torch.manual_seed(1)
            packed = random_packed(n, k, 4, 128, dtype, device, asymmetric=True)
            x = torch.randn(m, k, device=device).to(dtype)
            first = packed(x, tile=split_tile)
            runs = 3 if tiny else RUNS
            for number in range(runs):
                if not torch.equal(packed(x, tile=split_tile), first):
                    raise CheckFailed(f"{split_tile}: run {number + 2} of the same input gave other bits")
            return float(runs)

        yield Check(f"{family} same bits on every run, split_k {split}", run)


def _invariant(dtype: torch.dtype, device: torch.device, tiny: bool) -> Iterator[Check]:
    n, k, rows = (32, 512, 9) if tiny else (4096, 4096, 300)

    def run() -> float:
        torch.manual_seed(2)
        packed = random_packed(n, k, 4, 128, dtype, device)
        x = torch.randn(rows, k, device=device).to(dtype)
        whole = packed(x, batch_invariant=True)
        for m in {1, 2, 8, rows // 2, rows - 1}:
            if not torch.equal(packed(x[:m].contiguous(), batch_invariant=True), whole[:m]):
                raise CheckFailed(f"batch invariant mode: the first {m} rows alone differ from the same rows of {rows}")
        return 0.0

    yield Check("batch invariance", run)


def _dispatched(dtype: torch.dtype, device: torch.device, tiny: bool) -> Iterator[Check]:
    """No tile given: what users call, over M."""
    n, k = (40, 256) if tiny else (4096, 4096)
    for m in (0, 1, 9) if tiny else (0, 1, 2, 16, 40, 128, 1000, 4096):

        def run(m: int = m) -> float:
            torch.manual_seed(m)
            packed = random_packed(n, k, 4, 128, dtype, device)
            x = torch.randn(m, k, device=device).to(dtype)
            if m == 0:
                if packed(x).shape != (0, n):
                    raise CheckFailed(f"no tokens: got {tuple(packed(x).shape)}, expected {(0, n)}")
                return 0.0
            return _compare(packed, x, None, None, f"dispatched, M = {m}")

        yield Check(f"dispatched M = {m}", run)


def _machinery(device: torch.device, dtype: torch.dtype, tiny: bool) -> Iterator[Check]:
    """What only a GPU has: graphs, compilation of the whole model, 64-bit offsets."""
    from check_machinery import captured, compiled_fullgraph, far_offsets

    yield Check("CUDA graph capture", lambda: captured(device, dtype, tiny))
    yield Check("torch.compile(fullgraph=True)", lambda: compiled_fullgraph(device, dtype))
    if not tiny:
        yield Check("offsets past 2**31", lambda: far_offsets(device, dtype))

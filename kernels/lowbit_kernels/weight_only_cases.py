"""What of the Triton family is compiled ahead, without a GPU, by the tests: see cases.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cases import ARCHITECTURES, CompileCase
from .tiles import PDL_ARCH, Problem, Tile, narrowed, shared_bytes, step_columns
from .weight_only import constants, options, weight_only_kernel

__all__ = ["compile_case", "compile_cases"]


def compile_cases() -> list[CompileCase]:
    """Every compilation worth a check without a GPU: each shape of tile, and for one of them each kind of weight.

    Where sm_90 takes wgmma (from 16 tokens on, with Triton 3.8 from 8 on), the operands have another order than for
    mma.sync: cases of their own.
    """
    fp16, bf16 = torch.float16, torch.bfloat16
    kinds = ((4, 128, bf16, False), (4, 128, fp16, True), (8, 128, bf16, False), (8, 128, fp16, True))
    others = ((4, 64, bf16, True), (4, 32, bf16, False), (4, -1, fp16, False), (8, 32, bf16, True), (2, 64, bf16, True))
    shapes = [
        (Tile("triton", 8, 64, 4, 2, 4), ARCHITECTURES, (*kinds, *others)),
        (Tile("triton", 8, 128, 4, 4, 4), (90,), (*kinds[:2], kinds[3])),
        (Tile("triton", 8, 128, 4, 4, 4), tuple(arch for arch in ARCHITECTURES if arch != 90), kinds[:2]),
        (Tile("triton", 16, 64, 4, 2, 4), ARCHITECTURES, kinds),
        (Tile("triton", 16, 128, 4, 4, 4), (90,), kinds),
        (Tile("triton", 32, 128, 2, 8, 4), (90,), kinds),
        (Tile("triton", 64, 128, 1, 8, 3), (90,), kinds),
        (Tile("triton", 128, 128, 1, 8, 3), (90,), kinds[:1] + kinds[2:3]),
        (Tile("triton", 32, 128, 2, 4, 3), (80, 86, 89, 120), (*kinds, (4, 32, bf16, True), (2, 64, fp16, True))),
        (Tile("triton", 64, 128, 1, 8, 3), (80, 86, 89, 120), (*kinds, (4, 64, fp16, True), (4, 32, bf16, False))),
    ]
    overlapping = [
        (Tile("triton", 8, 64, 4, 2, 4, pdl=True), tuple(a for a in ARCHITECTURES if a >= PDL_ARCH), kinds[1:2])
    ]
    return [
        case
        for tile, archs, weights in shapes + overlapping
        for bits, group, dtype, asymmetric in weights
        for case in _narrowed_cases(tile, Problem(4 * tile.block_m, 4096, 8192, bits, group, dtype, asymmetric), archs)
    ]


def _narrowed_cases(tile: Tile, problem: Problem, archs: tuple[int, ...]) -> list[CompileCase]:
    """A case for each of the tiles that ``tile`` is narrowed to on these architectures."""
    found: dict[Tile, list[int]] = {}
    for arch in archs:
        found.setdefault(narrowed(tile, problem, arch), []).append(arch)
    cases = [(one, compile_case(one, problem, tuple(those))) for one, those in found.items()]
    # what was narrowed is no tile that scripts/tune should try
    return [case if one == tile else replace(case, extra={**case.extra, "tile": None}) for one, case in cases]


def compile_case(tile: Tile, problem: Problem, archs: tuple[int, ...] = (90,)) -> CompileCase:
    """The compilation that :func:`weight_only_matmul` would launch for ``problem`` with ``tile`` on ``archs``.

    Raises:
        ValueError: the architectures would be launched with different constants.
    """
    constexprs = constants(problem, tile, archs[0], has_bias=True)
    if any(constants(problem, tile, arch, has_bias=True) != constexprs for arch in archs):
        raise ValueError(f"{tile} is not one compilation for all of {archs}")
    constexprs = {**constexprs, "PDL": tile.pdl}
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[problem.dtype]
    # nowhere else are registers so scarce: each of these on every architecture
    small = f" g{problem.group_size} m{tile.block_m}" if problem.group_size in (32, 64) else ""
    pointers = {
        "x_ptr": name,
        "tiles_ptr": "i32",
        "scales_ptr": name,
        "zeros_ptr": "u8",
        "bias_ptr": name,
        "out_ptr": name,
        "sums_ptr": "fp32",
        "partials_ptr": "fp32",
        "counters_ptr": "i32",
    }
    signature = {key: f"*{kind}" for key, kind in pointers.items()} | {"M": "i32", "N": "i32"}
    return CompileCase(
        name=f"{name} {problem.bits}b g{problem.group_size} {'asym' if problem.asymmetric else 'sym'} "
        f"m{tile.block_m} n{tile.block_n} split{tile.split_k} w{tile.num_warps} s{tile.num_stages}{' pdl' * tile.pdl}",
        kernel=weight_only_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, "N"),
        options=options(problem, tile),
        kind=f"triton {name} {problem.bits}{' wgmma' * (not constexprs['FOR_MMA'])}{' pdl' * tile.pdl}{small}",
        archs=archs,
        tokens=tile.block_m,
        wgmma=None if constexprs["FOR_MMA"] else "registers",
        registers_only=True,
        integer_budget=_integer_budget(tile.block_m, problem, constexprs["RAW"]),
        extra={"shared_bound": shared_bytes(tile, problem), "tile": tile},
    )


_BUDGETS = {
    2: {32: (2.45, 2.95), 64: (1.85, 2.0), 128: (1.85, 1.85)},
    4: {32: (2.55, 3.0), 64: (1.85, 1.95), 128: (1.55, 1.56)},
    8: {32: (3.3, 3.3), 64: (3.3, 3.3), 128: (2.6, 2.6)},
}
"""Integer instructions per weight by bits, group and symmetric or not, for up to 16 tokens."""


def _integer_budget(tokens: int, problem: Problem, raw: float) -> float:
    """Integer instructions per weight in the main loop at most: what the worst architecture needs, and a few percent.

    The conversion alone is 7/8 at 4 bits (a lop3 per pair, three shifts per four), at 8 bits 5/4 in bf16, in fp16 1/2
    where it is centred, else 1. The rest are addresses, scales and zeros: four times as many with groups of 32.
    """
    group = 128 if problem.group_size == -1 else problem.group_size
    few = 2.15 if (problem.bits, group) == (8, 128) and raw < 0 else _BUDGETS[problem.bits][group][problem.asymmetric]
    crowded = step_columns(problem.bits) // group >= 4
    return few * (1.0 if tokens <= 16 else (1.35 if crowded else 1.15) if tokens <= 32 else 2.4)

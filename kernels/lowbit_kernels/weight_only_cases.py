"""What of the Triton family is compiled ahead, without a GPU, by the tests: see cases.py."""

from __future__ import annotations

import torch

from .cases import ARCHITECTURES, CompileCase
from .tiles import PDL_ARCH, Problem, Tile, shared_bytes
from .weight_only import constants, weight_only_kernel

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
        (Tile("triton", 8, 128, 4, 4, 4), (90,), kinds[:2]),
        (Tile("triton", 8, 128, 4, 4, 4), tuple(arch for arch in ARCHITECTURES if arch != 90), kinds[:2]),
        (Tile("triton", 16, 64, 4, 2, 4), ARCHITECTURES, kinds),
        (Tile("triton", 16, 128, 4, 4, 4), (90,), kinds),
        (Tile("triton", 32, 128, 2, 8, 4), (90,), kinds),
        (Tile("triton", 64, 128, 1, 8, 3), (90,), kinds),
        (Tile("triton", 128, 128, 1, 8, 3), (90,), kinds[:1] + kinds[2:3]),
        (Tile("triton", 32, 128, 2, 4, 3), (80, 86, 89, 120), kinds),
        (Tile("triton", 64, 128, 1, 8, 3), (80, 86, 89, 120), kinds),
    ]
    overlapping = [
        (Tile("triton", 8, 64, 4, 2, 4, pdl=True), tuple(a for a in ARCHITECTURES if a >= PDL_ARCH), kinds[1:2])
    ]
    return [
        compile_case(tile, Problem(4 * tile.block_m, 4096, 8192, bits, group, dtype, asymmetric), archs)
        for tile, archs, weights in shapes + overlapping
        for bits, group, dtype, asymmetric in weights
    ]


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
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        kind=f"triton {name} {problem.bits}{' wgmma' * (not constexprs['FOR_MMA'])}{' pdl' * tile.pdl}",
        archs=archs,
        tokens=tile.block_m,
        wgmma=None if constexprs["FOR_MMA"] else "registers",
        registers_only=True,
        integer_budget=_integer_budget(tile.block_m, problem, constexprs["RAW"]),
        extra={"shared_bound": shared_bytes(tile, problem), "tile": tile},
    )


def _integer_budget(tokens: int, problem: Problem, raw: float) -> float:
    """Integer instructions per weight in the main loop at most: what the worst architecture needs, and a few percent.

    The conversion alone is 7/8 at 4 bits (a lop3 per pair, three shifts per four), at 8 bits 5/4 in bf16, in fp16 1/2
    where it is centred, else 1.
    """
    small_groups = problem.group_size in (32, 64)
    eight = 3.3 if small_groups else 2.5 if raw > 0 else 2.1
    few = {2: 1.85, 4: 1.85 if small_groups else 1.55, 8: eight}[problem.bits]
    return few * (1.0 if tokens <= 16 else 1.07 if tokens <= 32 else 2.4)

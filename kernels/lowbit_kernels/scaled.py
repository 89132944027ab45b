"""Fused matmul for many tokens on sm_90, in Gluon: the ``scaled`` family, scales in the weights, sums untouched.

Same arguments as weight_only.py, for 33 tokens and more (it runs with any number), 4 and 8 bits, K a multiple of 8 and
any N. The families that scale in fp32 pay for it once per output and group, and keep two sets of sums in registers,
which ends at 64 tokens by 256 rows of a multiprocessor. Here the register operand of wgmma is

    w16[n, k] = (code - zero) * (scale * fw[n])     in float16: exact, times a rounded scale's value, rounded once
    out[m, n] = acc[m, n] / fw[n] / fx[m] + bias[n] in fp32, rounded once

so one set of sums runs through all of K, and tiles are 128 tokens by 256 rows: 2.7 instructions per weight, in the time
of whose products a multiprocessor issues 8. fw and fx are powers of two (halves.py, ``fp32_sums``): with them nothing
leaves float16's range, whatever scales and bf16 activations are. With one scale per row there is nothing to fold:
``code - zero`` is exact and the scale is applied at the end.

Numerics: weights are rounded to 11 bits, as cuBLAS' operands must be: 0.2e-3 relative RMS, beside the result's 1.66e-3
(bf16) or 0.2e-3 (fp16). A bf16 scale has 8 bits and a symmetric 4-bit code is at most 8, so those weights are exact.
Sums are in fp32 in the order of k within a segment; scaled_plan.py says how programs share what does not fill the GPU,
and in which order their sums are added. Importing this module needs no GPU and no Gluon; :func:`scaled_matmul` needs
both.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cases import CompileCase
from .epilogue import workspace
from .halves import to_halves
from .hopper import (
    NAMES,
    check_hopper,
    descriptor_types,
    descriptors,
    gluon_language,
    integer_budget,
    register_layouts,
)
from .overlap import launch_options
from .releases import gluon_missing
from .scaled_plan import scaled_blocks, scaled_shared_bytes, schedule
from .tiles import Problem, Tile, cdiv

__all__ = ["compile_case", "compile_cases", "multiprocessors", "scaled_matmul"]

SHIPPED = (
    Tile("scaled", 64, 128, 1, 8, 8),
    Tile("scaled", 64, 256, 1, 8, 6),
    Tile("scaled", 128, 128, 1, 8, 5),
    Tile("scaled", 128, 256, 1, 8, 4),
)
"""The shapes that are compiled without a GPU. Split_k and num_stages may be others, within scaled_why_not."""


def scaled_matmul(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    tile: Tile,
) -> Tensor:
    """``x (M, K) @ W.T + bias`` for a packed ``W (n, K)``; shapes and dtypes as in weight_only.py.

    Args:
        bits: 4 or 8.
        group_size: 32, 64, 128, or -1 for the whole row.
        n: rows of the weight: those of ``tiles`` are padded.
        tile: of family ``scaled``; its split_k is how many programs, in the mean, share a tile of the last round.

    Returns:
        ``(M, n)`` in x's dtype, on x's device.

    Raises:
        ValueError: arguments contradict the table, start at an address that the copy engine does not take (x, tiles,
            scales, zeros: 16 bytes), the GPU is not sm_90, or the tile does not fit.
        RuntimeError: this Triton has no Gluon.
    """
    problem = Problem(x.shape[0], n, x.shape[-1], bits, group_size, x.dtype, zeros is not None)
    check_hopper(x, tiles, scales, zeros, bias, problem, tile, "scaled")
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
            _launch(x, tiles, scales, zeros, bias, out, problem, tile)
    return out


def _launch(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    problem: Problem,
    tile: Tile,
) -> None:
    gluon_language()
    from .scaled_kernel import scaled_kernel

    constexprs = _constants(problem, tile, has_bias=bias is not None)
    x16, tokens, rows = x, scales, scales  # the last two: arguments that the kernel does not read
    if problem.group_size != -1 or constexprs["HAS_TOKENS"]:
        wide = x if constexprs["HAS_TOKENS"] else None
        narrow, factors, rows = to_halves(wide, scales, problem.bits, fp32_sums=True, pdl=tile.pdl)
        if narrow is not None and factors is not None:
            x16, tokens = narrow, factors[1]
    count = cdiv(problem.m, tile.block_m) * cdiv(problem.n, tile.block_n)
    programs, left, sharers = schedule(count, cdiv(problem.k, 128), tile.split_k, multiprocessors(x.device))
    partials, counters = _workspace(programs, left if sharers > left else 0, tile, x.device)
    scaled_kernel[(programs,)](
        *descriptors(x16, tiles, scales, zeros, problem, tile),
        tiles,
        scales,
        scales if zeros is None else zeros,
        rows,
        tokens,
        scales if bias is None else bias,
        out,
        partials,
        counters,
        M=problem.m,
        N=problem.n,
        K=problem.k,
        sharers=sharers,
        **constexprs,
        num_warps=4,
        **launch_options(tile.pdl),
    )


def _workspace(programs: int, left: int, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two places for fp32 sums per program, and two counters, zero, per left tile.

    Nearly nothing where no tile is shared, but of the same types: how many tokens there are changes no compilation.
    """
    size = tile.block_n * tile.block_m if left else 1
    partials = torch.empty(2 * programs, size, dtype=torch.float32, device=device)
    return partials, workspace(max(1, 2 * left), 1, 0, device)[1]


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device: as many programs stay on it."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _constants(problem: Problem, tile: Tile, has_bias: bool) -> dict[str, Any]:
    """Constexpr arguments of the kernel.

    What the consumers leave the producer (504 registers in all) must do for its copies, of which groups of 32 need
    most.
    """
    piece_columns, look = _pieces(problem, tile)
    unit, words = register_layouts()
    return {
        "BITS": problem.bits,
        "GROUP": problem.group_size,
        "HAS_ZEROS": problem.asymmetric,
        "HAS_TOKENS": problem.dtype != torch.float16,
        "HAS_BIAS": has_bias,
        "BLOCK_M": tile.block_m,
        "BLOCKS": scaled_blocks(tile),
        "STAGES": tile.num_stages,
        "PIECE_COLUMNS": piece_columns,
        "LOOK": look,
        "CONSUMER_REGISTERS": 232 if problem.group_size == 32 else 240,
        "UNIT": unit,
        "WORDS": words,
        "PDL": tile.pdl,
    }


def _pieces(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Columns of a piece, and how many pieces ahead its words are loaded: what converts most while products run.

    Read off the machine code (kernels/README.md). 256 sums per lane leave registers for neither, small groups on two
    blocks of rows not for words that wait; and a step must be two pieces at least (C7513).
    """
    wide = scaled_blocks(tile) == 2
    if wide and (tile.block_m == 128 or problem.group_size in (32, 64)):
        return 64, 1
    return 128 if wide and problem.bits == 4 and problem.group_size == 128 else 64, 2


def compile_case(tile: Tile, problem: Problem) -> CompileCase:
    """The compilation that :func:`scaled_matmul` would launch for ``problem`` with ``tile``, scales in x's dtype."""
    gluon_language()
    from .scaled_kernel import scaled_kernel

    constexprs = _constants(problem, tile, has_bias=True)
    name = NAMES[problem.dtype]
    pointers = {
        "tiles_ptr": "i32",
        "scales_ptr": name,
        "zeros_ptr": "u8" if problem.asymmetric else name,
        "rows_ptr": "fp32",
        "tokens_ptr": "fp32",
        "bias_ptr": name,
        "out_ptr": name,
        "partials_ptr": "fp32",
        "counters_ptr": "i32",
    }
    integers = dict.fromkeys(("M", "N", "K", "sharers"), "i32")
    signature = descriptor_types(problem, tile, "fp16") | {key: f"*{kind}" for key, kind in pointers.items()} | integers
    kind = "asym" if problem.asymmetric else "sym"
    return CompileCase(
        name=f"{name} {problem.bits}b g{problem.group_size} {kind} {tile}",
        kernel=scaled_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, "N", "K"),
        options={"num_warps": 4},
        kind=f"scaled {name} {problem.bits}",
        archs=(90,),
        tokens=tile.block_m,
        mma_warps=tile.num_warps,
        wgmma="registers",
        registers_only=True,
        integer_budget=integer_budget(problem),
        wide_copies=False,  # the copies are in the producer's loop
        extra={"tile": tile, "shared_bound": scaled_shared_bytes(tile, problem)},
    )


def compile_cases() -> list[CompileCase]:
    """Every shape of tile, and for the widest each kind of weight. None where Triton has no Gluon for them."""
    if gluon_missing() is not None:
        return []
    fp16, bf16 = torch.float16, torch.bfloat16
    _, few, half, many = SHIPPED
    eight, few_eight = Tile("scaled", 128, 256, 1, 8, 3), Tile("scaled", 64, 256, 1, 8, 4)
    kinds: list[tuple[Tile, int, int, torch.dtype, bool]] = [
        (replace(many, pdl=True), 4, 128, fp16, True),
        (many, 4, -1, bf16, True),
        (few, 4, 64, bf16, True),
        (eight, 4, 32, bf16, True),
        (eight, 8, 128, bf16, False),
        (eight, 8, 128, fp16, True),
        (few_eight, 8, 128, bf16, False),
        (few_eight, 8, 32, bf16, True),
        (eight, 8, -1, bf16, False),
        (Tile("scaled", 64, 128, 1, 8, 6), 8, 128, bf16, False),
        (replace(half, num_stages=4), 8, 128, bf16, False),
    ]
    return [
        compile_case(tile, Problem(4 * tile.block_m, 4096, 4096, bits, group, dtype, asymmetric))
        for tile, bits, group, dtype, asymmetric in [(tile, 4, 128, bf16, False) for tile in SHIPPED] + kinds
    ]

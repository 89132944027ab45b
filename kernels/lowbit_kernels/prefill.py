"""The ``dequant`` family: for many tokens, unpack a chunk of weight rows and let cuBLAS multiply while it is in the L2.

Tensors are those of weight_only.py. A chunk is as many rows as fill CHUNK_BYTES in x's dtype, so that the unpacked
weights are written to and read from the second-level cache (50 MB on an H100) and memory sees the packed ones only.
Every chunk's product goes straight to its columns of the result.

Numerics: each weight ``(code - zero) * scale`` is computed in fp32 and rounded once to float16, which the fused
families do not do; sums are cuBLAS's, in fp32 whatever torch's setting for fp16 is. With fp16 activations cuBLAS adds
the bias before it rounds the result, and the rounding of weights adds about as much error as that of the result: expect
sqrt(2) of a fused family's. With bf16 ones they and the weights go through powers of two to float16 and the result
comes back (halves.py): in bf16 itself the weights' rounding would be eight times as coarse, and the sum of both 2.1e-3
to 2.4e-3 instead of 1.7e-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase
from .halves import to_halves, widen
from .layout import tiles_shape, unit_columns
from .operands import of_run, step_scales, word_offsets
from .overlap import launch_options
from .tiles import Problem, cdiv, run_columns
from .unpack import conversion, raw_offset, unpack_columns

__all__ = ["CHUNK_BYTES", "chunk_rows", "compile_cases", "dequantize_rows", "dequantized_matmul"]

CHUNK_BYTES = 24 << 20
"""Half of an H100's L2: the other half is for x, the result and the packed words."""
BLOCK_N = 64


@triton.jit
def _dequantize_kernel(
    tiles_ptr,  # (ceil(N / 16), UNITS, 16, 16)
    scales_ptr,  # (G, N)
    zeros_ptr,  # (G, N), unused unless HAS_ZEROS
    factors_ptr,  # (N,) fp32, unused unless HAS_FACTORS
    out_ptr,  # (rows, K)
    N,
    first_row,
    rows,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    RAW: tl.constexpr,
    PTX: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows of one unit's columns, from first_row on: ``(code - zero) * scale * factor``, rounded once."""
    COLUMNS: tl.constexpr = 512 // BITS
    RUNS: tl.constexpr = COLUMNS // RUN
    SCALES: tl.constexpr = 1 if GROUP == -1 else RUNS
    LAST: tl.constexpr = 0 if GROUP == -1 else K // GROUP - 1
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    unit = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * BLOCK_N
    words = tl.load(tiles_ptr + word_offsets(first_row + row, N, UNITS, BLOCK_N) + unit.to(tl.int64) * 256)
    scales = step_scales(scales_ptr, unit, N, first_row + row, LAST, GROUP, RUN, SCALES, BLOCK_N)
    zeros = scales
    if HAS_ZEROS:
        zeros = step_scales(zeros_ptr, unit, N, first_row + row, LAST, GROUP, RUN, SCALES, BLOCK_N)
    mine = row + tl.arange(0, BLOCK_N)
    if HAS_FACTORS:
        factors = tl.load(factors_ptr + tl.minimum(first_row + mine, N - 1))
    for run in tl.static_range(RUNS):
        values = unpack_columns(words, run * (RUN // 32), RUN // 32, BITS, DTYPE, RAW, PTX, False).to(tl.float32)
        if HAS_ZEROS:
            values -= (of_run(zeros, run if SCALES > 1 else 0, SCALES) - MIDDLE)[:, None]
        values *= of_run(scales, run if SCALES > 1 else 0, SCALES)[:, None]
        if HAS_FACTORS:
            values *= factors[:, None]
        columns = unit * COLUMNS + run * RUN + tl.arange(0, RUN)
        ptrs = out_ptr + mine[:, None] * K + columns[None, :]
        tl.store(ptrs, values.to(DTYPE), mask=(mine < rows)[:, None] & (columns < K)[None, :])


def chunk_rows(n: int, k: int, itemsize: int = 2) -> int:
    """Rows per chunk: chunks of equal size up to a multiple of 128, none above CHUNK_BYTES unless one block is."""
    chunks = cdiv(n * k * itemsize, CHUNK_BYTES)
    whole = max(128, CHUNK_BYTES // (k * itemsize) // 128 * 128)
    return min(whole, cdiv(cdiv(n, chunks), 128) * 128)


def dequantize_rows(
    out: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    first: int,
    *,
    bits: int,
    group_size: int,
    factors: Tensor | None = None,
) -> None:
    """Write rows ``first .. first + R`` of the weight to ``out (R, K)``, contiguous, of the dtype wanted.

    Args:
        factors: (N,) fp32, contiguous: what each row is multiplied by; None: nothing.
    """
    n, (rows, k) = scales.shape[1], out.shape
    interpreted = bool(triton.knobs.runtime.interpret)
    _dequantize_kernel[(cdiv(k, unit_columns(bits)), cdiv(rows, BLOCK_N))](
        tiles,
        scales,
        scales if zeros is None else zeros,
        scales if factors is None else factors,
        out,
        N=n,
        first_row=first,
        rows=rows,
        **_constants(bits, group_size, n, k, out.dtype, zeros is not None, factors is not None, interpreted),
        num_warps=4,
        **launch_options(),
    )


def dequantized_matmul(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
) -> Tensor:
    """``x (M, K) @ W.T + bias``, arguments as for ``weight_only_matmul``, which has checked them."""
    m = x.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    with torch.cuda.device_of(x):
        if x.dtype == torch.bfloat16:
            _through_halves(out, x, tiles, scales, zeros, bias, bits=bits, group_size=group_size)
        else:
            _multiply(out, x, tiles, scales, zeros, bias, bits=bits, group_size=group_size)
    return out


def _multiply(
    out: Tensor,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> None:
    chunks = _chunks(tiles, scales, zeros, x.shape[1], x.dtype, bits=bits, group_size=group_size)
    for rows, chunk in chunks:
        with fp32_sums():
            if bias is None:
                torch.mm(x, chunk.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows].to(x.dtype), x, chunk.t(), out=out[:, rows])


def _through_halves(
    out: Tensor,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> None:
    """The same in float16, halves.py; ``out`` of a 16-bit dtype, whose memory holds the float16 sums in between."""
    x16, token_factors, weight_factors = to_halves(x, scales, bits, fp32_sums=False)
    assert x16 is not None and token_factors is not None
    sums = out.view(torch.float16)
    chunks = _chunks(
        tiles, scales, zeros, x.shape[1], sums.dtype, bits=bits, group_size=group_size, factors=weight_factors[0]
    )
    for rows, chunk in chunks:
        with fp32_sums():
            torch.mm(x16, chunk.t(), out=sums[:, rows])
        own_bias = None if bias is None else bias[rows]
        widen(sums[:, rows], out[:, rows], token_factors[1], weight_factors[1, rows], own_bias)


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """Within it cuBLAS adds shares of fp16 products in fp32; torch's default lets it add them in fp16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def _chunks(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    *,
    bits: int,
    group_size: int,
    factors: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype``, a chunk after the other in the same memory: its rows, and their values ``(R, K)``."""
    n = scales.shape[1]
    most = min(n, chunk_rows(n, k, dtype.itemsize))
    buffer = torch.empty(most, k, dtype=dtype, device=scales.device)
    for first in range(0, n, most):
        rows = slice(first, min(first + most, n))
        chunk = buffer[: rows.stop - first]
        dequantize_rows(chunk, tiles, scales, zeros, first, bits=bits, group_size=group_size, factors=factors)
        yield rows, chunk


def _constants(
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    asymmetric: bool,
    factors: bool,
    interpreted: bool,
) -> dict[str, object]:
    return {
        "K": k,
        "UNITS": tiles_shape(n, k, bits)[1],
        "BITS": bits,
        "GROUP": group_size,
        "RUN": run_columns(bits, group_size),
        "RAW": raw_offset(bits, dtype, centred=True),
        "PTX": "" if interpreted else conversion(bits, dtype, centred=True),
        "HAS_ZEROS": asymmetric,
        "HAS_FACTORS": factors,
        "BLOCK_N": BLOCK_N,
    }


def compile_cases() -> list[CompileCase]:
    """The dequantizing kernel for activations of both dtypes and for groups of one and of several runs."""
    return [
        _case(Problem(4096, 4096, 4096, bits, group, dtype, asymmetric))
        for bits, group, dtype, asymmetric in (
            (4, 128, torch.bfloat16, False),
            (4, 64, torch.float16, True),
            (8, 128, torch.bfloat16, True),
            (2, 128, torch.bfloat16, False),
        )
    ]


def _case(problem: Problem) -> CompileCase:
    bits, group, dtype = problem.bits, problem.group_size, problem.dtype
    constexprs = _constants(
        bits, group, problem.n, problem.k, torch.float16, problem.asymmetric, dtype == torch.bfloat16, False
    )
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    pointers = {"tiles_ptr": "*i32", "scales_ptr": f"*{name}", "zeros_ptr": "*u8"}
    pointers |= {"factors_ptr": "*fp32", "out_ptr": "*fp16"}
    integers = {"N": "i32", "first_row": "i32", "rows": "i32"}
    return CompileCase(
        name=f"dequantize {name} {bits}b g{group} {'asym' if problem.asymmetric else 'sym'}",
        kernel=_dequantize_kernel,
        signature=pointers | integers | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, *integers),
        options={"num_warps": 4},
        kind=f"dequant {name}",
        wide_copies=False,
    )

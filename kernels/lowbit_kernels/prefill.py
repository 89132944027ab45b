"""The ``dequant`` family: for many tokens, unpack a chunk of weight rows and let cuBLAS multiply while it is in the L2.

Tensors are those of weight_only.py. A chunk is as many rows as fill CHUNK_BYTES in x's dtype, so that the unpacked
weights are written to and read from the second-level cache (50 MB on an H100) and memory sees the packed ones only.
Every chunk's product goes straight to its columns of the result.

Numerics: each weight ``(code - zero) * scale`` is computed in fp32 and rounded once to x's dtype, which the fused
families do not do; sums are cuBLAS's, in fp32; the bias is added by cuBLAS before the rounding of the result. The
rounding of weights adds about as much error as that of the result, so expect sqrt(2) of a fused family's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase
from .layout import tiles_shape, unit_columns
from .operands import of_run, step_scales, word_offsets
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
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows of one unit's columns, from first_row on: ``(code - zero) * scale``, rounded once."""
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
    for run in tl.static_range(RUNS):
        values = unpack_columns(words, run * (RUN // 32), RUN // 32, BITS, DTYPE, RAW, PTX, False).to(tl.float32)
        if HAS_ZEROS:
            values -= (of_run(zeros, run if SCALES > 1 else 0, SCALES) - MIDDLE)[:, None]
        values *= of_run(scales, run if SCALES > 1 else 0, SCALES)[:, None]
        columns = unit * COLUMNS + run * RUN + tl.arange(0, RUN)
        ptrs = out_ptr + mine[:, None] * K + columns[None, :]
        tl.store(ptrs, values.to(DTYPE), mask=(mine < rows)[:, None] & (columns < K)[None, :])


def chunk_rows(n: int, k: int, itemsize: int = 2) -> int:
    """Rows per chunk: chunks of equal size up to a multiple of 128, none above CHUNK_BYTES unless one block is."""
    chunks = cdiv(n * k * itemsize, CHUNK_BYTES)
    whole = max(128, CHUNK_BYTES // (k * itemsize) // 128 * 128)
    return min(whole, cdiv(cdiv(n, chunks), 128) * 128)


def dequantize_rows(
    out: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, first: int, *, bits: int, group_size: int
) -> None:
    """Write rows ``first .. first + R`` of the weight to ``out (R, K)``, contiguous, of the dtype wanted."""
    n, (rows, k) = scales.shape[1], out.shape
    interpreted = bool(triton.knobs.runtime.interpret)
    _dequantize_kernel[(cdiv(k, unit_columns(bits)), cdiv(rows, BLOCK_N))](
        tiles,
        scales,
        scales if zeros is None else zeros,
        out,
        N=n,
        first_row=first,
        rows=rows,
        **_constants(bits, group_size, n, k, out.dtype, zeros is not None, interpreted),
        num_warps=4,
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
    m, k = x.shape
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    rows = min(n, chunk_rows(n, k, x.element_size()))
    buffer = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        for first in range(0, n, rows):
            count = min(rows, n - first)
            chunk, part = buffer[:count], out[:, first : first + count]
            dequantize_rows(chunk, tiles, scales, zeros, first, bits=bits, group_size=group_size)
            if bias is None:
                torch.mm(x, chunk.t(), out=part)
            else:
                torch.addmm(bias[first : first + count].to(x.dtype), x, chunk.t(), out=part)
    return out


def _constants(
    bits: int, group_size: int, n: int, k: int, dtype: torch.dtype, asymmetric: bool, interpreted: bool
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
        "BLOCK_N": BLOCK_N,
    }


def compile_cases() -> list[CompileCase]:
    """The dequantizing kernel for both dtypes and for groups of one and of several runs."""
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
    constexprs = _constants(bits, group, problem.n, problem.k, dtype, problem.asymmetric, False)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    pointers = {"tiles_ptr": "*i32", "scales_ptr": f"*{name}", "zeros_ptr": "*u8", "out_ptr": f"*{name}"}
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

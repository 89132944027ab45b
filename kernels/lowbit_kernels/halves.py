"""bfloat16 activations through a float16 matmul: powers of two that make them, the weights and the results fit.

The ``dequant`` family (prefill.py) unpacks weights and lets cuBLAS multiply. In bf16 that rounds twice to 8 bits, the
weight and the result: 1.66e-3 and 1.3e-3 to 1.7e-3 relative RMS, together 2.1e-3 to 2.4e-3. In fp16, 11 bits, all but
the result's own rounding nearly vanish (1.69e-3 together), if nothing leaves float16's range. So every token is
multiplied by a power of two and every weight row by another, exactly, and the result is divided by both:

    x16[m, k] = x[m, k] * fx[m]      with  2**(17 - e) <= max_k |x16| < 2**(18 - e),  e = ceil(log2(K))
    w16[n, k] = W[n, k] * fw[n]      with                 max_k |w16| < 2**-3
    out[m, n] = acc16[m, n] / fx[m] / fw[n] + bias[n]    and |acc16| <= K * 2**(18 - e) * 2**-3 <= 2**15

x is exact in float16 down to 2**-22 of the token's largest for any K that a model has, and off by at most 2**-25 below.
Where nothing rounds the sums to float16 (the ``scaled`` family, scaled.py), x16 and w16 are in 2**14 .. 2**15 instead.

| tensor  | shape    | dtype      |                                                        |
|---------|----------|------------|--------------------------------------------------------|
| x       | (M, K)   | bf16, fp16 | contiguous                                             |
| x16     | (M, K)   | fp16       | contiguous                                             |
| factors | (2, M padded), (2, N) | fp32 | fx or fw, and its reciprocal: both powers of two  |
| part    | (M, R)   | fp16 in, x's dtype out, the same memory | columns of out, row stride N      |

Not a number: an infinity or NaN in a token gives infinities or NaN in its row of the result and nowhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import ARCHITECTURES, CompileCase
from .overlap import launch_options, let_next_begin, wait_for_previous
from .tiles import cdiv

__all__ = ["compile_cases", "to_halves", "widen"]

ROW_EXPONENT = -4
"""A row's largest weight is below 2 ** (ROW_EXPONENT + 1)."""
TOKEN_EXPONENT = 17
ROOM = 14
"""Of x and weights whose sums stay in fp32: the largest are in 2**14 .. 2**15, float16 ends at 2**16."""
PADDING = 128
"""Factors of tokens are as many as a multiple of it: kernels read those of whole tiles. What is past M is anything."""
LONGEST = 1 << 15
MOST, MOST_SCALES = 256, 4096
"""Groups, and groups times rows, of a program."""
BLOCK_M, BLOCK_N = 16, 256


@triton.jit
def _factor(top, EXPONENT: tl.constexpr):
    """Powers of two (f, 1 / f) in fp32 with ``2**EXPONENT <= f * top < 2**(EXPONENT + 1)``, where fp32 has them."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 0xFF
    biased = tl.minimum(tl.maximum(254 + EXPONENT - exponent, 1), 253)
    return (biased << 23).to(tl.float32, bitcast=True), ((254 - biased) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _finite(values):
    """Absolute values; infinity for what is not a number, which would compare false."""
    INFINITY: tl.constexpr = float("inf")
    size = tl.abs(values)
    return tl.where(size < INFINITY, size, INFINITY)


@triton.jit
def _narrow_token(
    x_ptr, x16_ptr, factors_ptr, token, padded, K: tl.constexpr, EXPONENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: read once where a block holds it, else twice."""
    token = token.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    tops = _finite(x)
    for start in tl.range(BLOCK, K, BLOCK):
        more = tl.load(x_ptr + token * K + start + columns, mask=start + columns < K, other=0.0)
        tops = tl.maximum(tops, _finite(more.to(tl.float32)))
    factor, inverse = _factor(tl.max(tops, axis=0), EXPONENT)
    tl.store(x16_ptr + token * K + columns, (x * factor).to(tl.float16), mask=columns < K)
    for start in tl.range(BLOCK, K, BLOCK):
        inside = start + columns < K
        more = tl.load(x_ptr + token * K + start + columns, mask=inside, other=0.0)
        tl.store(x16_ptr + token * K + start + columns, (more.to(tl.float32) * factor).to(tl.float16), mask=inside)
    tl.store(factors_ptr + token, factor)
    tl.store(factors_ptr + padded + token, inverse)


@triton.jit
def _row_factors(
    scales_ptr, factors_ptr, block, N, G: tl.constexpr, TOP: tl.constexpr, EXPONENT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows; no |code - zero| is larger than TOP."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK_G, BLOCK), dtype=tl.float32)
    for first in tl.range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        ptrs = scales_ptr + groups.to(tl.int64)[:, None] * N + rows[None, :]
        inside = (groups < G)[:, None] & (rows < N)[None, :]
        tops = tl.maximum(tops, _finite(tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)))
    factor, inverse = _factor(tl.max(tops, axis=0) * TOP, EXPONENT)
    tl.store(factors_ptr + rows, factor, mask=rows < N)
    tl.store(factors_ptr + N + rows, inverse, mask=rows < N)


@triton.jit(do_not_specialize=["TOKENS", "PADDED"])
def to_halves_kernel(
    x_ptr,  # (M, K), unused when TOKENS is 0
    x16_ptr,  # (M, K), likewise
    tokens_ptr,  # (2, PADDED), likewise
    scales_ptr,  # (G, N)
    rows_ptr,  # (2, N)
    TOKENS,  # M, or 0: no tokens are narrowed
    PADDED,  # M up to a multiple of PADDING
    N,
    K: tl.constexpr,  # a model has few K and G
    G: tl.constexpr,
    TOP: tl.constexpr,
    TOKEN_EXPONENT: tl.constexpr,
    ROW_EXPONENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token, or BLOCK_ROWS rows, per program."""
    program = tl.program_id(0)
    if PDL:
        wait_for_previous()
        let_next_begin()
    if program < TOKENS:
        _narrow_token(x_ptr, x16_ptr, tokens_ptr, program, PADDED, K, TOKEN_EXPONENT, BLOCK_K)
    else:
        _row_factors(scales_ptr, rows_ptr, program - TOKENS, N, G, TOP, ROW_EXPONENT, BLOCK_G, BLOCK_ROWS)


@triton.jit
def widen_kernel(
    part_ptr,  # (M, ROWS) fp16, row stride N
    out_ptr,  # the same memory, in the result's dtype
    tokens_ptr,  # (M,) 1 / fx
    rows_ptr,  # (ROWS,) 1 / fw
    bias_ptr,  # (ROWS,), unused unless HAS_BIAS
    M,
    N,
    ROWS,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A (BLOCK_M, BLOCK_N) tile per program: every element is read and written by one thread."""
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (tokens < M)[:, None] & (rows < ROWS)[None, :]
    place = tokens[:, None] * N + rows[None, :]
    sums = tl.load(part_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sums *= tl.load(tokens_ptr + tokens, mask=tokens < M, other=1.0)[:, None]
    sums *= tl.load(rows_ptr + rows, mask=rows < ROWS, other=1.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=rows < ROWS, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=inside)


def to_halves(
    x: Tensor | None, scales: Tensor, bits: int, *, fp32_sums: bool, pdl: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``(x16, token_factors, row_factors)`` of activations ``x (M, K)`` and a weight's scales ``(G, N)``: one launch.

    See the module's table. Without x the first two are None. On the tensors' device, which must be current.

    Args:
        fp32_sums: the sums are never rounded to float16, so x and weights may take all of its range (ROOM).
        pdl: launched to begin while the kernel before ends (overlap.py).
    """
    groups, n = scales.shape
    m, k = (0, 1) if x is None else x.shape
    rows = torch.empty(2, n, dtype=torch.float32, device=scales.device)
    x16 = None if x is None else torch.empty(m, k, dtype=torch.float16, device=x.device)
    padded = cdiv(m, PADDING) * PADDING
    tokens = None if x is None else torch.empty(2, padded, dtype=torch.float32, device=x.device)
    constants = _constants(k, groups, bits, fp32_sums)
    to_halves_kernel[(m + cdiv(n, constants["BLOCK_ROWS"]),)](
        scales if x is None else x, rows if x16 is None else x16, rows if tokens is None else tokens, scales, rows,
        TOKENS=m, PADDED=padded, N=n, **constants, PDL=pdl, num_warps=_warps(k), **launch_options(pdl),
    )  # fmt: skip
    return x16, tokens, rows


def widen(part: Tensor, out: Tensor, tokens: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """Turn the float16 sums ``part (M, R)`` into the results ``out (M, R)``, the same memory seen as another dtype.

    Args:
        tokens, rows: ``1 / fx`` (M,) and ``1 / fw`` (R,).
        bias: (R,) or None.
    """
    m, count = part.shape
    widen_kernel[(cdiv(count, BLOCK_N), cdiv(m, BLOCK_M))](
        part, out, tokens, rows, tokens if bias is None else bias, M=m, N=part.stride(0), ROWS=count,
        HAS_BIAS=bias is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8, **launch_options(),
    )  # fmt: skip


def _constants(k: int, groups: int, bits: int, fp32_sums: bool) -> dict[str, int]:
    """A program has all its loads under way at once: up to LONGEST columns of a token, or MOST scales."""
    block_g = min(MOST, 1 << (groups - 1).bit_length())
    return {
        "K": k,
        "G": groups,
        "TOP": 2**bits,
        "TOKEN_EXPONENT": ROOM if fp32_sums else TOKEN_EXPONENT - (k - 1).bit_length(),
        "ROW_EXPONENT": ROOM if fp32_sums else ROW_EXPONENT,
        "BLOCK_K": min(LONGEST, max(2048, 1 << (k - 1).bit_length())),
        "BLOCK_G": block_g,
        "BLOCK_ROWS": max(16, MOST_SCALES // block_g),
    }


def _warps(k: int) -> int:
    return 8 if k <= 8192 else 16


def compile_cases() -> list[CompileCase]:
    """The two kernels as bf16 activations take them, for ``dequant`` and, with a long K, for ``scaled``."""
    pointers = {"x_ptr": "bf16", "x16_ptr": "fp16", "tokens_ptr": "fp32", "scales_ptr": "bf16", "rows_ptr": "fp32"}
    blocks = {"HAS_BIAS": True, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return [
        *(
            _case(
                f"to_halves k{k}",
                to_halves_kernel,
                pointers,
                ("TOKENS", "PADDED", "N"),
                {**_constants(k, k // 128, 4, sums), "PDL": sums},
                _warps(k),
                (90,) if sums else ARCHITECTURES,
            )
            for k, sums in ((4096, False), (28672, True))
        ),
        _case(
            "widen",
            widen_kernel,
            {"part_ptr": "fp16", "out_ptr": "bf16", "tokens_ptr": "fp32", "rows_ptr": "fp32", "bias_ptr": "bf16"},
            ("M", "N", "ROWS"),
            blocks,
            8,
        ),
    ]


def _case(
    name: str,
    kernel: object,
    pointers: dict[str, str],
    integers: tuple[str, ...],
    constexprs: dict[str, int],
    warps: int,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> CompileCase:
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, *integers),
        options={"num_warps": warps},
        kind=name.split()[0],
        archs=archs,
        wide_copies=False,
    )

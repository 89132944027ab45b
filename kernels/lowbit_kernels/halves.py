"""bfloat16 activations through a float16 matmul: powers of two that make them, the weights and the results fit.

The ``dequant`` family (prefill.py) unpacks weights and lets cuBLAS multiply. In bf16 that rounds twice to 8 bits, the
weight and the result: 1.66e-3 and 1.3e-3 to 1.7e-3 relative RMS, together 2.1e-3 to 2.4e-3. In fp16, 11 bits, all but
the result's own rounding nearly vanish (1.69e-3 together), if nothing leaves float16's range. So every token is
multiplied by a power of two and every weight row by another, exactly, and the result is divided by both:

    x16[m, k] = x[m, k] * fx[m]      with  2**(17 - e) <= max_k |x16| < 2**(18 - e),  e = ceil(log2(K))
    w16[n, k] = W[n, k] * fw[n]      with                 max_k |w16| < 2**-3
    out[m, n] = acc16[m, n] / fx[m] / fw[n] + bias[n]    and |acc16| <= K * 2**(18 - e) * 2**-3 <= 2**15

x is exact in float16 down to 2**-22 of the token's largest for any K that a model has, and off by at most 2**-25 below.

| tensor  | shape    | dtype      |                                                        |
|---------|----------|------------|--------------------------------------------------------|
| x       | (M, K)   | bf16, fp16 | contiguous                                             |
| x16     | (M, K)   | fp16       | contiguous                                             |
| factors | (2, M) and (2, N) | fp32 | fx or fw, and its reciprocal: both powers of two      |
| part    | (M, R)   | fp16 in, x's dtype out, the same memory | columns of out, row stride N      |

Not a number: an infinity or NaN in a token gives infinities or NaN in its row of the result and nowhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import CompileCase
from .tiles import cdiv

__all__ = ["compile_cases", "narrow_tokens", "row_factors", "widen"]

ROW_EXPONENT = -4
"""A row's largest weight is below 2 ** (ROW_EXPONENT + 1)."""
TOKEN_EXPONENT = 17
BLOCK_K = 2048
BLOCK_G, BLOCK_ROWS = 8, 128
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
def narrow_tokens_kernel(
    x_ptr,  # (M, K)
    x16_ptr,  # (M, K)
    factors_ptr,  # (2, M)
    M,
    K: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK):
        x = tl.load(x_ptr + token * K + start + columns, mask=start + columns < K, other=0.0)
        tops = tl.maximum(tops, _finite(x.to(tl.float32)))
    factor, inverse = _factor(tl.max(tops, axis=0), EXPONENT)
    for start in tl.range(0, K, BLOCK):
        inside = start + columns < K
        x = tl.load(x_ptr + token * K + start + columns, mask=inside, other=0.0)
        tl.store(x16_ptr + token * K + start + columns, (x.to(tl.float32) * factor).to(tl.float16), mask=inside)
    tl.store(factors_ptr + token, factor)
    tl.store(factors_ptr + M + token, inverse)


@triton.jit
def row_factors_kernel(
    scales_ptr,  # (G, N)
    factors_ptr,  # (2, N)
    N,
    G: tl.constexpr,  # a model has few
    TOP: tl.constexpr,  # no |code - zero| is larger
    EXPONENT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows per program."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK_G, BLOCK), dtype=tl.float32)
    for first in tl.range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        ptrs = scales_ptr + groups.to(tl.int64)[:, None] * N + rows[None, :]
        inside = (groups < G)[:, None] & (rows < N)[None, :]
        tops = tl.maximum(tops, _finite(tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)))
    factor, inverse = _factor(tl.max(tops, axis=0) * TOP, EXPONENT)
    tl.store(factors_ptr + rows, factor, mask=rows < N)
    tl.store(factors_ptr + N + rows, inverse, mask=rows < N)


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


def narrow_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x16, factors)`` of activations ``x (M, K)``; see the module's table. On x's device, which must be current."""
    m, k = x.shape
    x16 = torch.empty(m, k, dtype=torch.float16, device=x.device)
    factors = torch.empty(2, m, dtype=torch.float32, device=x.device)
    narrow_tokens_kernel[(m,)](x, x16, factors, M=m, **_token_constants(k), num_warps=8)
    return x16, factors


def row_factors(scales: Tensor, bits: int) -> Tensor:
    """``factors (2, N)`` for a weight with these scales (G, N)."""
    groups, n = scales.shape
    factors = torch.empty(2, n, dtype=torch.float32, device=scales.device)
    row_factors_kernel[(cdiv(n, BLOCK_ROWS),)](scales, factors, N=n, **_row_constants(bits, groups), num_warps=4)
    return factors


def widen(part: Tensor, out: Tensor, tokens: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """Turn the float16 sums ``part (M, R)`` into the results ``out (M, R)``, the same memory seen as another dtype.

    Args:
        tokens, rows: ``1 / fx`` (M,) and ``1 / fw`` (R,).
        bias: (R,) or None.
    """
    m, count = part.shape
    widen_kernel[(cdiv(count, BLOCK_N), cdiv(m, BLOCK_M))](
        part, out, tokens, rows, tokens if bias is None else bias, M=m, N=part.stride(0), ROWS=count,
        HAS_BIAS=bias is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8,
    )  # fmt: skip


def _token_constants(k: int) -> dict[str, int]:
    return {"K": k, "EXPONENT": TOKEN_EXPONENT - (k - 1).bit_length(), "BLOCK": BLOCK_K}


def _row_constants(bits: int, groups: int) -> dict[str, int]:
    return {"G": groups, "TOP": 2**bits, "EXPONENT": ROW_EXPONENT, "BLOCK_G": BLOCK_G, "BLOCK": BLOCK_ROWS}


def compile_cases() -> list[CompileCase]:
    """The three kernels as bf16 activations take them."""
    tokens, rows = _token_constants(4096), _row_constants(4, 32)
    blocks = {"HAS_BIAS": True, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return [
        _case(narrow_tokens_kernel, {"x_ptr": "bf16", "x16_ptr": "fp16", "factors_ptr": "fp32"}, ("M",), tokens, 8),
        _case(row_factors_kernel, {"scales_ptr": "bf16", "factors_ptr": "fp32"}, ("N",), rows, 4),
        _case(
            widen_kernel,
            {"part_ptr": "fp16", "out_ptr": "bf16", "tokens_ptr": "fp32", "rows_ptr": "fp32", "bias_ptr": "bf16"},
            ("M", "N", "ROWS"),
            blocks,
            8,
        ),
    ]


def _case(
    kernel: object, pointers: dict[str, str], integers: tuple[str, ...], constexprs: dict[str, int], warps: int
) -> CompileCase:
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    name = kernel.fn.__name__  # type: ignore[attr-defined]
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, *integers),
        options={"num_warps": warps},
        kind=name,
        wide_copies=False,
    )

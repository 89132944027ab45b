"""out = x @ W.T + bias with W kept packed: ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, g = k / group_size.

| tensor | shape                    | dtype            | order                                     |
|--------|--------------------------|------------------|-------------------------------------------|
| x      | (M, K)                   | fp16, bf16       | any; made row-major                       |
| words  | (N, ceil(K * bits / 32)) | int32            | row-major, see words.py                   |
| scales | (N, G)                   | fp16, bf16, fp32 | any strides                               |
| zeros  | (ceil(N * bits / 32), G) | int32 or None    | any strides, see words.py; None: symmetric |
| bias   | (N,)                     | floating or None | contiguous                                |
| out    | (M, N)                   | as x             | row-major                                 |

Assumes: group_size is 32, 64, 128 (and divides K) or -1 (G = 1, any K). M may be 0; N and K need not be multiples of
anything. bits is 2, 4 or 8, so W4A16 and W8A16 are two compilations of one kernel.

Numerics: with c = code - 2**(bits-1) and z = zero - 2**(bits-1), both exact,

    out[m, n] = sum_g scale[n, g] * (sum_{k in g} c[n, k] * x[m, k]  -  z[n, g] * sum_{k in g} x[m, k]) + bias[n]

Products of c and x are exact in fp32; every sum, the scale and the bias are applied in fp32; one rounding at the end.
No weight is ever rounded to 16 bits. One program owns an output tile from first to last column and there are no
atomics, so the same input gives the same bits on every run.

The weight is the left operand (out.T = W @ x.T): a program then reads each word once, and tokens, of which there are
few in decoding, are the operand that tensor cores allow to be narrow. A fresh dot per group lets the scale be applied
to the sum and not to each weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile, fits, pick_tile
from .words import unpack_tile, unpack_words, unpack_zeros

__all__ = ["packed_matmul", "packed_matmul_reference"]


def packed_matmul_reference(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """The formula in plain torch, in float64: the same arguments as :func:`packed_matmul`, ``out (M, N)`` float64."""
    n, k = scales.shape[0], x.shape[1]
    size = k if group_size == -1 else group_size
    codes = unpack_words(words, bits, k).double()
    scale = scales.double().repeat_interleave(size, 1)
    zero: Tensor | int = 2 ** (bits - 1)
    if zeros is not None:
        zero = unpack_words(zeros.t(), bits, n).t().double().repeat_interleave(size, 1)
    out = x.double() @ ((codes - zero) * scale).t()
    return out if bias is None else out + bias.double()


@triton.jit
def _packed_matmul_kernel(
    x_ptr,  # (M, K) row-major
    words_ptr,  # (N, W) row-major
    scales_ptr,  # (N, G)
    zeros_ptr,  # (ceil(N * BITS / 32), G), unused unless HAS_ZEROS
    bias_ptr,  # (N,), unused unless HAS_BIAS
    out_ptr,  # (M, N) row-major
    M,
    N,
    stride_scale_n,
    stride_scale_g,
    stride_zero_n,
    stride_zero_g,
    K: tl.constexpr,  # a model has few distinct K, and a constant trip count costs no division or tail check
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns, or -1
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of out per program; consecutive programs share weight rows."""
    W: tl.constexpr = (K * BITS + 31) // 32
    BLOCK_W: tl.constexpr = BLOCK_K * BITS // 32
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_W)
    mask_m, mask_n = offs_m < M, offs_n < N

    x_tile = x_ptr + offs_m[None, :] * K + offs_k[:, None]
    words_tile = words_ptr + offs_n[:, None] * W + offs_w[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for step in range(0, STEPS):
        if K % BLOCK_K == 0:
            x = tl.load(x_tile, mask=mask_m[None, :], other=0.0)
            words = tl.load(words_tile, mask=mask_n[:, None], other=0)
        else:
            x = tl.load(x_tile, mask=mask_m[None, :] & (offs_k < K - step * BLOCK_K)[:, None], other=0.0)
            words = tl.load(words_tile, mask=mask_n[:, None] & (offs_w < W - step * BLOCK_W)[None, :], other=0)
        # The last word's padding may unpack to anything finite: x is 0 there.
        dot = tl.dot(unpack_tile(words, BITS, x.dtype), x, input_precision="ieee")
        if GROUP == -1:
            acc += dot
            if HAS_ZEROS:
                sums += tl.sum(x.to(tl.float32), axis=0)
        else:
            group = step * BLOCK_K // GROUP
            scale = tl.load(scales_ptr + offs_n * stride_scale_n + group * stride_scale_g, mask=mask_n, other=0.0)
            if HAS_ZEROS:
                zero = unpack_zeros(zeros_ptr, offs_n, group, stride_zero_n, stride_zero_g, mask_n, BITS)
                dot -= zero[:, None] * tl.sum(x.to(tl.float32), axis=0)[None, :]
            acc += dot * scale.to(tl.float32)[:, None]
        x_tile += BLOCK_K
        words_tile += BLOCK_W

    if GROUP == -1:
        if HAS_ZEROS:
            zero = unpack_zeros(zeros_ptr, offs_n, 0, stride_zero_n, stride_zero_g, mask_n, BITS)
            acc -= zero[:, None] * sums[None, :]
        acc *= tl.load(scales_ptr + offs_n * stride_scale_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out = tl.trans(acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=mask_m[:, None] & mask_n[None, :])


def packed_matmul(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    tile: Tile | None = None,
) -> Tensor:
    """``x (M, K) @ W.T + bias`` for a packed ``W (N, K)``; see the module's table for shapes and dtypes.

    Args:
        bits: 2, 4 or 8.
        group_size: 32, 64, 128, or -1 for the whole row.
        tile: the tile to run with; None takes :func:`~lowbit_kernels.tiles.pick_tile`'s.

    Returns:
        ``(M, N)`` in x's dtype, on x's device.

    Raises:
        ValueError: a tensor is not on one CUDA device (or on the CPU under ``TRITON_INTERPRET=1``), a shape or dtype
            contradicts the table, or the requested tile does not fit.
    """
    _check(x, words, scales, zeros, bias, bits, group_size)
    m, k, n = x.shape[0], x.shape[1], words.shape[0]
    tile = pick_tile(m, n, k, bits, group_size) if tile is None else tile
    if not fits(tile, bits, group_size):
        raise ValueError(f"{tile} does not fit {bits} bits in groups of {group_size}; see lowbit_kernels.tiles.fits")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    x = x.contiguous()
    strides = (0, 0) if zeros is None else zeros.stride()
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        _packed_matmul_kernel[grid](
            x,
            words,
            scales,
            words if zeros is None else zeros,
            scales if bias is None else bias,
            out,
            M=m,
            N=n,
            stride_scale_n=scales.stride(0),
            stride_scale_g=scales.stride(1),
            stride_zero_n=strides[0],
            stride_zero_g=strides[1],
            K=k,
            BITS=bits,
            GROUP=group_size,
            HAS_ZEROS=zeros is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def _check(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
    if group_size not in (32, 64, 128, -1):
        raise ValueError(f"group_size must be 32, 64, 128 or -1, got {group_size!r}")
    interpreted = bool(triton.knobs.runtime.interpret)
    floats = (torch.float16, torch.float32) if interpreted else (torch.float16, torch.bfloat16)
    if x.ndim != 2 or x.dtype not in floats:
        raise ValueError(f"x must be (M, K) in one of {floats}, got {tuple(x.shape)} {x.dtype}")
    k, n = x.shape[1], words.shape[0]
    if k == 0 or (group_size != -1 and k % group_size):
        raise ValueError(f"group_size {group_size} does not divide K = {k}")
    groups = 1 if group_size == -1 else k // group_size
    zero_rows = -(-n * bits // 32)
    _check_tensor("words", words, (n, -(-k * bits // 32)), (torch.int32,), x.device)
    _check_tensor("scales", scales, (n, groups), (torch.float16, torch.bfloat16, torch.float32), x.device)
    if zeros is not None:
        _check_tensor("zeros", zeros, (zero_rows, groups), (torch.int32,), x.device)
    if bias is not None:
        _check_tensor("bias", bias, (n,), (torch.float16, torch.bfloat16, torch.float32), x.device)
    if not words.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("words and bias must be contiguous")
    if not interpreted and x.device.type != "cuda":
        raise ValueError(f"the kernel needs tensors on a CUDA device, got {x.device}")


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} must be {shape} in one of {dtypes} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )

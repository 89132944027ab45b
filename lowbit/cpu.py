"""Matmuls with a packed weight in plain torch, and the weight layouts that torch's own CPU operators read.

    out (M, N) = x (M, K) @ W.T + bias        W[n, k] = (code - zero) * scale, groups along K as in affine.py

| layout     | weight                        | zeros                            | read by                          |
|------------|-------------------------------|----------------------------------|----------------------------------|
| "disk"     | (N, ceil(K*bits/32)) int32    | (ceil(N*bits/32), G) int32, None | everything                       |
| "cpu_int4" | (N, K/2) uint8, aten's order  | (N, G) uint8, None               | aten._weight_int4pack_mm_for_cpu |
| "cpu_int8" | (G, N, K/G) int8, code - 128  | None                             | aten._weight_int8pack_mm         |

Scales are ``(N, G)`` in every layout; the cpu layouts keep them (and the zeros) column by column in memory, as the
operators read them. Each path needs memory for a few million weights at a time, never for the whole matrix.

What was measured (torch 2.13, one thread of an AVX-512 machine, 2048 x 2048, kernels/README.md has the table): aten's
operators have fast code for bf16 activations only, there they win up to 32 (int4) or 8 (int8) tokens; for fp32 and
fp16 they are scalar loops, five to a hundred times slower than unpacking a chunk and calling a dense matmul.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from . import onednn
from .packing import pack_codes, unpack_codes

__all__ = ["CPU_INT4", "CPU_INT8", "DISK", "best_layout", "from_disk", "input_gradient", "linear", "to_disk"]

DISK = "disk"
CPU_INT4 = "cpu_int4"
CPU_INT8 = "cpu_int8"

_FEW_TOKENS = {CPU_INT4: 32, CPU_INT8: 8}
_CHUNK = 2**20  # weights unpacked at a time: 4 MB of fp32; 16 times as many on a GPU
_FP32_TOKENS = 4  # up to here a bf16 matmul saves less than rounding the weights to bf16 costs


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """``x (M, K) @ W.T + bias`` on any device (the cpu layouts on the CPU only); arguments are taken as checked.

    Numerics: fp32 and fp16 activations are multiplied in fp32 with weights dequantized in fp32. bf16 activations meet
    weights rounded once to bf16 (or exact bf16 scales and codes inside aten's operators), accumulated in fp32.

    Returns:
        ``(M, N)`` in x's dtype.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, scales.shape[0])
    x = x.contiguous()
    few = x.shape[0] <= _FEW_TOKENS.get(layout, 0) and x.dtype == scales.dtype == torch.bfloat16
    if few and layout == CPU_INT4:
        return _few_tokens_int4(x, weight, scales, zeros, bias)
    if few and layout == CPU_INT8:
        return _few_tokens_int8(x, weight, scales, bias)
    compute = torch.bfloat16 if _multiply_in_bf16(x) else torch.float32
    wide, wide_bias = x.to(compute), None if bias is None else bias.to(compute)
    if layout == CPU_INT4:
        out = _chunked_int4(wide, weight, scales, zeros, wide_bias)
    elif layout == CPU_INT8:
        out = _chunked_int8(wide, weight, scales, wide_bias)
    else:
        out = _chunked_disk(wide, weight, scales, zeros, wide_bias, bits, group_size)
    return out.to(x.dtype)


def _multiply_in_bf16(x: Tensor) -> bool:
    if x.dtype != torch.bfloat16 or x.shape[0] <= _FP32_TOKENS:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _few_tokens_int4(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """aten computes ``(code - 8) * scale + offset`` with both in bf16.

    ``(8 - zero) * scale`` is not a bf16 number, and its rounding would shift a whole group one way. So aten gets the
    rounded offset and what rounding took away is added in fp32, times the group's sum of x.
    """
    (m, k), n, groups = x.shape, *scales.shape
    size = next(s for s in (256, 128, 64, 32) if k // groups % s == 0)
    scale = scales.t().repeat_interleave(k // groups // size, 0) if groups * size != k else scales.t()
    grid = x.new_zeros(k // size, n, 2)
    grid[..., 0] = scale
    lost = None
    if zeros is not None:
        offset = scales.t().float() * (8 - zeros.t().float())
        rounded = offset.to(torch.bfloat16)
        grid[..., 1] = rounded if groups * size == k else rounded.repeat_interleave(k // groups // size, 0)
        lost = x.view(m, groups, -1).float().sum(-1) @ (offset - rounded.float())
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, size, grid)
    if lost is None and bias is None:
        return out
    wide = out.float() if lost is None else out.float() + lost
    return (wide if bias is None else wide + bias).to(x.dtype)


def _few_tokens_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """aten has no groups here, so one call per group; the groups are added in fp32."""
    groups, n, size = weight.shape
    parts, scale = x.view(-1, groups, size).transpose(0, 1).contiguous(), scales.t().contiguous()
    out = x.new_zeros(x.shape[0], n, dtype=torch.float32)
    for g in range(groups):
        out += torch.ops.aten._weight_int8pack_mm(parts[g], weight[g], scale[g])
    return (out if bias is None else out + bias).to(x.dtype)


def _chunk_rows(n: int, k: int, device: torch.device) -> int:
    return min(n, max(64, _chunk(device) // k))


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else 16 * _CHUNK


def _chunked_disk(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """A chunk of rows at a time, in the order (position in the byte, byte): whole words are shifted and masked, no
    code is moved, and x is put in the same order once."""
    planes, (n, width) = 8 // bits, words.shape
    groups, mask = scales.shape[1], int.from_bytes(bytes([2**bits - 1] * 4), "little", signed=True)
    padded = F.pad(x, (0, 4 * width * planes - x.shape[1]))
    x = padded.view(x.shape[0], 4 * width, planes).transpose(1, 2).reshape(x.shape[0], -1)
    zero = None if zeros is None else unpack_codes(zeros, bits, n, dim=0)
    rows = _chunk_rows(n, x.shape[1], x.device)
    codes = words.new_empty(rows, planes, width)
    dense = scales.new_empty(rows, planes, 4 * width, dtype=torch.float32)
    out = x.new_empty(x.shape[0], n)
    for a in range(0, n, rows):
        b = min(a + rows, n)
        for p in range(planes):
            torch.bitwise_and(words[a:b] >> (p * bits), mask, out=codes[: b - a, p])
        w = dense[: b - a].copy_(codes[: b - a].view(torch.uint8)).view(b - a, planes, groups, -1)
        w.sub_(2 ** (bits - 1) if zero is None else zero[a:b, None, :, None])
        w.mul_(scales[a:b, None, :, None].float())
        out[:, a:b] = onednn.linear(x, w.view(b - a, -1).to(x.dtype), None if bias is None else bias[a:b])
    return out


def _chunked_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    groups, n, size = weight.shape
    rows = _chunk_rows(n, x.shape[1], x.device)
    dense = scales.new_empty(rows, groups, size, dtype=torch.float32)
    out = x.new_empty(x.shape[0], n)
    for a in range(0, n, rows):
        b = min(a + rows, n)
        w = dense[: b - a].copy_(weight[:, a:b].transpose(0, 1)).mul_(scales[a:b, :, None].float())
        out[:, a:b] = onednn.linear(x, w.view(b - a, -1).to(x.dtype), None if bias is None else bias[a:b])
    return out


def _chunked_int4(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Blocks of rows at a time; inside one, aten keeps column after column, so a chunk is already ``W.T``."""
    order = _lane_order()
    assert order is not None, "a weight is in aten's int4 layout only where the layout is known"
    (m, k), n, groups, block = x.shape, *scales.shape, order.numel()
    words = weight.view(torch.int32).view(n // block, k, block // 8)
    lanes = order.flatten()
    scale = _by_lane(scales, lanes)
    zero = None if zeros is None else _by_lane(zeros, lanes)
    blocks = max(1, _chunk_rows(n, k, x.device) // block)
    codes = words.new_empty(blocks, k, 2, block // 8)
    dense = scales.new_empty(blocks, k, block, dtype=torch.float32)
    out = x.new_empty(m, n // block, block)
    for a in range(0, n // block, blocks):
        b = min(a + blocks, n // block)
        torch.bitwise_and(words[a:b], 0x0F0F0F0F, out=codes[: b - a, :, 0])
        torch.bitwise_and(words[a:b] >> 4, 0x0F0F0F0F, out=codes[: b - a, :, 1])
        w = dense[: b - a].copy_(codes[: b - a].view(torch.uint8).view(b - a, k, block)).view(b - a, groups, -1, block)
        w.sub_(8 if zero is None else zero[a:b]).mul_(scale[a:b])
        part = torch.bmm(x.expand(b - a, m, k), w.view(b - a, k, block).to(x.dtype))
        out[:, a:b, lanes] = part.transpose(0, 1)
    flat = out.view(m, n)
    return flat if bias is None else flat + bias


def _by_lane(grid: Tensor, lanes: Tensor) -> Tensor:
    """(N, G) -> (blocks, G, 1, lanes) fp32, contiguous, in the order in which a block holds its rows."""
    blocks = grid.float().view(-1, lanes.numel(), grid.shape[1])[:, lanes]
    return blocks.transpose(1, 2).unsqueeze(2).contiguous()


def input_gradient(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, k: int
) -> Tensor:
    """``grad (M, N) @ W`` on any device, W in the disk layout: ``(M, K)`` in grad's dtype, with linear's numerics.

    W is unpacked a chunk of columns at a time, so that every element is one sum, rounded once.
    """
    n = scales.shape[0]
    zero = float(2 ** (bits - 1)) if zeros is None else unpack_codes(zeros, bits, n, dim=0).float().unsqueeze(-1)
    halves = grad.dtype != torch.float32 if grad.is_cuda else _multiply_in_bf16(grad)
    wide = grad if halves else grad.float()
    out = grad.new_empty(grad.shape[0], k)
    columns = max(128, _chunk(grad.device) // n // 128 * 128)  # whole words and groups
    for a in range(0, k, columns):
        b = min(a + columns, k)
        codes = unpack_codes(words[:, a * bits // 32 : -(-b * bits // 32)], bits, b - a)
        groups = slice(None) if group_size == -1 else slice(a // group_size, b // group_size)
        w = codes.float().view(n, scales[:, groups].shape[1], -1)
        w.sub_(zero if isinstance(zero, float) else zero[:, groups]).mul_(scales[:, groups, None].float())
        out[:, a:b] = wide @ w.view(n, b - a).to(wide.dtype)
    return out


def best_layout(n: int, k: int, *, bits: int, symmetric: bool, dtype: torch.dtype, device: torch.device) -> str:
    """The layout that is fastest to multiply with on ``device``, for scales of ``dtype``.

    Other devices keep the disk layout here; what the Triton kernels read is ops.best_layout's to say. On the CPU aten's
    layouts pay where aten has fast code: bf16, shapes that fill its blocks, and for 8 bits a symmetric grid (a zero
    would have to be applied to sums already rounded to bf16).
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or not _aten_is_fast():
        return DISK
    if k % 32:  # aten's 8-bit operator reads past the end of a row that does not fill its vectors (seen in torch 2.13)
        return DISK
    if bits == 8 and symmetric:
        return CPU_INT8
    if bits == 4:
        order = _lane_order()
        return CPU_INT4 if order is not None and n % order.numel() == 0 else DISK
    return DISK


def from_disk(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, k: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, scales and zeros in ``layout``; values and shapes of the table at the top. Inverse of :func:`to_disk`."""
    if layout == DISK:
        return weight, scales, zeros
    (n, groups), by_column = scales.shape, scales.t().contiguous().t()
    if layout == CPU_INT8:
        codes = unpack_codes(weight, bits, k).view(n, groups, -1).transpose(0, 1).contiguous()
        return codes.bitwise_xor_(128).view(torch.int8), by_column, None  # code ^ 128 read as int8 is code - 128
    packed = weight.new_empty(n, k // 2, dtype=torch.uint8)
    rows = _chunk_rows(n, k, weight.device) // _block() * _block()
    for a in range(0, n, rows):
        codes = unpack_codes(weight[a : a + rows], bits, k)
        packed[a : a + rows] = _aten_pack(codes.to(torch.int32))
    zero = None if zeros is None else unpack_codes(zeros, bits, n, dim=0).t().contiguous().t()
    return packed, by_column, zero


def to_disk(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, k: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of :func:`from_disk`, bit for bit (contiguous tensors)."""
    if layout == DISK:
        return weight, scales, zeros
    n = scales.shape[0]
    if layout == CPU_INT8:
        codes = weight.view(torch.uint8).bitwise_xor(128).transpose(0, 1).reshape(n, k)
        return pack_codes(codes, bits), scales.contiguous(), None
    order, block = _lane_order(), _block()
    assert order is not None
    words = weight.new_empty(n, k * bits // 32, dtype=torch.int32)
    rows = _chunk_rows(n, k, weight.device) // block * block
    for a in range(0, n, rows):
        nibbles = weight[a : a + rows].view(-1, k, 1, block // 2)
        held = torch.cat([nibbles & 15, nibbles >> 4], 2).flatten(2).transpose(1, 2)  # (blocks, lanes, K)
        codes = torch.empty_like(held, memory_format=torch.contiguous_format)
        codes[:, order.flatten()] = held
        words[a : a + rows] = pack_codes(codes.view(-1, k), bits)
    return words, scales.contiguous(), None if zeros is None else pack_codes(zeros, bits, dim=0)


def _aten_is_fast() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


@functools.cache
def _lane_order() -> Tensor | None:
    """Which row of a block each nibble of aten's int4 layout holds, found by packing row numbers.

    Returns:
        ``(2, B/2)`` int64: low and high nibbles of the B/2 bytes that hold one column of a block of B rows. None, with
        one warning, if on this CPU the layout is not made of such blocks.
    """
    rows, cols = 256, 256
    number = torch.arange(rows, dtype=torch.int32, device="cpu").unsqueeze(1).expand(rows, cols)
    low, high = (_aten_pack((number >> shift) & 15).flatten() for shift in (0, 4))
    lanes = torch.stack([(low & 15) | (high << 4), (low >> 4) | (high & 240)]).long()
    for block in (16, 32, 64, 128):
        order = lanes[:, : block // 2]
        if torch.equal(order.flatten().sort().values, torch.arange(block, device=order.device)):
            first_rows = torch.arange(0, rows, block, device=order.device).view(-1, 1, 1)
            expected = order.view(2, 1, 1, -1) + first_rows.expand(-1, cols, 1)
            if torch.equal(lanes, expected.reshape(2, -1)):
                return order.contiguous()
    warnings.warn("torch's int4 layout on this CPU is not known; 4-bit layers stay as on disk", stacklevel=2)
    return None


def _block() -> int:
    order = _lane_order()
    assert order is not None, "a weight is in aten's int4 layout only where that layout is known"
    return order.numel()


def _aten_pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return packed

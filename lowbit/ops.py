"""The torch.library operator behind QuantLinear; the only importer of lowbit_kernels.

    lowbit::packed_linear(x, weight, scales, zeros?, bias?, bits, group_size, layout) -> x @ W.T + bias

| argument | shape and dtype                                                                    |
|----------|------------------------------------------------------------------------------------|
| x        | (..., K) fp32, fp16 or bf16, any strides                                           |
| weight   | (N, ceil(K*bits/32)) int32 in the "disk" layout, else see the table in cpu.py       |
| scales   | (N, G) fp32, fp16 or bf16, any strides; G = K / group_size, or 1 for group_size -1  |
| zeros    | None for a symmetric grid; (ceil(N*bits/32), G) int32 on disk, (N, G) uint8 on CPU  |
| bias     | (N,) fp32, fp16 or bf16, or None                                                   |

CPU: lowbit/cpu.py. CUDA: the Triton kernel for fp16 and bf16; fp32 activations, for which tensor cores have no exact
product, unpack a chunk of rows at a time and call a dense matmul. Everything accumulates in fp32 and rounds once.
The weights are frozen: there is a forward pass only, and backward raises an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .cpu import CPU_INT4, CPU_INT8, DISK
from .spec import GROUP_SIZES, PACKED_BITS

__all__ = ["LAYOUTS", "packed_linear"]

LAYOUTS = (DISK, CPU_INT4, CPU_INT8)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    layout: str = DISK,
) -> Tensor:
    """``x (..., K) @ W.T + bias`` for a packed ``W (N, K)``; shapes and dtypes in the module's table.

    Returns:
        ``(..., N)`` in x's dtype, on x's device.

    Raises:
        ValueError: a shape, dtype, device, width, group size or layout is not one of the table's.
    """
    out: Tensor = torch.ops.lowbit.packed_linear(x, weight, scales, zeros, bias, bits, group_size, layout)
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"packed widths are {PACKED_BITS} bits, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    if layout not in LAYOUTS or (layout == CPU_INT4 and bits != 4) or (layout == CPU_INT8 and bits != 8):
        raise ValueError(f"layout must be one of {LAYOUTS} and of the weight's width, got {layout!r} for {bits} bits")
    if layout != DISK and x.device.type not in ("cpu", "meta"):
        raise ValueError(f"layout {layout!r} is for the CPU, got x on {x.device}")
    if x.ndim == 0 or x.dtype not in _FLOATS:
        raise ValueError(f"x must be (..., K) in one of {_FLOATS}, got {tuple(x.shape)} {x.dtype}")
    if scales.ndim != 2:
        raise ValueError(f"scales must be (N, G), got {tuple(scales.shape)}")
    k, n = x.shape[-1], scales.shape[0]
    if k == 0 or (group_size != -1 and k % group_size):
        raise ValueError(f"x is (..., {k}), but group_size {group_size} does not divide that K")
    groups = 1 if group_size == -1 else k // group_size
    if layout == CPU_INT4:
        _check_tensor("weight", weight, (n, k // 2), (torch.uint8,), x)
    elif layout == CPU_INT8:
        _check_tensor("weight", weight, (groups, n, k // groups), (torch.int8,), x)
    else:
        _check_tensor("weight", weight, (n, -(-k * bits // 32)), (torch.int32,), x)
    _check_tensor("scales", scales, (n, groups), _FLOATS, x)
    if zeros is not None:
        if layout == DISK:
            _check_tensor("zeros", zeros, (-(-n * bits // 32), groups), (torch.int32,), x)
        elif layout == CPU_INT4:
            _check_tensor("zeros", zeros, (n, groups), (torch.uint8,), x)
        else:
            raise ValueError(f"layout {layout!r} holds symmetric weights, got zeros {tuple(zeros.shape)}")
    if bias is not None:
        _check_tensor("bias", bias, (n,), _FLOATS, x)


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], x: Tensor
) -> None:
    if tensor.ndim != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {dtypes}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; move one of them")


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, weight, scales, zeros, bias, bits, group_size, layout)
    flat = x.reshape(-1, x.shape[-1])
    out = cpu.linear(flat, weight, scales, zeros, bias, bits=bits, group_size=group_size, layout=layout)
    return out.view(*x.shape[:-1], scales.shape[0])


def _forward_cuda(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, weight, scales, zeros, bias, bits, group_size, layout)
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32:
        out = cpu.linear(flat, weight, scales, zeros, bias, bits=bits, group_size=group_size, layout=layout)
    else:
        from lowbit_kernels import packed_matmul  # needs triton, which a machine without a GPU may not have

        out = packed_matmul(flat, weight, scales, zeros, bias, bits=bits, group_size=group_size)
    return out.view(*x.shape[:-1], scales.shape[0])


def _fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, weight, scales, zeros, bias, bits, group_size, layout)
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def _save_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # An operator of its own, so that torch.compile, which traces backward together with forward, still runs a forward.
    return torch.ops.lowbit.packed_linear_backward(grad, ctx.shape), *[None] * 7


def _refuse_backward(grad: Tensor, shape: Sequence[int]) -> Tensor:
    raise RuntimeError(
        "lowbit::packed_linear has no backward pass: packed weights are frozen integers. For inference wrap the call "
        "in torch.no_grad() or torch.inference_mode(); to train, replace the QuantLinear by a torch.nn.Linear that "
        "holds its .dequantize(dtype)"
    )


def _fake_backward(grad: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(shape)


_LIBRARY = torch.library.Library("lowbit", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
    "str layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("packed_linear", _forward_cpu, "CPU")
_LIBRARY.impl("packed_linear", _forward_cuda, "CUDA")
torch.library.register_fake("lowbit::packed_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("lowbit::packed_linear", _backward, setup_context=_save_shape, lib=_LIBRARY)
_LIBRARY.define("packed_linear_backward(Tensor grad, SymInt[] shape) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("packed_linear_backward", _refuse_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::packed_linear_backward", _fake_backward, lib=_LIBRARY)

"""Which library multiplies fastest on this CPU: float32 linears, bfloat16 linears, and products in bfloat16.

torch multiplies float32 matrices with MKL, whose best code runs on Intel's processors only. oneDNN, which torch ships
for bfloat16, generates code for the instructions that it finds. Measured on an AMD EPYC (Zen 4, AVX-512, 2 cores, torch
2.13): 1.0 to 1.2 times MKL's speed for matrices of 384 x 384 to 1024 x 1024, 1.4 to 2.3 times for larger ones
(eval/results/notes.md). On other processors nothing was measured, and nothing changes.

bfloat16 goes to oneDNN, which emulates it where the processor has no instructions for it. Float32 copies of both
factors, multiplied by MKL, take a sixth of that time with AVX2, a fourth with AVX-512, and 0.7 of it on a Xeon that has
the instructions but no matrix units (256 to 2048 rows, the first two by ONEDNN_MAX_CPU_ISA on that Xeon; notes.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["has_fast_bfloat16_products", "is_faster", "is_faster_in_float32", "linear"]

_FEWEST_PRODUCTS = 1 << 23  # from which oneDNN is faster
_FEWEST_ROWS = 128  # of bfloat16 inputs, from which copies of the weights in float32 pay
_ROWS_AT_ONCE = 512  # of which there are float32 copies
_PLAIN = (Tensor, nn.Parameter)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``input (..., K)``, ``weight (N, K)``, ``bias (N,)``, up to the order of float32 additions.

    Arguments are called what ``F.linear`` calls them, so that calls of it can be passed on.
    """
    if is_faster(input, weight, bias):
        # The operator that torch.compile puts in the place of F.linear; no public function reaches it.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return out
    if is_faster_in_float32(input, weight, bias):
        return _linear_in_float32(input, weight, bias)
    return F.linear(input, weight, bias)


def _linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of bfloat16 numbers are exact in float32, and the sums are rounded once, as oneDNN rounds them."""
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    wide, shift = weight.float(), None if bias is None else bias.float()
    parts = (tensor.flatten(0, -2).split(_ROWS_AT_ONCE) for tensor in (input, out))
    for rows, place in zip(*parts, strict=True):
        place.copy_(F.linear(rows.float(), wide, shift))
    return out


def is_faster(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether :func:`linear` takes these to oneDNN: it has no gradients, and is very slow on transposed views."""
    if not _are_plain(torch.float32, input, weight, bias):
        return False
    if input.numel() * weight.shape[0] < _FEWEST_PRODUCTS or not (input.is_contiguous() and weight.is_contiguous()):
        return False
    return _here()


def is_faster_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether :func:`linear` multiplies float32 copies of these bfloat16 tensors."""
    if not _are_plain(torch.bfloat16, input, weight, bias):
        return False
    rows = input.numel() // max(1, input.shape[-1])
    return rows >= _FEWEST_ROWS and _cpu().get("architecture") == "x86_64" and not has_fast_bfloat16_products()


def _are_plain(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether all are of the dtype, on the CPU, without gradients, of no subclass: one may know no such operator."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(type(t) in _PLAIN and t.dtype == dtype and t.device.type == "cpu" for t in given):
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return not learns and bool(torch.backends.mkldnn.enabled)


@functools.cache
def has_fast_bfloat16_products() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 faster on this CPU than its float32 library does those of float32.

    So it is with matrix units, and with AMD's instructions for bfloat16. Intel's without the units take 1.7 times the
    time of float32 (Xeon of the fifth generation, 1024 x 1024 x 1024, torch 2.13).
    """
    return bool(_cpu().get("amx_bf16") or (_cpu().get("avx512_bf16") and not _is_intel()))


@functools.cache
def _here() -> bool:
    """Whether this machine is of the kind that was measured: x86 with AVX-512, not Intel's, and a torch with both."""
    ours = _cpu().get("architecture") == "x86_64" and _cpu().get("avx512_f") and not _is_intel()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(ours and libraries and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def _is_intel() -> bool:
    return "Intel" in _cpu().get("cpu_name", "")


def _cpu() -> dict[str, Any]:
    """What torch knows of the CPU; nothing in versions of torch that do not tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()

"""What every family demands of its arguments, said once and before any launch: a ValueError names what is wrong."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .layout import tiles_shape
from .tiles import BITS, GROUPS, MIN_ARCH, Problem

__all__ = ["check_arguments"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes: what a lane loads at a time."""


def check_arguments(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, problem: Problem, arch: int
) -> None:
    """Compare tensors with weight_only.py's table; ``arch`` is 90 for sm_90. ValueError on the first contradiction."""
    interpreted = bool(triton.knobs.runtime.interpret)
    if problem.bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {problem.bits!r}")
    if problem.group_size not in GROUPS:
        raise ValueError(f"group_size must be one of {GROUPS}, got {problem.group_size!r}")
    if not interpreted and x.device.type != "cuda":
        raise ValueError(f"the kernels need tensors on a CUDA device, got x on {x.device}")
    if arch < MIN_ARCH or (problem.dtype == torch.bfloat16 and arch < 80):
        raise ValueError(f"sm_{arch} cannot multiply {problem.dtype}: float16 needs sm_75 or newer, bfloat16 sm_80")
    floats = (torch.float16, torch.float32) if interpreted else (torch.float16, torch.bfloat16)
    if x.ndim != 2 or x.dtype not in floats:
        raise ValueError(f"x must be (M, K) in one of {floats}, got {tuple(x.shape)} {x.dtype}")
    n, k, size = problem.n, problem.k, problem.group_size
    if k < 1 or n < 1 or (size != -1 and k % size):
        raise ValueError(f"K and n must be at least 1 and group_size divide K, got K = {k}, n = {n}, group_size {size}")
    groups = 1 if size == -1 else k // size
    _check("x", x, tuple(x.shape), floats, x.device, aligned=True)
    _check("tiles", tiles, tiles_shape(n, k, problem.bits), (torch.int32,), x.device, aligned=True)
    _check("scales", scales, (groups, n), FLOATS, x.device)
    if zeros is not None:
        _check("zeros", zeros, (groups, n), (torch.uint8,), x.device)
    if bias is not None:
        _check("bias", bias, (n,), FLOATS, x.device)


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    aligned: bool = False,
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} must be {shape} in one of {dtypes} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {shape}")
    if aligned and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must start at a multiple of {ALIGNMENT} bytes, got address {tensor.data_ptr():#x}")

"""What kernels demand of their arguments, said once and before any launch: a ValueError names what is wrong."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .layout import tiles_shape
from .tiles import BITS, GROUPS, MIN_ARCH, Problem

__all__ = [
    "ALIGNMENT",
    "FLOATS",
    "check_arguments",
    "check_device",
    "check_tensor",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes: what a lane loads at a time."""


def check_arguments(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, problem: Problem, arch: int
) -> None:
    """Compare tensors with weight_only.py's table, for every family of its tiles; ``arch`` is 90 for sm_90.

    Raises:
        ValueError: names the first contradiction.
    """
    if problem.bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {problem.bits!r}")
    if problem.group_size not in GROUPS:
        raise ValueError(f"group_size must be one of {GROUPS}, got {problem.group_size!r}")
    check_device("x", x)
    if arch < MIN_ARCH or (problem.dtype == torch.bfloat16 and arch < 80):
        raise ValueError(f"sm_{arch} cannot multiply {problem.dtype}: float16 needs sm_75 or newer, bfloat16 sm_80")
    floats = (torch.float16, torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16)
    if x.ndim != 2 or x.dtype not in floats:
        raise ValueError(f"x must be (M, K) in one of {floats}, got {tuple(x.shape)} {x.dtype}")
    n, k, size = problem.n, problem.k, problem.group_size
    if k < 1 or n < 1 or (size != -1 and k % size):
        raise ValueError(f"K and n must be at least 1 and group_size divide K, got K = {k}, n = {n}, group_size {size}")
    groups = 1 if size == -1 else k // size
    check_tensor("x", x, tuple(x.shape), floats, x.device, aligned=True)
    check_tensor("tiles", tiles, tiles_shape(n, k, problem.bits), (torch.int32,), x.device, aligned=True)
    check_tensor("scales", scales, (groups, n), FLOATS, x.device)
    if zeros is not None:
        check_tensor("zeros", zeros, (groups, n), (torch.uint8,), x.device)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, x.device)


def check_device(name: str, tensor: Tensor) -> None:
    """Refuse a tensor where no kernel runs: anywhere but on a CUDA device, or in Triton's interpreter."""
    if tensor.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"the kernels need tensors on a CUDA device, got {name} on {tensor.device}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    aligned: bool = False,
) -> None:
    """Refuse a tensor of another shape, dtype or device, that is not contiguous, or not ``aligned`` if it has to be."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} must be {shape} in one of {dtypes} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {shape}")
    if aligned and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must start at a multiple of {ALIGNMENT} bytes, got address {tensor.data_ptr():#x}")

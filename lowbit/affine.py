"""The quantization formula, once.

    w  ~  (code - zero) * scale        code in [0, 2**bits - 1], zero an integer code (2**(bits-1) when symmetric)

Shapes everywhere: weight and codes ``(N, K)``, scales and zeros ``(N, G)`` with ``G = K / group_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import QuantSpec

__all__ = ["QuantizedWeight", "dequantize", "minmax_grid", "quantize_to_grid", "round_scales"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Unpacked result of a calibrator.

    Attributes:
        codes: ``(N, K)`` uint8, each in ``[0, 2**bits - 1]``.
        scales: ``(N, G)`` floating point, finite and not zero, in the dtype they will be stored in. A calibrator's are
            positive; other tools' files have negative ones.
        zeros: ``(N, G)`` uint8 in ``[0, 2**bits - 1]``, or None for a symmetric spec.
        spec: the grid.

    Raises:
        ValueError: shapes, dtypes or the presence of zeros contradict the spec.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be (N, K) uint8, got {tuple(self.codes.shape)} {self.codes.dtype}")
        n, k = self.codes.shape
        grid = (n, self.spec.num_groups(k))
        if tuple(self.scales.shape) != grid or not self.scales.is_floating_point():
            raise ValueError(
                f"scales must be {grid} floating point, got {tuple(self.scales.shape)} {self.scales.dtype}"
            )
        if (self.zeros is None) != self.spec.symmetric:
            raise ValueError(f"zeros must be {'None' if self.spec.symmetric else 'given'} for {self.spec}")
        if self.zeros is not None and (tuple(self.zeros.shape) != grid or self.zeros.dtype != torch.uint8):
            raise ValueError(f"zeros must be {grid} uint8, got {tuple(self.zeros.shape)} {self.zeros.dtype}")


def _groups(x: Tensor, num_groups: int) -> Tensor:
    return x.reshape(x.shape[0], num_groups, -1)


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will read back from storage: rounded to ``dtype``, kept positive and finite.

    Codes must be chosen against these, not against the exact scales, or the rounding of the scale is added to every
    weight of its group.
    """
    info = torch.finfo(dtype)
    # Float16's subnormals are as exact to multiply by as any number, and 8 bits need them for weights of 1e-3. What is
    # subnormal in float32, where kernels compute, may be flushed to zero.
    return scales.clamp(max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny), info.max).to(dtype)


def minmax_grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scales (and zeros) that just cover every group's range, as compressed-tensors' ``calculate_qparams`` has them.

    Symmetric: ``scale = max|w| / ((2**b - 1) / 2)``. Asymmetric: the range is widened to contain 0,
    ``scale = (max - min) / (2**b - 1)``, ``zero = round(-min / scale)``. An all-zero group gets scale 1.

    Args:
        weight: ``(N, K)`` float32 or float64.

    Returns:
        scales ``(N, G)`` in the weight's dtype, zeros ``(N, G)`` uint8 or None.
    """
    w = _groups(weight, spec.num_groups(weight.shape[1]))
    if spec.symmetric:
        scales = w.abs().amax(-1) / (spec.max_code / 2)
        return torch.where(scales > 0, scales, 1.0), None
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = (high - low) / spec.max_code
    scales = torch.where(scales > 0, scales, 1.0)
    return scales, (-low / scales).round().clamp(0, spec.max_code).to(torch.uint8)


def quantize_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> QuantizedWeight:
    """Round every weight to the nearest code of a given grid (ties to even).

    Args:
        weight: ``(N, K)`` floating point.
        scales: ``(N, G)``; used in their own precision, returned as they are.
        zeros: ``(N, G)`` uint8, or None when the spec is symmetric.
    """
    zero = spec.mid_code if zeros is None else zeros.to(weight.dtype).unsqueeze(-1)
    w = _groups(weight, spec.num_groups(weight.shape[1]))
    codes = (w / scales.to(weight.dtype).unsqueeze(-1) + zero).round().clamp(0, spec.max_code)
    return QuantizedWeight(codes.reshape(weight.shape).to(torch.uint8), scales, zeros, spec)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(code - zero) * scale`` as ``(N, K)``, computed in ``dtype`` (float32 or wider: exact up to one rounding)."""
    zero: Tensor | int = qw.spec.mid_code if qw.zeros is None else qw.zeros.to(dtype).unsqueeze(-1)
    codes = _groups(qw.codes.to(dtype), qw.scales.shape[1])
    return ((codes - zero) * qw.scales.to(dtype).unsqueeze(-1)).reshape(qw.codes.shape)

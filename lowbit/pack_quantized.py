"""The tensors of the compressed-tensors formats; config.json's section is in ``pack_config.py``.

``pack-quantized``: a linear ``m`` with weight (N, K), b bits and G groups per row, activations left as they are:

    m.weight_packed       int32  (N, ceil(K*b/32))    codes along K, first code in the low bits
    m.weight_scale        float  (N, G)
    m.weight_shape        int64  (2,)                 [N, K]
    m.weight_zero_point   int32  (ceil(N*b/32), G)    only when asymmetric, packed along N

``int-quantized``: 8 bits, whole rows, activations of 8 bits too (``QuantSpec.activations``):

    m.weight              int8   (N, K)               code - 128
    m.weight_scale        float  (N, 1)
    m.weight_zero_point   int8   (N, 1)               zero - 128, only when asymmetric
    m.input_scale         float  (1,)                 only when the activations' scale is static

Source: compressed-tensors 0.20, ``compressors/pack_quantized`` and ``compressors/naive_quantized``; the layout of 2, 4
and 8 bits is the same in every release.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import QuantizedWeight
from .packing import pack_codes

__all__ = ["from_int8", "linear_tensors", "to_int8"]

_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_tensors(name: str, qw: QuantizedWeight, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of one quantized linear as they stand in a file, ``int-quantized`` where activations are quantized.

    Args:
        name: the layer's name in the checkpoint, without ``.weight``.
        qw: codes ``(N, K)``, scales ``(N, G)`` float32, float16 or bfloat16, zeros ``(N, G)`` or None. Not modified.
        input_scale: ``(1,)`` of the layer's input, where ``qw.spec.activations`` is static.

    Returns:
        the tensors above under ``name.``, on the codes' device.

    Raises:
        ValueError: the width has no file format, a scale is of another dtype, not finite or zero, or an input scale is
            missing or too many.
    """
    if qw.scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{name}: scales must be one of {_SCALE_DTYPES} to be stored, got {qw.scales.dtype}")
    bad = qw.scales[~(torch.isfinite(qw.scales) & (qw.scales != 0))]
    if bad.numel():
        raise ValueError(f"{name}: scales must be finite and not zero, got {bad[0].item()} ({bad.numel()} in all)")
    if qw.spec.activations is not None:
        return _int_tensors(name, qw, input_scale)
    if input_scale is not None:
        raise ValueError(f"{name}: an input_scale was given, but its spec {qw.spec.label()} leaves activations alone")
    tensors = {
        f"{name}.weight_packed": pack_codes(qw.codes, qw.spec.bits),
        f"{name}.weight_scale": qw.scales.contiguous(),
        f"{name}.weight_shape": torch.tensor(list(qw.codes.shape), dtype=torch.int64, device=qw.codes.device),
    }
    if qw.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = pack_codes(qw.zeros, qw.spec.bits, dim=0)
    return tensors


def _int_tensors(name: str, qw: QuantizedWeight, input_scale: Tensor | None) -> dict[str, Tensor]:
    assert qw.spec.activations is not None
    tensors = {f"{name}.weight": to_int8(qw.codes), f"{name}.weight_scale": qw.scales.contiguous()}
    if qw.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = to_int8(qw.zeros)
    if qw.spec.activations.dynamic != (input_scale is None):
        raise ValueError(f"{name}: {qw.spec.label()} needs {'no' if qw.spec.activations.dynamic else 'an'} input_scale")
    if input_scale is not None:
        if tuple(input_scale.shape) != (1,) or not bool(torch.isfinite(input_scale) & (input_scale > 0)):
            raise ValueError(f"{name}: input_scale must be one finite positive number, got {input_scale.tolist()}")
        tensors[f"{name}.input_scale"] = input_scale.contiguous()
    return tensors


def to_int8(codes: Tensor) -> Tensor:
    """Unsigned 8-bit codes as signed ones, ``code - 128``; :func:`from_int8` is the inverse."""
    return (codes ^ 0x80).contiguous().view(torch.int8)


def from_int8(codes: Tensor) -> Tensor:
    """Inverse of :func:`to_int8`."""
    return codes.contiguous().view(torch.uint8) ^ 0x80

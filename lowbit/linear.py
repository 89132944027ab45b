"""QuantLinear and Int8Linear: the modules that replace ``torch.nn.Linear`` and keep its weight quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .affine import QuantizedWeight, dequantize
from .cpu import DISK
from .dtypes import DTYPES, dtype_name
from .int8 import int8_linear, largest_k
from .ops import CUDA_TILES, best_layout, from_disk, packed_linear, prepare, to_disk
from .pack_quantized import from_int8, to_int8
from .packing import pack_codes, packed_width, unpack_codes
from .spec import PACKED_BITS, QuantSpec
from .stand_in import stand_in

__all__ = ["Int8Linear", "QuantLinear", "linear_class"]


def linear_class(spec: QuantSpec) -> type[QuantLinear] | type[Int8Linear]:
    """The module for a linear of ``spec``: by whether its activations are quantized."""
    return QuantLinear if spec.activations is None else Int8Linear


class QuantLinear(nn.Module):
    """``y = x @ W.T + bias`` with ``W (N, K)`` packed to 2, 4 or 8 bits and frozen.

    Its tensors are named and laid out as in a compressed-tensors ``pack-quantized`` checkpoint:

    | name              | shape                    | dtype   |                                        |
    |-------------------|--------------------------|---------|----------------------------------------|
    | weight_packed     | (N, ceil(K * bits / 32)) | int32   | packing.py's order                     |
    | weight_scale      | (N, G)                   | `dtype` |                                        |
    | weight_zero_point | (ceil(N * bits / 32), G) | int32   | only for an asymmetric spec            |
    | weight_shape      | (2,)                     | int64   | N, K                                   |
    | bias              | (N,)                     | `dtype` | only with ``bias=True``                |

    :meth:`repack` puts them into what the device multiplies fastest with. That is a private matter of memory:
    ``state_dict``, ``load_state_dict``, ``to``, ``half``, ``copy.deepcopy`` and ``pickle`` see the layout above, bit
    for bit. Dtype conversions reach scales and bias; the packed integers stay.

    Args:
        in_features: K.
        out_features: N.
        spec: bits (2, 4 or 8), group size and symmetry.
        bias: whether there is a bias.
        dtype: of scales and bias: float32, float16 or bfloat16.
        device: where the (uninitialised) tensors are made; ``"meta"`` is fine.

    Raises:
        ValueError: a width without a packed format, features below 1, a group size that does not divide K, or a dtype
            that is not one of the three.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None
    weight = property(stand_in)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_construction(in_features, out_features, dtype)
        if spec.bits not in PACKED_BITS:
            raise ValueError(f"packed widths are {PACKED_BITS} bits, got {spec}")
        if spec.activations is not None:
            raise ValueError(f"a QuantLinear leaves its activations alone (Int8Linear quantizes them), got {spec}")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self._layout, self._repack_on_unpickling = DISK, False
        n, k, groups = out_features, in_features, spec.num_groups(in_features)

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_packed = empty(n, packed_width(k, spec.bits), dtype=torch.int32)
        self.weight_scale = empty(n, groups, dtype=dtype)
        zero_rows = packed_width(n, spec.bits)
        self.weight_zero_point = None if spec.symmetric else empty(zero_rows, groups, dtype=torch.int32)
        shape = torch.tensor([n, k], dtype=torch.int64, device=device)
        self.weight_shape = nn.Parameter(shape, requires_grad=False)
        self.bias = empty(n, dtype=dtype) if bias else None

    @classmethod
    def from_quantized(
        cls, qw: QuantizedWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """Pack a calibrator's result; the codes' device, not repacked yet.

        Args:
            qw: the weight; a copy is made.
            bias: ``(N,)`` or None.
            dtype: of scales and bias; None keeps the scales' own.

        Raises:
            ValueError: as for the constructor, or a bias that is not ``(N,)``.
        """
        n, k = qw.codes.shape
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias must be {(n,)}, got {tuple(bias.shape)}")
        dtype = qw.scales.dtype if dtype is None else dtype
        module = cls(k, n, qw.spec, bias=bias is not None, dtype=dtype, device=qw.codes.device)
        with torch.no_grad():
            module.weight_packed.copy_(pack_codes(qw.codes, qw.spec.bits))
            module.weight_scale.copy_(qw.scales)
            if module.weight_zero_point is not None and qw.zeros is not None:
                module.weight_zero_point.copy_(pack_codes(qw.zeros, qw.spec.bits, dim=0))
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., K)`` fp32, fp16 or bf16 -> ``(..., N)`` in x's dtype. ValueError names a shape that is not K."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`forward` with a bias ``(N,)`` or None that is kept elsewhere, as a ShardedLinear keeps its own."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got {tuple(x.shape)}")
        return packed_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            bias,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            layout=self._layout,
        )

    def quantized_weight(self) -> QuantizedWeight:
        """The unpacked weight: codes ``(N, K)``, scales, zeros (new tensors, except that scales may be shared)."""
        weight, scales, zeros = self._disk_tensors()
        codes = unpack_codes(weight, self.spec.bits, self.in_features)
        unpacked = None if zeros is None else unpack_codes(zeros, self.spec.bits, self.out_features, dim=0)
        return QuantizedWeight(codes, scales.detach(), unpacked, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(N, K)`` in ``dtype``: ``(code - zero) * scale`` in float32 (float64 if asked for), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantize(self.quantized_weight(), wide).to(dtype)

    def repack(self) -> QuantLinear:
        """Put the weight into the layout that this device multiplies fastest with; returns self. Idempotent.

        On CUDA that is the kernels' for a module in float16 or bfloat16, on the CPU one of lowbit/cpu.py's where one is
        known to be faster; anything else stays as on disk. Needs memory for one more copy of this layer's packed weight
        while it runs.
        """
        layout = best_layout(
            self.out_features,
            self.in_features,
            bits=self.spec.bits,
            symmetric=self.spec.symmetric,
            dtype=self.weight_scale.dtype,
            device=self.weight_packed.device,
        )
        if layout != self._layout:
            tensors = from_disk(*self._disk_tensors(), bits=self.spec.bits, k=self.in_features, layout=layout)
            self._set_tensors(*tensors)
            self._layout = layout
        if layout == CUDA_TILES:
            prepare(self.weight_packed.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, the spec's label, the scales' dtype, and the layout in memory when it is not the disk's."""
        layout = "" if self._layout == DISK else f", layout={self._layout}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.label()}, {dtype_name(self.weight_scale.dtype)}{layout}"
        )

    def _disk_tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            return to_disk(
                self.weight_packed,
                self.weight_scale,
                self.weight_zero_point,
                bits=self.spec.bits,
                k=self.in_features,
                layout=self._layout,
            )

    def _set_tensors(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        self.weight_packed = nn.Parameter(weight.detach(), requires_grad=False)
        self.weight_scale = nn.Parameter(scales.detach(), requires_grad=False)
        self.weight_zero_point = None if zeros is None else nn.Parameter(zeros.detach(), requires_grad=False)

    def _leave_layout(self) -> bool:
        """Go back to the disk layout; whether there was another one."""
        repacked = self._layout != DISK
        if repacked:
            self._set_tensors(*self._disk_tensors())
            self._layout = DISK
        return repacked

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # Every way to move or convert a module comes through here, and fn may change the device or the scales' dtype.
        # Pipelines and loaders also "move" models to where they are, which must not cost a repacking there and back.
        probe = self.weight_scale.detach()[:0]
        if fn(probe) is probe:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        repacked = self._leave_layout()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.repack() if repacked else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout != DISK:
            names = ("weight_packed", "weight_scale", "weight_zero_point")
            for name, tensor in zip(names, self._disk_tensors(), strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        repacked = self._leave_layout()
        super()._load_from_state_dict(*args, **kwargs)
        if repacked:
            self.repack()

    def __getstate__(self) -> dict[str, Any]:
        """The disk layout: the machine that unpickles may not know this one's."""
        state = self.__dict__.copy()
        if self._layout != DISK:
            copy = object.__new__(QuantLinear)
            copy.__dict__ = {**state, "_parameters": dict(self._parameters)}
            copy._leave_layout()
            state = {**copy.__dict__, "_repack_on_unpickling": True}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._repack_on_unpickling:
            self._repack_on_unpickling = False
            self.repack()


class Int8Linear(nn.Module):
    """``y = x @ W.T + bias`` in int8: W8A8. The weight is stored in int8, the input is quantized when it comes.

    Its tensors are named and laid out as in a compressed-tensors ``int-quantized`` checkpoint, in memory too:

    | name              | shape  | dtype   |                                                    |
    |-------------------|--------|---------|----------------------------------------------------|
    | weight            | (N, K) | int8    | code - 128 of affine.py's codes                    |
    | weight_scale      | (N, 1) | `dtype` |                                                    |
    | weight_zero_point | (N, 1) | int8    | zero - 128; only for an asymmetric spec            |
    | input_scale       | (1,)   | `dtype` | only for static activations                        |
    | bias              | (N,)   | `dtype` | only with ``bias=True``                            |

    Numerics are int8.py's: the same integers on every device, exact sums, fp32 scales, one rounding. The gradient with
    respect to x is the straight-through one.

    Args:
        in_features: K.
        out_features: N.
        spec: 8 bits, whole rows, with an ActivationSpec.
        bias: whether there is a bias.
        dtype: of scales and bias: float32, float16 or bfloat16.
        device: where the (uninitialised) tensors are made; ``"meta"`` is fine.

    Raises:
        ValueError: a spec without activations, features below 1 or a K whose sums int32 cannot hold, or a dtype that is
            not one of the three.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_construction(in_features, out_features, dtype)
        if spec.activations is None:
            raise ValueError(f"an Int8Linear needs a spec with activations (QuantLinear does without), got {spec}")
        if in_features > largest_k(not spec.symmetric):
            raise ValueError(
                f"in_features must be at most {largest_k(not spec.symmetric)} (sums are int32), got {in_features}"
            )
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        n, k = out_features, in_features

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = empty(n, k, dtype=torch.int8)
        self.weight_scale = empty(n, 1, dtype=dtype)
        self.weight_zero_point = None if spec.symmetric else empty(n, 1, dtype=torch.int8)
        self.input_scale = None if spec.activations.dynamic else empty(1, dtype=dtype)
        self.bias = empty(n, dtype=dtype) if bias else None

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        input_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Int8Linear:
        """Take over a calibrator's result, on the codes' device.

        Args:
            qw: the weight, its spec with activations; a copy is made.
            bias: ``(N,)`` or None.
            input_scale: one positive element for static activations, None for dynamic ones.
            dtype: of scales and bias; None keeps the weight scales' own.

        Raises:
            ValueError: as for the constructor, a bias that is not ``(N,)``, or an input_scale that the spec does not
                ask for, that is missing, or that is not one finite positive number.
        """
        n, k = qw.codes.shape
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias must be {(n,)}, got {tuple(bias.shape)}")
        dtype = qw.scales.dtype if dtype is None else dtype
        module = cls(k, n, qw.spec, bias=bias is not None, dtype=dtype, device=qw.codes.device)
        if (input_scale is None) != (module.input_scale is None):
            raise ValueError(f"input_scale must be given for static activations only, got {input_scale} for {qw.spec}")
        if input_scale is not None:
            kept = input_scale.to(dtype)
            if input_scale.numel() != 1 or not bool((kept.isfinite() & (kept > 0)).all()):
                raise ValueError(f"input_scale must be one finite positive number in {dtype}, got {input_scale}")
        with torch.no_grad():
            module.weight.copy_(to_int8(qw.codes))
            module.weight_scale.copy_(qw.scales)
            if module.weight_zero_point is not None and qw.zeros is not None:
                module.weight_zero_point.copy_(to_int8(qw.zeros))
            if module.input_scale is not None and input_scale is not None:
                module.input_scale.copy_(input_scale.reshape(1))
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., K)`` fp32, fp16 or bf16 -> ``(..., N)`` in x's dtype. ValueError names a shape that is not K."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`QuantLinear.product`."""
        return int8_linear(x, self.weight, self.weight_scale, self.weight_zero_point, self.input_scale, bias)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in affine.py's terms: codes ``(N, K)`` and zeros uint8 (new), scales (shared)."""
        zeros = self.weight_zero_point
        return QuantizedWeight(
            from_int8(self.weight.detach()),
            self.weight_scale.detach(),
            None if zeros is None else from_int8(zeros.detach()),
            self.spec,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(N, K)`` in ``dtype``: ``(code - zero) * scale`` in float32 (float64 if asked for), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantize(self.quantized_weight(), wide).to(dtype)

    def repack(self) -> Int8Linear:
        """As :meth:`QuantLinear.repack`; the layout on disk is the kernels' own, so nothing moves."""
        prepare(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, the spec's label, the scales' dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.label()}, {dtype_name(self.weight_scale.dtype)}"
        )


def _check_construction(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    if in_features < 1 or out_features < 1:
        raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")

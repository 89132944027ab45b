"""Random packed weights, their float64 reference, and the layers that are measured.

The reference unpacks the checkpoint's own words with plain torch: it shares no code with the kernels or their layout.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.layout import to_tiles
from lowbit_kernels.tiles import Problem, Tile
from lowbit_kernels.weight_only import weight_only_matmul

__all__ = [
    "LAYERS",
    "TINY_LAYERS",
    "Linear",
    "Packed",
    "dense_weight",
    "poisoned_empty",
    "random_packed",
    "reference",
    "relative_rms",
]


@dataclass(frozen=True)
class Linear:
    """One fused linear of a transformer layer: W is (n, k)."""

    name: str
    n: int
    k: int


LAYERS = {
    "8b": (
        Linear("qkv", 6144, 4096),
        Linear("o", 4096, 4096),
        Linear("gate_up", 28672, 4096),
        Linear("down", 4096, 14336),
    ),
    "70b": (
        Linear("qkv", 10240, 8192),
        Linear("o", 8192, 8192),
        Linear("gate_up", 57344, 8192),
        Linear("down", 8192, 28672),
    ),
}
"""Llama 3's four linears with q, k, v and gate, up fused (Llama 3 herd of models, table 3)."""
TINY_LAYERS = {
    name: (Linear("qkv", 256, 128), Linear("o", 128, 128), Linear("gate_up", 384, 128), Linear("down", 128, 1024))
    for name in LAYERS
}
"""Of ``--tiny``: to see that everything runs."""


@dataclass(frozen=True)
class Packed:
    """A quantized weight: as the checkpoint has it (words, scales (n, g), zeros) and as the kernels take it."""

    n: int
    k: int
    bits: int
    group_size: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    tiles: Tensor
    scales_gn: Tensor
    zeros_gn: Tensor | None

    def problem(self, m: int) -> Problem:
        """The matmul with ``m`` tokens."""
        asymmetric = self.zeros is not None
        return Problem(m, self.n, self.k, self.bits, self.group_size, self.scales.dtype, asymmetric)

    def __call__(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """``x @ W.T + bias`` by lowbit's kernels; options as for ``weight_only_matmul``."""
        return weight_only_matmul(
            x,
            self.tiles,
            self.scales_gn,
            self.zeros_gn,
            bias,
            bits=self.bits,
            group_size=self.group_size,
            n=self.n,
            **options,
        )

    def bytes(self) -> int:
        """What a matmul must read of the weight."""
        parts = [self.tiles, self.scales_gn, self.zeros_gn]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def random_packed(
    n: int,
    k: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    asymmetric: bool = False,
    scale: tuple[float, float] = (0.01, 0.03),
) -> Packed:
    """Codes and zeros over their whole range, scales (of ``dtype``) between two bounds; from torch's current seed."""
    groups = 1 if group_size == -1 else k // group_size

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)

    packed = words(n, -(-k * bits // 32))
    scales = (scale[0] + (scale[1] - scale[0]) * torch.rand(n, groups, device=device)).to(dtype)
    zeros = words(-(-n * bits // 32), groups) if asymmetric else None
    return Packed(n, k, bits, group_size, packed, scales, zeros, *to_tiles(packed, scales, zeros, bits, k))


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (rows, count) int32 of the checkpoint's words: code i of a row at bit i * bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :count]


def dense_weight(packed: Packed, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """``(code - zero) * scale`` of some rows, computed in float64 (float32 for 16-bit results), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = packed.k if packed.group_size == -1 else packed.group_size
    codes = codes_of(packed.words[rows], packed.bits, packed.k).to(wide)
    zero: Tensor | float = float(2 ** (packed.bits - 1))
    if packed.zeros is not None:
        zeros = codes_of(packed.zeros.t().contiguous(), packed.bits, packed.n).t()[rows]
        zero = zeros.to(wide).repeat_interleave(size, 1)
    return ((codes - zero) * packed.scales[rows].to(wide).repeat_interleave(size, 1)).to(dtype)


def reference(x: Tensor, packed: Packed, bias: Tensor | None = None, step: int = 4096) -> Tensor:
    """``x @ W.T + bias`` in float64, ``step`` rows of the weight at a time."""
    parts = [
        x.double() @ dense_weight(packed, torch.float64, slice(first, first + step)).t()
        for first in range(0, packed.n, step)
    ]
    out = torch.cat(parts, dim=1)
    return out if bias is None else out + bias.double()


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the reference; infinite when anything is not finite."""
    error = actual.double() - expected
    value = (error.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-300)).item()
    return value if value < float("inf") else float("inf")


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, memory that lowbit's packages allocate uninitialised holds NaN (integers: 0x7d)."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poison(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] in ("lowbit", "lowbit_kernels"):
                out.fill_(float("nan") if out.is_floating_point() else 0x7D)
            return out

        return wrapper

    try:
        for name, original in originals.items():
            setattr(torch, name, poison(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def fused(tile: Tile) -> bool:
    """Whether a tile belongs to a fused kernel."""
    return tile.family != "dequant"

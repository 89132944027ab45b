"""QuantSpec: what a quantized weight looks like, in three numbers, and what its activations become, if anything.

A weight ``W (N, K)`` is cut into groups of ``group_size`` consecutive columns; every group of every row has one
scale and, when the grid is asymmetric, one integer zero. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["BITS", "GROUP_SIZES", "PACKED_BITS", "ActivationSpec", "QuantSpec"]

BITS = (2, 3, 4, 5, 6, 8)
"""Bit widths of the formula and of every calibrator."""

PACKED_BITS = (2, 4, 8)
"""Bit widths that have a file format and kernels; the others divide no 32-bit word evenly and exist to be measured."""

GROUP_SIZES = (32, 64, 128, -1)
"""Columns that share a scale; -1 is the whole row."""

# Asymmetric loses less at every width (eval/results/quality.md), symmetric opens in more engines: README, "Symmetric or
# asymmetric".
_SYMMETRIC_BY_DEFAULT = {2: False, 3: False, 4: True, 5: True, 6: True, 8: True}


@dataclass(frozen=True)
class ActivationSpec:
    """How a layer's input is quantized when it runs: symmetric integers, so that the product is one of integers.

    Args:
        bits: 8.
        dynamic: one scale per token, computed from it (True), or one scale for all, found by calibration (False).

    Raises:
        ValueError: a field is not one of the values above.
    """

    bits: int = 8
    dynamic: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits != 8:
            raise ValueError(f"activations can have 8 bits, got {self.bits!r}")
        if type(self.dynamic) is not bool:
            raise ValueError(f"dynamic must be True or False, got {self.dynamic!r}")

    def label(self) -> str:
        """Short name for tables: ``a8`` with dynamic scales, ``a8static`` with one for all."""
        return f"a{self.bits}{'' if self.dynamic else 'static'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict with the two fields."""
        return {"bits": self.bits, "dynamic": self.dynamic}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ActivationSpec:
        """Inverse of :meth:`to_dict`; an unknown or missing field is a ValueError."""
        expected = {"bits", "dynamic"}
        if not isinstance(fields, Mapping) or set(fields) != expected:
            raise ValueError(f"an ActivationSpec has the fields {sorted(expected)}, got {fields!r}")
        return cls(**fields)


@dataclass(frozen=True)
class QuantSpec:
    """How the weights of a layer are quantized. Hashable; equal specs mean equal grids.

    Args:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64, 128, or -1 for one group per row.
        symmetric: zero fixed at ``2**(bits-1)`` (True) or an integer per group (False). ``None``, the default, takes
            the default of the width (README, "Symmetric or asymmetric") and is resolved at once: a built spec always
            holds a bool.
        activations: None leaves the layer's input as it is. An ActivationSpec needs 8 bits and whole rows: only a scale
            per output channel can be taken out of a sum of integer products.

    Raises:
        ValueError: a field is not one of the values above; the message names the field, the value and what is allowed.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = cast(bool, None)
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES} (-1 is the whole row), got {self.group_size!r}")
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", _SYMMETRIC_BY_DEFAULT[self.bits])
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric must be True, False or None (the width's default), got {self.symmetric!r}")
        if self.activations is not None:
            if not isinstance(self.activations, ActivationSpec):
                raise ValueError(f"activations must be an ActivationSpec or None, got {self.activations!r}")
            if (self.bits, self.group_size) != (8, -1):
                raise ValueError(
                    "quantized activations need weights of 8 bits in whole rows (group_size -1), "
                    f"got {self.bits} bits and group_size {self.group_size}"
                )

    @property
    def max_code(self) -> int:
        """Largest code, ``2**bits - 1``; codes run from 0."""
        return int(2**self.bits - 1)

    @property
    def mid_code(self) -> int:
        """The zero of a symmetric grid, ``2**(bits-1)``."""
        return int(2 ** (self.bits - 1))

    def num_groups(self, k: int, name: str = "weight") -> int:
        """Number of groups G in a row of ``k`` columns.

        Raises:
            ValueError: ``group_size`` does not divide ``k``; names the layer, K and the sizes that would work.
        """
        if self.group_size == -1:
            return 1
        if k <= 0 or k % self.group_size:
            fits = [g for g in GROUP_SIZES if g == -1 or (k > 0 and k % g == 0)]
            raise ValueError(
                f"{name}: group_size {self.group_size} does not divide K = {k}; group sizes that would work: {fits}"
            )
        return k // self.group_size

    def label(self) -> str:
        """Short name for tables: ``w4g128asym``; a whole-row group is ``gch`` (per channel).

        Quantized activations follow the weights: ``w8a8gchsym``, ``w8a8staticgchsym``.
        """
        activations = "" if self.activations is None else self.activations.label()
        group = "ch" if self.group_size == -1 else str(self.group_size)
        return f"w{self.bits}{activations}g{group}{'sym' if self.symmetric else 'asym'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict with the three fields of the weights and, where there are any, ``activations``."""
        fields: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return fields if self.activations is None else {**fields, "activations": self.activations.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantSpec:
        """Inverse of :meth:`to_dict`; an unknown or missing field is a ValueError."""
        expected = {"bits", "group_size", "symmetric"}
        if set(fields) - {"activations"} != expected:
            raise ValueError(
                f"a QuantSpec has the fields {sorted(expected)} and may have 'activations', got {sorted(fields)}"
            )
        activations = fields.get("activations")
        if activations is not None:
            activations = ActivationSpec.from_dict(activations)
        return cls(fields["bits"], fields["group_size"], fields["symmetric"], activations)

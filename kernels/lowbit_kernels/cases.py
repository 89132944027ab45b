"""What a kernel module says of the compilations that it ships, so that they can be checked without a GPU.

Every module with a jit kernel has ``compile_cases() -> list[CompileCase]``: pure, no device, no compilation. The tests
(tests/compile_gate.py) compile each case for each architecture it is meant for and read what came out: spills, shared
memory, the tensor core instructions of the main loop, and how many other instructions it spends on a weight.
:func:`shipped_cases` lists them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .releases import LEAST_TOKENS

__all__ = ["ARCHITECTURES", "MODULES", "CompileCase", "shipped_cases"]

MODULES = (
    "grouped",
    "grouped_int8",
    "halves",
    "hopper",
    "int8",
    "int8_hopper",
    "int8_quantize",
    "prefill",
    "scaled",
    "weight_only_cases",
)
"""Those with ``compile_cases()``. None of them needs Gluon to be imported."""

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, as 10 * major + minor, that every case is compiled for unless it names others."""


@dataclass(frozen=True)
class CompileCase:
    """One compilation of one kernel.

    Attributes:
        name: unique in its module: what is computed and the tile, such as ``"bf16 4b g128 sym m16 n64 k128 w4 s4"``.
        kernel: the jit function, Triton's or Gluon's (Gluon: ``is_gluon()``).
        signature: type of every argument, in order: ``"*bf16"``, ``"i32"``, ``"constexpr"``, ``"tensordesc<...>"``.
        constexprs: value of every ``"constexpr"`` argument.
        divisible: names of the pointers and integers that are multiples of 16 (bytes for a pointer).
        options: ``num_warps``, ``num_stages``, ``maxnreg``, ... as for a launch.
        kind: what the case stands for when architectures are spread over cases: cases of one kind (family, dtype,
            symmetry) share the full list of architectures between them.
        archs: the architectures that the launcher would run it on.
        tokens: columns of the tensor cores' operand that one program multiplies (block_m, padded to what they need);
            0 for a kernel without matrix instructions, which has no main loop to count.
        mma_warps: warps that issue them; None: ``num_warps``.
        loop_weights: weights of one program that a pass of the main loop multiplies, block_n times the step along K.
            None: read off the matrix instructions, which is right when they multiply nothing but weights.
        wgmma: what is claimed on sm_90: ``"registers"`` (weights as the register operand), ``"shared"``, or None for
            ``mma.sync`` or no claim.
        registers_only: no weight goes through shared memory once it is unpacked, on any architecture.
        integer_budget: most integer instructions (LOP3, SHF, PRMT, IADD, IMAD, LEA, I2F, ...) per weight in the main
            loop; None: counted, not limited.
        copied_bytes: bytes of words and activations that a pass of the main loop brings in. When given, so many must
            come by 16-byte copies, and narrower ones (scales, sums) are not limited.
        wide_copies: words and activations reach shared memory by 16-byte asynchronous copies or the copy engine.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    options: Mapping[str, Any]
    kind: str
    archs: tuple[int, ...] = ARCHITECTURES
    tokens: int = 0
    mma_warps: int | None = None
    loop_weights: int | None = None
    wgmma: str | None = None
    registers_only: bool = False
    integer_budget: float | None = None
    copied_bytes: int | None = None
    wide_copies: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else a reader of a failure should see, such as the tile."""


def shipped_cases() -> Iterator[tuple[str, CompileCase]]:
    """Every case of every module that this Triton can compile, with the module's name."""
    for module in MODULES:
        for case in importlib.import_module(f".{module}", __package__).compile_cases():
            if not 0 < case.tokens < LEAST_TOKENS:
                yield module, case

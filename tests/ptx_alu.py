"""Arithmetic of PTX on 32 lanes at a time: an instruction becomes a Python expression over numpy arrays.

Registers hold bits: bool, uint16, uint32 or uint64 of shape (32,). ``R[i]`` is a register, ``K[j]`` a constant.
Semantics: PTX ISA 8.7, section 9.7. Floats are computed wider and rounded once, which is what ``.rn`` means; only
``fma`` of float32 and bfloat16 goes through float64, where an exact tie may round twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_program import PARAMETERS, Instruction

__all__ = ["NAMES", "arithmetic"]

Array = Any
LANES = np.arange(32)


def bf16_bits(x: Array) -> Array:
    """float32 -> the nearest bfloat16's 16 bits, in uint32; ties to even, every NaN 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def _pair(low: Array, high: Array) -> Array:
    return low | (high << np.uint32(16))


def _bf16x2(function: Callable[..., Array], *words: Array) -> Array:
    halves = [((w << np.uint32(16)).view(np.float32), (w & np.uint32(0xFFFF0000)).view(np.float32)) for w in words]
    low, high = (function(*(half[i].astype(np.float64) for half in halves)) for i in (0, 1))
    return _pair(bf16_bits(low.astype(np.float32)), bf16_bits(high.astype(np.float32)))


def _bf16(function: Callable[..., Array], *words: Array) -> Array:
    exact = function(*(_widen16(w, "bf16").astype(np.float64) for w in words))
    return bf16_bits(exact.astype(np.float32)).astype(np.uint16)


def _f16x2(function: Callable[..., Array], *words: Array) -> Array:
    return function(*(w.view(np.float16).astype(np.float64) for w in words)).astype(np.float16).view(np.uint32)


def _f16(function: Callable[..., Array], *halves: Array) -> Array:
    return function(*(h.view(np.float16).astype(np.float64) for h in halves)).astype(np.float16).view(np.uint16)


def _f16_bits(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _widen16(x: Array, kind: str) -> Array:
    return x.view(np.float16) if kind == "f16" else (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    out = np.zeros(32, np.uint32)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    pool = np.stack([a, b], 1).view(np.uint8)
    nibbles = (selector[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(pool, (nibbles & np.uint32(7)).astype(np.intp), 1)
    signs = np.where(chosen & np.uint8(128), np.uint8(255), np.uint8(0))
    return np.ascontiguousarray(np.where(nibbles & np.uint32(8), signs, chosen)).view(np.uint32)[:, 0]


def _shift(x: Array, by: Array, left: bool) -> Array:
    """Of 16, 32 or 64 bits; by more than those, as PTX has it: all of them."""
    bits = 8 * x.itemsize
    by = by.astype(np.int64)
    most = np.minimum(by, bits - 1).astype(x.dtype)
    if np.issubdtype(x.dtype, np.signedinteger):
        return x >> most
    return np.where(by >= bits, x.dtype.type(0), x << most if left else x >> most)


def _bfe(x: Array, start: Array, length: Array, signed: bool) -> Array:
    at, n = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    wide = x.astype(np.int64) >> at & ((np.int64(1) << np.minimum(n, 33)) - 1)
    if signed:
        top = np.minimum(at + n - 1, 31)
        sign = (x.astype(np.int64) >> top & 1).astype(bool) & (n > 0)
        wide = np.where(sign, wide | (np.int64(-1) << np.minimum(n, 33)), wide)
    return wide.astype(np.uint32)


def _truncated_quotient(a: Array, b: Array) -> Array:
    a, b = a.astype(np.int64), b.astype(np.int64)
    safe = np.where(b == 0, 1, b)
    return (np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))).astype(np.int32)


def _normal(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign (PTX ISA, ``.ftz``)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


NAMES: dict[str, Any] = {
    "np": np, "where": np.where, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s16": np.int16,
    "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16_bits": bf16_bits,
    "pair": _pair, "bf16x2": _bf16x2, "f16x2": _f16x2, "half": _f16, "brain": _bf16, "f16_bits": _f16_bits,
    "widen16": _widen16, "lop3": _lop3, "prmt": _prmt, "shift": _shift, "bfe": _bfe, "quotient": _truncated_quotient,
    "normal": _normal,
}  # fmt: skip
"""What the expressions refer to."""

_BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INTEGERS = ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64")


def _bits(kind: str) -> int:
    return (
        1
        if kind == "pred"
        else 64
        if kind == "f32x2"
        else 32
        if kind.endswith("x2")
        else int(kind.lstrip("bfsu") or 16)
    )


def _view(text: str, kind: str) -> str:
    """As numbers of a type: signed and float ones look at the bits differently."""
    return text if kind[0] in "bup" and kind != "bf16" else f"{text}.view({kind})"


def arithmetic(instruction: Instruction, operand: Callable[[Any, int], str]) -> str | None:
    """The expression for the destination's bits, or None when the instruction is not arithmetic.

    Args:
        operand: the text of an operand that has so many bits.
    """
    op = instruction.opcode
    name, kind = op[0], op[-1]
    sources = instruction.operands[1:]

    def of(i: int, kind: str = kind) -> str:
        return operand(sources[i], _bits(kind))

    if name in ("min", "max") and len(sources) == 3 and kind == "f32":  # sm_100 and later
        return f"np.f{name}(np.f{name}({of(0)}.view(f32), {of(1)}.view(f32)), {of(2)}.view(f32)).view(u32)"
    if name in _BINARY.keys() | {"min", "max"} and len(sources) != 2:
        return None
    if name == "cvt":
        return _conversion(op, operand, sources)
    if name == "setp":
        return _comparison(op, of)
    if op == ("cvta", "param", "u64"):  # what a 32-bit register held on the way has lost the base
        return f"({of(0)} | u64({PARAMETERS}))"
    if name in ("mov", "cvta") and sources:
        return of(0)
    if name == "selp":
        return f"where({operand(sources[2], 1)}, {of(0)}, {of(1)})"
    if name in ("lop3", "prmt", "bfe", "shf", "popc", "shl", "shr", "div", "rem"):
        return _bitwise(name, op, of, operand, sources)
    if kind in _INTEGERS or kind == "pred":
        return _integer(name, op, kind, of, operand, sources)
    if op[-2:-1] == ("f32",):
        return _mixed(op, of, operand, sources)
    return _floating(name, kind, of)


def _bitwise(
    name: str, op: tuple[str, ...], of: Callable[..., str], operand: Callable[[Any, int], str], sources: Any
) -> str | None:
    kind = op[-1]
    if name == "lop3":
        return f"lop3({of(0)}, {of(1)}, {of(2)}, {sources[3].value})"
    if name == "prmt" and op == ("prmt", "b32"):
        return f"prmt({of(0)}, {of(1)}, {of(2)})"
    if name == "bfe":
        return f"bfe({_view(of(0), kind)}, {of(1, 'u32')}, {of(2, 'u32')}, {kind == 's32'})"
    if name == "shf" and op == ("shf", "l", "wrap", "b32"):
        wide = f"({of(1)}.astype(u64) << u64(32) | {of(0)})"
        return f"(({wide} << ({of(2)} & u32(31)).astype(u64)) >> u64(32)).astype(u32)"
    if name == "popc":
        return f"np.bitwise_count({of(0)}).astype(u32)"
    if name in ("shl", "shr"):
        shifted = f"shift({_view(of(0), kind)}, {operand(sources[1], 32)}, {name == 'shl'})"
        return f"{shifted}.view(u{_bits(kind)})"
    if name == "div" and kind == "s32":
        return f"quotient({of(0)}.view(s32), {of(1)}.view(s32)).view(u32)"
    if name == "rem" and kind == "s32":
        return f"({of(0)} - quotient({of(0)}.view(s32), {of(1)}.view(s32)).view(u32) * {of(1)})"
    if name == "div" and op == ("div", "rn", "f32"):
        return f"({of(0)}.view(f32) / {of(1)}.view(f32)).view(u32)"
    if name == "div" and op == ("div", "rn", "ftz", "f32"):
        return f"normal(normal({of(0)}.view(f32)) / normal({of(1)}.view(f32))).view(u32)"
    return None


def _integer(
    name: str, op: tuple[str, ...], kind: str, of: Callable[..., str], operand: Callable[[Any, int], str], sources: Any
) -> str | None:
    bits = _bits(kind)
    if name in ("mul", "mad") and "wide" in op:
        wide = f"{kind[0]}{2 * bits}"
        product = f"({_view(of(0), kind)}.astype({wide}) * {_view(of(1), kind)}.astype({wide})).view(u{2 * bits})"
        return product if name == "mul" else f"({product} + {operand(sources[2], 2 * bits)})"
    if name == "mul" and "hi" in op and kind in ("u32", "s32"):
        a, b = (f"{_view(of(i), kind)}.astype({kind[0]}64)" for i in (0, 1))
        return f"(({a} * {b}) >> {kind[0]}64(32)).astype(u32)"
    if name == "mad" and "lo" in op:
        return f"({of(0)} * {of(1)} + {of(2)})"
    if name in _BINARY and (name != "mul" or "lo" in op):
        return f"({of(0)} {_BINARY[name]} {of(1)})"
    if name in ("min", "max"):
        return f"np.{name}imum({_view(of(0), kind)}, {_view(of(1), kind)}).view(u{bits})"
    if name == "not":
        return f"~{of(0)}"
    if name == "neg":
        return f"(~{of(0)} + u{bits}(1))"
    return None


_HALF = {
    "add": "lambda a, b: a + b", "sub": "lambda a, b: a - b", "mul": "lambda a, b: a * b",
    "fma": "lambda a, b, c: a * b + c",
}  # fmt: skip


def _floating(name: str, kind: str, of: Callable[..., str]) -> str | None:
    if kind in ("f16x2", "bf16x2"):
        if name == "abs":
            return f"({of(0)} & u32(0x7FFF7FFF))"
        return f"{kind}({_HALF[name]}, {', '.join(of(i) for i in range(3 if name == 'fma' else 2))})"
    if kind == "f16" and name in _HALF:
        return f"half({_HALF[name]}, {', '.join(of(i) for i in range(3 if name == 'fma' else 2))})"
    if kind == "bf16" and name == "abs":
        return f"({of(0)} & u16(0x7FFF))"
    if kind == "bf16" and name in _HALF:
        return f"brain({_HALF[name]}, {', '.join(of(i) for i in range(3 if name == 'fma' else 2))})"
    if kind not in ("f32", "f32x2"):
        return None
    if name in _BINARY:
        return f"({of(0)}.view(f32) {_BINARY[name]} {of(1)}.view(f32)).view(u{_bits(kind)})"
    if name == "fma":
        a, b, c = (f"{of(i)}.view(f32).astype(f64)" for i in range(3))
        return f"({a} * {b} + {c}).astype(f32).view(u{_bits(kind)})"
    if kind == "f32x2":
        return None
    if name in ("min", "max"):
        return f"np.f{name}({of(0)}.view(f32), {of(1)}.view(f32)).view(u32)"
    if name in ("abs", "neg"):
        return f"({of(0)} & u32(0x7FFFFFFF))" if name == "abs" else f"({of(0)} ^ u32(0x80000000))"
    return None


def _mixed(op: tuple[str, ...], of: Callable[..., str], operand: Callable[[Any, int], str], sources: Any) -> str | None:
    """Of a 16-bit number, for ``fma`` two, and one in float32: 9.7.5, "Mixed Precision Floating Point Instructions"."""
    name, kind = op[0], op[-1]
    if name not in ("add", "sub", "fma") or op[1:-2] not in ((), ("rn",)) or kind not in ("f16", "bf16"):
        return None
    a, c = f"widen16({of(0)}, {kind!r}).astype(f32)", f"{operand(sources[-1], 32)}.view(f32)"
    if name == "fma":
        return f"({a}.astype(f64) * widen16({of(1)}, {kind!r}) + {c}).astype(f32).view(u32)"
    return f"({a} {_BINARY[name]} {c}).view(u32)"


def _comparison(op: tuple[str, ...], of: Callable[..., str]) -> str | None:
    how, kind = op[1], op[-1]
    if len(op) != 3:
        return None
    a, b = (f"widen16({of(i)}, {kind!r})" if kind in ("f16", "bf16") else _view(of(i), kind) for i in (0, 1))
    if "f" not in kind:
        return f"({a} {_COMPARE[how]} {b})"
    wrong = f"(np.isnan({a}) | np.isnan({b}))"
    if how in ("nan", "num"):
        return wrong if how == "nan" else f"~{wrong}"
    if how in _COMPARE:  # a NaN compares false, also by ne; by neu and its like true
        return f"(({a} {_COMPARE[how]} {b}) & ~{wrong})"
    return f"(({a} {_COMPARE[how.removesuffix('u')]} {b}) | {wrong})"


def _conversion(op: tuple[str, ...], operand: Callable[[Any, int], str], sources: Any) -> str | None:
    to, of = op[-2], op[-1]
    modes = op[1:-2]
    if modes not in ((), ("rn",)):
        return None
    first = operand(sources[0], _bits(of))
    if of in ("f16", "bf16") and to == "f32":
        return f"widen16({first}, {of!r}).astype(f32).view(u32)"
    if of == "f32":
        bits = "f16_bits" if to.startswith("f16") else "bf16_bits"
        low = f"{bits}({first}.view(f32))"
        if to in ("f16", "bf16"):
            return f"{low}.astype(u16)"
        if to in ("f16x2", "bf16x2"):  # the first source is the upper half
            return f"pair({bits}({operand(sources[1], 32)}.view(f32)), {low})"
    if to == "bf16" and of == "u16":  # exact in fp32, then rounded
        return f"bf16_bits({first}.astype(f32)).astype(u16)"
    if to == "f32" and of in ("s32", "u32", "u16"):
        return f"{_view(first, of)}.astype(f32).view(u32)"
    if of == "s8":
        return f"{first}.astype(np.uint8).view(np.int8).astype({to}).view(u{_bits(to)})"
    if to in _INTEGERS and of in _INTEGERS:
        wide = of if _bits(to) <= _bits(of) or of[0] != "s" else f"s{_bits(to)}"
        return f"{_view(first, of)}.astype({wide.replace('b', 'u')}).astype(u{_bits(to)})"
    return None

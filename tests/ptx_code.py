"""Turns the instructions between two jumps into one Python function over a warp's registers.

Registers are ``R``, constants ``K``, the warp's memory and matrix instructions ``u`` (ptx_unit.py), its parameters
``P``; ``M`` are the lanes that take part, None when all do. One line is one instruction, so a traceback names it.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptx_alu import NAMES, arithmetic
from ptx_memory import SHARED_BASE, TensorMap
from ptx_program import PARAMETERS, Address, Immediate, Instruction, Pair, Program, Register, Special, Symbol, Vector

__all__ = ["Block", "Code", "place"]

_WAITING = ("bra", "brx", "ret", "bar", "barrier", "setmaxnreg")
_NOTHING = {"fence", "membar", "createpolicy"}
_NUMBERS = itertools.count()


def place(program: Program, values: Sequence[int | TensorMap]) -> dict[str, Any]:
    """Parameters by name: bits for all lanes, or a tensor map. Those that were not given are 0 (scratch memory)."""
    placed: dict[str, Any] = {}
    for (name, size), value in itertools.zip_longest(program.parameters, values, fillvalue=0):
        if isinstance(value, TensorMap) != (size == 128):
            raise ValueError(f"parameter {name} has {size} bytes and cannot be {value!r}")
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(size)
        placed[name] = value if kind is None else np.full(32, value & (1 << 8 * size) - 1, kind)
    return placed


def keep(mask: Any, new: Any, old: Any) -> Any:
    """New bits where the lanes take part."""
    if mask is None:
        return new
    return np.where(mask, new, np.zeros_like(new) if old is None else old)


def put(R: list[Any], registers: Sequence[int | None], values: Sequence[Any], mask: Any) -> None:
    for register, value in zip(registers, values, strict=True):
        if register is not None:
            R[register] = keep(mask, value, R[register])


def both(a: Any, b: Any) -> Any:
    return a if b is None else a & b


def pack(*parts: Any) -> Any:
    """Registers side by side in a wider one, the first lowest."""
    return np.ascontiguousarray(np.stack(parts, 1)).view(f"u{parts[0].itemsize * len(parts)}")[:, 0]


def unpack(whole: Any, count: int) -> list[Any]:
    narrow = np.ascontiguousarray(whole).view(f"u{whole.itemsize // count}").reshape(32, count)
    return [np.ascontiguousarray(narrow[:, i]) for i in range(count)]


class Block:
    """Instructions ``[start, end)``; ``last`` is the one that jumps or waits, if there is one."""

    def __init__(self, start: int, end: int, last: Instruction | None, source: list[str], texts: list[str], K: Any):
        self.start, self.end, self.last, self.texts, self.K = start, end, last, texts, K
        self.file = f"<ptx {next(_NUMBERS)}>"
        lines = ["def block(R, K, u, P, M):", *(f"    {line}" for line in source), "    pass", ""]
        scope: dict[str, Any] = {**NAMES, "keep": keep, "put": put, "both": both, "pack": pack, "unpack": unpack}
        exec(compile("\n".join(lines), self.file, "exec"), scope)
        linecache.cache[self.file] = (0, None, lines, self.file)
        self.function = scope["block"]

    def execute(self, warp: Any, mask: Any) -> None:
        self.function(warp.R, self.K, warp.unit, warp.cta.parameters, mask)

    def failing(self, error: Exception) -> str:
        """The instruction that raised it."""
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self.file:
                return self.texts[trace.tb_lineno - 2]
            trace = trace.tb_next
        return self.last.text if self.last else self.texts[-1]


class Code:
    """The blocks of a program, made when they are first reached."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks: dict[int, Block] = {}
        self.starts = set(program.labels.values())
        self.constants: list[Any] = []
        self.known: dict[tuple[int, int], str] = {}

    def block(self, start: int) -> Block:
        if start not in self.blocks:
            instructions, source, texts, at = self.program.instructions, [], [], start
            last = None
            while at < len(instructions) and last is None and (at == start or at not in self.starts):
                one = instructions[at]
                at += 1
                waits = one.opcode[:2] == ("mbarrier", "try_wait")
                if waits or (one.opcode[0] in _WAITING and one.opcode[:2] != ("bar", "warp")):
                    last = one
                if last is None or waits:
                    line = self._line(one)
                    if line is None:
                        raise ValueError(f"{self.program.name}: {one.text!r} is not known to the emulator")
                    source.append(line)
                    texts.append(one.text)
            self.blocks[start] = Block(start, at, last, source, texts, self.constants)
        return self.blocks[start]

    def _constant(self, value: int, bits: int) -> str:
        bits = max(bits, 1)
        key = value & (1 << bits) - 1, bits
        if key not in self.known:
            kind = np.bool_ if bits == 1 else np.dtype(f"u{bits // 8}")
            self.constants.append(np.full(32, key[0], kind))
            self.known[key] = f"K[{len(self.constants) - 1}]"
        return self.known[key]

    def operand(self, operand: Any, bits: int) -> str:
        """Text whose value has an operand's bits for all lanes."""
        if isinstance(operand, Register):
            return f"R[{operand.index}]"
        if isinstance(operand, Immediate):
            return self._constant(operand.value, bits)
        if isinstance(operand, Special):
            return f"u.special[{operand.name!r}]"
        if isinstance(operand, Vector):
            return f"pack({', '.join(self.operand(item, bits // len(operand.items)) for item in operand.items)})"
        if isinstance(operand, Symbol):
            name = operand.name.partition("@")[0]
            names = [parameter for parameter, _ in self.program.parameters]
            start = PARAMETERS + 4096 * names.index(name) if name in names else SHARED_BASE
            if name not in names and name != "global_smem":
                raise ValueError(f"no such symbol: {name}")
            return self._constant(start + operand.offset, bits)
        raise ValueError(f"an operand of another kind: {operand}")

    def _address(self, address: Address, bits: int) -> str:
        text = self.operand(address.base, bits)
        return f"({text} + {self._constant(address.offset, bits)})" if address.offset else text

    def _line(self, one: Instruction) -> str | None:
        op = one.opcode
        mask = "M"
        if one.predicate is not None:
            value = f"R[{one.predicate.index}]"
            mask = f"both({'~' + value if one.negated else value}, M)"
        if op[0] in _NOTHING or op[:2] in (("bar", "warp"), ("wgmma", "fence")):
            return "pass"
        special = _SPECIAL.get(op[0])
        line = special(self, one, mask) if special else None
        if line is not None:
            return line
        target = one.operands[0] if one.operands else None
        if isinstance(target, Vector) and op[0] == "mov":
            width = {"b32": 32, "b64": 64, "b128": 128}[op[-1]]
            whole = self.operand(one.operands[1], width)
            return f"put(R, {_indices(target)}, unpack({whole}, {len(target.items)}), {mask})"
        expression = arithmetic(one, self.operand)
        if expression is None or not isinstance(target, Register):
            return None
        if one.predicate is None:
            return f"R[{target.index}] = {expression} if M is None else keep(M, {expression}, R[{target.index}])"
        return f"R[{target.index}] = keep({mask}, {expression}, R[{target.index}])"


def _indices(operand: Any) -> str:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    return f"({', '.join(str(item.index) if isinstance(item, Register) else 'None' for item in items)},)"


def _registers(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _size(op: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of an element of a load or store, and how many."""
    counts = [int(part[1:]) for part in op if part in ("v2", "v4", "v8")]
    return int(op[-1][1:]) // 8, counts[0] if counts else 1


def _load(code: Code, one: Instruction, mask: str) -> str | None:
    op = one.opcode
    size, count = _size(op)
    targets = _registers(one.operands[0])
    address = one.operands[1]
    assert isinstance(address, Address)
    if op[1] == "param":
        assert isinstance(address.base, Symbol) and not address.offset
        wide = f"P[{address.base.name.partition('@')[0]!r}].astype(u{targets[0].bits})"
        return f"put(R, {_indices(targets[0])}, [{wide}], {mask})"
    space = op[1].removesuffix("::cta")
    if space not in ("global", "shared") or "relaxed" in op or "acquire" in op:
        return None
    to = f"{'i' if op[-1][0] == 's' else 'u'}{targets[0].bits // 8}"
    text = code._address(address, 64 if space == "global" else 32)
    signed = op[-1][0] == "s"
    loaded = f"u.load({space!r}, {text}, {size}, {count}, {mask}, {signed}, {to!r})"
    return f"put(R, {_indices(one.operands[0])}, {loaded}, {mask})"


def _store(code: Code, one: Instruction, mask: str) -> str | None:
    op = one.opcode
    size, _ = _size(op)
    address = one.operands[0]
    assert isinstance(address, Address)
    space = op[1].removesuffix("::cta")
    if space not in ("global", "shared") or "relaxed" in op or "release" in op:
        return None
    text = code._address(address, 64 if space == "global" else 32)
    values = ", ".join(code.operand(item, 8 * size) for item in _registers(one.operands[1]))
    return f"u.store({space!r}, {text}, [{values}], {size}, {mask})"


def _atomic(code: Code, one: Instruction, mask: str) -> str | None:
    if one.opcode not in (("atom", "global", "gpu", "acq_rel", "add", "u32"),):
        return None
    target, address, value = one.operands
    text = code._address(address, 64)  # type: ignore[arg-type]
    return f"put(R, {_indices(target)}, [u.atomic_add({text}, {code.operand(value, 32)}, {mask})], {mask})"


def _cp(code: Code, one: Instruction, mask: str) -> str | None:
    op, operands = one.opcode, one.operands
    if op[:3] == ("cp", "async", "commit_group"):
        return "u.commit_copies()"
    if op[:3] == ("cp", "async", "wait_group"):
        return f"u.wait_copies({operands[0].value})"  # type: ignore[union-attr]
    if op[2] in ("cg", "ca"):
        operands = operands[:-1] if "L2::cache_hint" in op else operands  # which lines the L2 keeps changes no value
        shared, source = (code._address(operands[i], 64 if i else 32) for i in (0, 1))  # type: ignore[arg-type]
        given = code.operand(operands[3], 32) if len(operands) > 3 else "None"
        return f"u.copy({shared}, {source}, {operands[2].value}, {given}, {mask})"  # type: ignore[union-attr]
    if op[2:4] == ("bulk", "tensor"):
        shared, source, barrier = operands
        assert isinstance(source, Address) and isinstance(shared, Address) and isinstance(barrier, Address)
        at = ", ".join(code.operand(item, 32) for item in source.coordinates)
        where = f"{code._address(shared, 32)}, {code.operand(source.base, 64)}"
        return f"u.copy_tensor({where}, [{at}], {code._address(barrier, 32)}, P, {mask})"
    return None


def _grid_control(code: Code, one: Instruction, mask: str) -> str | None:
    if one.opcode[1] == "launch_dependents":
        return "u.let_next_begin()"
    return f"u.wait_for_previous({mask})" if one.opcode[1] == "wait" else None


def _prefetch(code: Code, one: Instruction, mask: str) -> str | None:
    address = one.operands[0]
    if one.opcode[1:] != ("global", "L2") or not isinstance(address, Address):
        return None
    return f"u.prefetch({code._address(address, 64)}, {mask})"


def _mbarrier(code: Code, one: Instruction, mask: str) -> str | None:
    kind, operands = one.opcode[1], one.operands
    places = [operand for operand in operands if isinstance(operand, Address)]
    at = code._address(places[0], 32)
    if kind == "try_wait":
        return f"u.ask({at}, {code.operand(operands[2], 32)})"
    if kind == "init":
        return f"u.initialise({at}, {operands[1].value}, {mask})"  # type: ignore[union-attr]
    if kind == "arrive" and "expect_tx" in one.opcode:
        return f"u.arrive({at}, {code.operand(operands[-1], 32)}, {mask})"
    if kind == "arrive" and len(operands) == 2:
        return f"u.arrive({at}, None, {mask})"
    if kind == "inval":
        return "pass"
    return None


def _lanes(code: Code, one: Instruction, mask: str) -> str | None:
    op, operands = one.opcode, one.operands
    if op[0] == "elect":
        assert isinstance(operands[0], Pair)
        registers = operands[0].first, operands[0].second
        return f"put(R, {_indices(Vector(registers))}, u.elect(M), M)"
    if op[0] == "redux":
        return f"put(R, {_indices(operands[0])}, [u.reduce({op[2]!r}, {code.operand(operands[1], 32)}, M)], M)"
    a, b, limit = (code.operand(operand, 32) for operand in operands[1:4])
    return f"put(R, {_indices(operands[0])}, [u.shuffle({op[2]!r}, {a}, {b}, {limit}, M)], {mask})"


def _matrix(code: Code, one: Instruction, mask: str) -> str | None:
    op, operands = one.opcode, one.operands
    if op[0] == "ldmatrix":
        at = code._address(operands[1], 32)  # type: ignore[arg-type]
        count = len(_registers(operands[0]))
        return f"put(R, {_indices(operands[0])}, u.load_matrix({at}, {count}, {'trans' in op}, M), M)"
    if op[0] == "stmatrix":
        values = ", ".join(code.operand(item, 32) for item in _registers(operands[1]))
        at = code._address(operands[0], 32)  # type: ignore[arg-type]
        return f"u.store_matrix({at}, [{values}], {'trans' in op}, M)"
    if op[0] == "mma":
        lists = [f"[{', '.join(code.operand(item, 32) for item in _registers(part))}]" for part in operands[1:4]]
        return f"put(R, {_indices(operands[0])}, u.multiply({', '.join(lists)}, {op[-2]!r}, {op[-1]!r}, M), M)"
    if op[1] == "commit_group":
        return "u.commit_products()"
    if op[1] == "wait_group":
        return f"u.wait_products({operands[0].value})"  # type: ignore[union-attr]
    if len(operands) > 6 and operands[6].value:  # type: ignore[union-attr]
        return None  # a transposed operand in shared memory
    a = _indices(operands[1]) if isinstance(operands[1], Vector) else code.operand(operands[1], 64)
    scale = code.operand(operands[3], 1)
    b = code.operand(operands[2], 64)
    return f"u.start_product({_indices(operands[0])}, {a}, {b}, {scale}, {op[-1]!r}, {op[-3]!r}, M)"


_SPECIAL: Mapping[str, Any] = {
    "ld": _load, "st": _store, "atom": _atomic, "cp": _cp, "mbarrier": _mbarrier, "elect": _lanes, "redux": _lanes,
    "shfl": _lanes, "ldmatrix": _matrix, "stmatrix": _matrix, "mma": _matrix, "wgmma": _matrix,
    "griddepcontrol": _grid_control, "prefetch": _prefetch,
}  # fmt: skip

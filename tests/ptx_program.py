"""Reads the PTX that Triton writes into instructions (PTX ISA 8.7, sections 4 to 6: syntax, directives, operands).

    program = parse(text)
    program.parameters       names and sizes in bytes, in order
    program.instructions     Instruction(predicate, negated, opcode, operands, text), labels by name in program.labels

Registers become indices into one list per warp; those that inline assembly declares in braces are renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "PARAMETERS",
    "Address",
    "Immediate",
    "Instruction",
    "Pair",
    "Program",
    "Register",
    "Special",
    "Symbol",
    "Vector",
    "parse",
]

PARAMETERS = 1 << 44
"""Where the first parameter of a kernel is; the others follow, 4096 bytes apart."""
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u32": 32, "s32": 32, "f32": 32, "u64": 64, "f64": 64}


@dataclass(frozen=True)
class Register:
    """One register of a warp's file: ``bits`` is 1 for a predicate."""

    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as the bits of the instruction's type."""

    value: int


@dataclass(frozen=True)
class Special:
    """``%tid.x``, ``%ctaid.y``, ..."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or shared memory, with a constant added; ``@`` and a number where it is used in braces."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, c, d}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; of a tensor ``[base, {coordinates}]``."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


Operand = Register | Immediate | Special | Symbol | Vector | Pair | Address


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``, the opcode at its dots."""

    predicate: Register | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass
class Program:
    """One entry point."""

    name: str
    parameters: list[tuple[str, int]]
    threads: int
    allotted: int = 0  # registers of a thread when it starts, where the program says
    registers: list[int] = field(default_factory=list)  # bits of each
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)

    def target(self, symbol: Symbol) -> int:
        """The instruction that a label stands before: one of the braces it is used in, else of the function."""
        return self.labels[symbol.name if symbol.name in self.labels else symbol.name.partition("@")[0]]


def parse(text: str) -> Program:
    """The one entry point of a PTX module.

    Raises:
        ValueError: something is not as Triton writes it; the message has the line.
    """
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)
    head = re.search(r"\.visible \.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
    if head is None:
        raise ValueError("no entry point")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise ValueError(f"{head[1]}: the number of threads is not given: {head[3].strip()!r}")
    parameters = [_parameter(line) for line in head[2].split(",") if line.strip()]
    allotted = re.search(r"\.maxnreg\s+(\d+)", head[3])
    program = Program(head[1], parameters, int(threads[1]), int(allotted[1]) if allotted else 0)
    _Body(program).read(_statements(text[head.end() :]))
    return program


def _parameter(declaration: str) -> tuple[str, int]:
    found = re.search(
        r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[\w\s.]*?\s)?(\w+)(?:\[(\d+)\])?\s*$", declaration
    )
    if found is None:
        raise ValueError(f"cannot read the parameter {declaration.strip()!r}")
    return found[2], BITS.get(found[1], int(re.sub(r"\D", "", found[1]))) // 8 * int(found[3] or 1)


def _statements(body: str) -> Iterator[str]:
    """Statements, labels (with their colon), and the braces of scopes, up to the end of the function."""
    depth, start, i = 1, 0, 0
    while depth:
        char = body[i]
        blank = not body[start:i].strip()
        if char == ";":
            yield body[start:i].strip()
            start = i + 1
        elif char == ":" and re.fullmatch(r"\s*[$\w]+", body[start:i]) and body[i + 1 : i + 2] != ":":
            yield body[start:i].strip() + ":"
            start = i + 1
        elif char == "\n" and re.match(r"\s*\.(loc|file|pragma)\b", body[start:i]):
            start = i + 1
        elif char == "{" and blank:
            depth += 1
            yield "{"
            start = i + 1
        elif char == "{":  # of a vector, or of the targets of a branch: to its end
            i = body.index("}", i)
        elif char == "}":
            depth -= 1
            yield "}"
            start = i + 1
        i += 1


class _Body:
    """The statements of a function, one after the other."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, Register]] = [{}]
        self.numbers = [0]  # of the open scopes
        self.opened = 0

    def read(self, statements: Iterator[str]) -> None:
        for statement in statements:
            try:
                self._statement(statement)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{self.program.name}: {statement!r}: {error}") from error

    def _statement(self, statement: str) -> None:
        if statement == "{":
            self.opened += 1
            self.scopes.append({})
            self.numbers.append(self.opened)
        elif statement == "}":
            self.scopes.pop()
            self.numbers.pop()
        elif statement.endswith(":"):
            self.program.labels[self._label(statement[:-1])] = len(self.program.instructions)
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith(".branchtargets"):
            label = next(reversed(self.program.labels))
            self.program.branch_targets[label] = [name.strip() for name in statement.split(None, 1)[1].split(",")]
        elif statement and not statement.startswith((".loc", ".file", ".pragma")):
            self.program.instructions.append(self._instruction(statement))

    def _label(self, name: str) -> str:
        """Names within braces are local to them, and repeat where inline assembly does."""
        if len(self.scopes) == 1:
            return name
        return f"{name}@{self.numbers[-1]}"

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        bits = BITS[kind.lstrip(".")]
        for name in names.split(","):
            counted = re.fullmatch(r"\s*(%\w+?)<(\d+)>\s*", name)
            plain = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name.strip()]
            for one in plain:
                self.scopes[-1][one] = Register(len(self.program.registers), bits, one)
                self.program.registers.append(bits)

    def _instruction(self, statement: str) -> Instruction:
        guard = re.match(r"@(!?)\s*([%\w]+)\s+", statement)
        rest = statement[guard.end() :] if guard else statement
        opcode, _, arguments = rest.partition(" ") if "\t" not in rest else rest.replace("\t", " ").partition(" ")
        operands = tuple(self._operand(word) for word in _split(arguments))
        predicate = self._register(guard[2]) if guard else None
        return Instruction(predicate, bool(guard and guard[1]), tuple(opcode.split(".")), operands, statement)

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise ValueError(f"no register {name}")

    def _operand(self, word: str) -> Operand:
        if word.startswith("{"):
            return Vector(tuple(self._operand(item) for item in _split(word[1:-1])))
        if word.startswith("["):
            return self._address(word[1:-1])
        if "|" in word:
            first, second = word.split("|")
            return Pair(self._operand(first), self._operand(second))
        if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|clusterid|cluster_ctarank)(\.x)?", word):
            return Special(word)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", word):
            return Immediate(int(word[2:], 16))
        if re.fullmatch(r"\d+\.\d+", word):  # of createpolicy alone; other constants come as bits
            return Immediate(int(np.float32(word).view(np.uint32)))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", word):
            return Immediate(int(word.rstrip("U"), 0))
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        named = re.fullmatch(r"([$\w]+)(?:\+(\d+))?", word)
        if named is None or word.startswith("%"):
            raise ValueError(f"cannot read the operand {word!r}")
        return Symbol(self._label(named[1]), int(named[2] or 0))

    def _address(self, inside: str) -> Address:
        base, *coordinates = _split(inside)
        found = re.fullmatch(r"\s*([%$\w]+)\s*(?:([+-])\s*(-?\w+))?\s*", base)
        if found is None:
            raise ValueError(f"cannot read the address [{inside}]")
        offset = int(found[3] or "0", 0) * (-1 if found[2] == "-" else 1)
        vector = self._operand(coordinates[0]) if coordinates else Vector(())
        assert isinstance(vector, Vector)
        return Address(self._operand(found[1]), offset, vector.items)


def _split(arguments: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(arguments):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and not depth:
            parts.append(arguments[start:i])
            start = i + 1
    parts.append(arguments[start:])
    return [part.strip() for part in parts if part.strip()]

"""What a compiled kernel's machine code spends: its main loop's instructions, per weight that the loop multiplies.

The main loop is the innermost one with the most tensor core work. How many weights one pass of it
handles is read off those instructions: their multiply-accumulates over the warps that issue them, divided by the
columns (tokens) of the other operand. Unrolling and peeling therefore need not be known.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

__all__ = [
    "INTEGER",
    "Instruction",
    "LoopFigures",
    "before_wait",
    "instructions",
    "loop_figures",
    "macs",
    "main_loop",
    "product_loops",
]

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.MULTILINE)
_GLOBAL = ("LDG", "LDGSTS", "STG", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG", "LD", "ST")
_TARGET = re.compile(r"0x([0-9a-f]+)")

_LOGIC = {"LOP3", "SHF", "SHL", "SHR", "PRMT", "BFE", "BFI", "SGXT", "BMSK", "SEL", "IABS", "IMNMX", "VIMNMX", "ISETP"}
INTEGER = _LOGIC | {"IADD", "IADD3", "VIADD", "IMAD", "LEA", "I2F", "I2FP", "F2I"}
"""Instructions of the integer and conversion pipes, by their first part."""
MOVES = ("IMAD.MOV", "IMAD.U32")
"""Spellings of a register move: part of the total, not of the integer instructions."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class LoopFigures:
    """Counts over one pass of the main loop.

    Attributes:
        instructions: opcodes by their first part, per warp.
        weights: weights of one program that a pass multiplies; 0 when there is no loop with matrix instructions.
        multiplied: what the matrix instructions of a pass amount to; more than ``weights`` where they also sum x.
        lop3, integer, total: instructions per weight, of a lane: 1.0 is one instruction slot of one lane.
        sts_bytes: bytes stored to shared memory per weight.
        narrow_bytes: share of the bytes copied asynchronously (LDGSTS) by copies narrower than 16 bytes.
        wide_bytes: bytes of one program that a pass copies by LDGSTS of 16 bytes, were every lane to take part.
        wide: how words reach the program: "LDGSTS.128", "TMA", "LDG.128" or "".
        wgmma_a: "registers", "shared", "both" or "" for the left operand of the HGMMA / IGMMA in the loop.
        waits: WARPGROUP.DEPBAR in the loop per HGMMA / IGMMA.
    """

    instructions: dict[str, int]
    weights: int
    multiplied: int
    lop3: float
    integer: float
    total: float
    sts_bytes: float
    narrow_bytes: float
    wide_bytes: int
    wide: str
    wgmma_a: str
    waits: float


def instructions(sass: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``'s text, in order of address."""
    return [Instruction(int(address, 16), op, rest.strip()) for address, _, op, rest in _LINE.findall(sass)]


def before_wait(sass: str) -> int | None:
    """Accesses to global memory in front of griddepcontrol.wait (ACQBULK), prefetches apart; None where there is none.

    Letting the next kernel begin (PREEXIT) counts as one. Of code whose warps have parts of their own the order in
    memory is no order of time: not counted.
    """
    code = instructions(sass)
    waits = [index for index, one in enumerate(code) if one.base == "ACQBULK"]
    if not waits or not any(one.base == "PREEXIT" for one in code):
        return None
    if any(one.base == "USETMAXREG" for one in code):
        return 0
    return sum(one.base in _GLOBAL or one.base == "PREEXIT" for one in code[: waits[0]])


def macs(instruction: Instruction) -> int:
    """Multiply-accumulates of one tensor core instruction (of a warp, for wgmma of a warpgroup); 0 for others."""
    parts = instruction.opcode.split(".")
    if parts[0] in ("HGMMA", "IGMMA", "QGMMA"):
        m, n, k = (int(size) for size in parts[1].split("x"))
        return m * n * k
    if parts[0] in ("HMMA", "IMMA", "QMMA"):
        # 16816: m 16, n 8, k 16; 1688: m 16, n 8, k 8; 16832, 16864 the same with more k
        return 16 * 8 * int(parts[1][3:])
    return 0


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most tensor core work; [] when none has any.

    A loop is the range of a backward branch. One that holds a smaller loop with a quarter of its work or more is not
    innermost: it is the loop over output tiles around the one along K.
    """
    loops = []
    for index, instruction in enumerate(code):
        target = _branch_target(instruction)
        if target is None or target > instruction.address:
            continue
        body = [i for i in code[: index + 1] if i.address >= target]
        work = sum(map(macs, body))
        if work:
            loops.append((work, body))
    innermost = [
        (work, body)
        for work, body in loops
        if not any(other is not body and _inside(other, body) and 4 * less >= work for less, other in loops)
    ]
    return max(innermost, key=lambda loop: (loop[0], -len(loop[1])), default=(0, []))[1]


def loop_figures(sass: str, *, tokens: int, warps: int, weights: int | None = None) -> LoopFigures:
    """Figures of the main loop of one kernel.

    Args:
        sass: ``cuobjdump -sass``'s text of a cubin with one kernel.
        tokens: columns of the right operand of one program.
        warps: warps that issue the tensor core instructions.
        weights: how many a pass multiplies, where the loop multiplies other things too; None: all that it multiplies.
    """
    body = main_loop(instructions(sass))
    counts = Counter(i.base for i in body)
    work = sum(macs(i) * (warps // 4 if "GMMA" in i.base else warps) for i in body)
    multiplied = work // tokens if tokens else 0
    weights = weights if weights and multiplied else multiplied
    lanes = warps * 32 / weights if weights else 0.0
    gmma = [i for i in body if i.base in ("HGMMA", "IGMMA", "QGMMA")]
    return LoopFigures(
        instructions=dict(sorted(counts.items())),
        weights=weights,
        multiplied=multiplied,
        lop3=counts["LOP3"] * lanes,
        integer=sum(i.base in INTEGER and not i.opcode.startswith(MOVES) for i in body) * lanes,
        total=len(body) * lanes,
        sts_bytes=sum(_width(i) for i in body if i.base in ("STS", "STSM")) * lanes,
        narrow_bytes=_narrow_share(body),
        wide_bytes=16 * 32 * warps * sum(i.base == "LDGSTS" and _width(i) == 16 for i in body),
        wide=_wide(body),
        wgmma_a=_left_operands(gmma),
        waits=sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in body) / max(1, len(gmma)),
    )


def _inside(body: list[Instruction], other: list[Instruction]) -> bool:
    return len(body) < len(other) and other[0].address <= body[0].address and body[-1].address <= other[-1].address


def _branch_target(instruction: Instruction) -> int | None:
    if instruction.base != "BRA":
        return None
    found = _TARGET.findall(instruction.operands)
    return int(found[-1], 16) if found else None


def _width(instruction: Instruction) -> int:
    """Bytes per lane that a load or store moves."""
    if instruction.base == "STSM":
        return 4 * int(found[1]) if (found := re.search(r"\.(\d)$", instruction.opcode)) else 4
    parts = instruction.opcode.split(".")
    for size in ("128", "64"):
        if size in parts:
            return int(size) // 8
    return 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4


def _narrow_share(body: list[Instruction]) -> float:
    copied = [_width(i) for i in body if i.base == "LDGSTS"]
    return sum(width for width in copied if width < 16) / sum(copied) if copied else 0.0


def _wide(body: list[Instruction]) -> str:
    if any(i.base in ("UTMALDG", "UBLKCP") for i in body):
        return "TMA"
    if any(i.base == "LDGSTS" and _width(i) == 16 for i in body):
        return "LDGSTS.128"
    if any(i.base == "LDG" and _width(i) == 16 for i in body):
        return "LDG.128"
    return ""


def _left_operands(gmma: list[Instruction]) -> str:
    """Where wgmma's left operand comes from: a descriptor alone is shared memory, a register before it is registers."""
    kinds = set()
    for instruction in gmma:
        operands = [part.strip() for part in instruction.operands.split(",")]
        kinds.add("shared" if operands[1].startswith("gdesc") else "registers")
    return "both" if len(kinds) == 2 else next(iter(kinds), "")


def product_loops(sass: str) -> list[list[Instruction]]:
    """Every innermost loop with asynchronous products, one per warpgroup. Waits' retries jump back too, but always."""
    found = [
        (int(m[1], 16), m[2], Instruction(int(m[1], 16), m[3], m[4].strip()))
        for m in map(_LINE.match, sass.splitlines())
        if m
    ]
    ranges = []
    for address, guard, one in found:
        target = _TARGET.search(one.operands)
        if one.opcode == "BRA" and guard and target and int(target[1], 16) <= address:
            body = [other for at, _, other in found if int(target[1], 16) <= at <= address]
            if any(other.base == "HGMMA" for other in body):
                ranges.append((int(target[1], 16), address, body))
    return [
        body
        for low, high, body in ranges
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b, _ in ranges)
    ]

"""Compiles whatever dispatch can choose, for every kind of weight: what the compile gate samples, in full.

    python tests/compile_sweep.py 80 90            all of these architectures' programs; exit status 1 where one spills
    python tests/compile_sweep.py 90 --hopper      and every shipped tile in Gluon with every kind of weight
    python tests/compile_sweep.py 80 --only " m16 n64"     those whose name this regular expression is found in

Some 450 programs per architecture and thirteen minutes of one core, so no test runs it: it is for changes of the
kernels, of the tables and of Triton. Spills, shared memory and the assembler's warnings count. With ``--all`` the other
complaints of compile_gate.py are printed too; its budgets of instructions are those of the weights that the gate has.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from compile_gate import SPILLS, Figures, compile_one, complaints
from lowbit_kernels import grouped, hopper, scaled
from lowbit_kernels.cases import ARCHITECTURES, CompileCase
from lowbit_kernels.dispatch import choose
from lowbit_kernels.grouped_routing import routed_case
from lowbit_kernels.grouped_tiles import grouped_tile
from lowbit_kernels.table import tables
from lowbit_kernels.tiles import BITS, GROUPS, HOPPER, Problem, Tile, fits, shared_limit
from lowbit_kernels.weight_only_cases import compile_case

SHAPES = (
    (512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336), (5632, 2048), (6144, 4096), (8192, 8192),
    (8192, 28672), (10240, 8192), (28672, 4096), (57344, 8192),
)  # fmt: skip
TOKENS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
EXPERTS = 8


def kinds() -> Iterator[Problem]:
    """One problem for every kind of weight."""
    for bits, group, dtype, asymmetric in itertools.product(
        BITS, GROUPS, (torch.bfloat16, torch.float16), (False, True)
    ):
        yield Problem(1, 4096, 8192, bits, group, dtype, asymmetric)


def chosen(arch: int) -> Iterator[CompileCase]:
    """A case for every (tile, kind of weight) of the Triton family that dispatch chooses for some problem."""
    names = [None, *(name for name, table in tables().items() if table.arch == arch)]
    found: dict[tuple[Tile, Problem], None] = {}
    for kind in kinds():
        for (n, k), m, name, invariant in itertools.product(SHAPES, TOKENS, names, (False, True)):
            tile = choose(replace(kind, m=m, n=n, k=k), arch, gpu_name=name, batch_invariant=invariant)
            if tile.family == "triton":  # two programs that share a tile are compiled as sixteen are
                found[replace(tile, split_k=min(2, tile.split_k)), replace(kind, m=4 * tile.block_m)] = None
    for tile, problem in found:
        yield compile_case(tile, problem, (arch,))
    experts: dict[tuple[Tile, Problem], None] = {}
    for kind, m, name in itertools.product(kinds(), TOKENS, names):
        tile = grouped_tile(replace(kind, m=m), EXPERTS, arch, gpu_name=name)
        experts[tile, replace(kind, m=4 * tile.block_m)] = None
    for tile, problem in experts:
        case = compile_case(tile, problem, (arch,))
        routed = routed_case(case, grouped.grouped_kernel, "grouped", has_slots=problem.asymmetric)
        yield replace(routed, name=f"experts {case.name}")


def in_gluon() -> Iterator[CompileCase]:
    """Every tile of the families for sm_90 with every kind of weight that it can run."""
    for module in (hopper, scaled):
        tiles = dict.fromkeys(case.extra["tile"] for case in module.compile_cases())
        for tile, kind in itertools.product(tiles, kinds()):
            problem = replace(kind, m=4 * tile.block_m)
            if fits(tile, problem, 90):
                yield module.compile_case(tile, problem)


def spoiled(case: CompileCase, arch: int, figures: Figures) -> bool:
    """Whether a program spills, does not fit, or has its matrix instructions one after the other."""
    allowed = SPILLS if case.kernel.is_gluon() else 0
    bound = min(shared_limit(arch), case.extra.get("shared_bound", shared_limit(arch)))
    serial = any("C7515" in line for line in figures.warnings)
    return max(figures.spills, figures.stack) > allowed or figures.shared > bound or serial


def main() -> int:
    """Compile, print a line for each program that something is wrong with, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archs", type=int, nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--hopper", action="store_true", help=f"the families {', '.join(HOPPER)} too")
    parser.add_argument("--only", metavar="REGEX", default="", help="compile only what is named like this")
    parser.add_argument("--all", action="store_true", help="report every complaint of the compile gate")
    arguments = parser.parse_args()
    bad = 0
    for arch in arguments.archs:
        started, count = time.perf_counter(), 0
        for case in itertools.chain(chosen(arch), in_gluon() if arguments.hopper and arch == 90 else ()):
            if not re.search(arguments.only, case.name):
                continue
            figures = compile_one(case, arch)
            wrong = spoiled(case, arch, figures)
            said = complaints(case, arch, figures)
            bad, count = bad + wrong, count + 1
            if wrong or (said and arguments.all):
                print(f"sm_{arch} {case.name}: {'; '.join(said)}", flush=True)
        print(f"sm_{arch}: {count} programs in {time.perf_counter() - started:.0f} s, {bad} spoiled so far", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Compiles the kernels' shipped cases for every architecture without a GPU, and says what is wrong with the results.

    cases()                     every CompileCase of lowbit_kernels, by (module, name)
    planned(cases)              which of them for which architectures: each tile on the demanding ones, each kind on all
    compile_all(plan, folder)   figures of every (module, name, arch), from the cache or compiled by a few processes
    complaints(case, arch, f)   sentences: what the figures break

Compiling takes about a second per case, so figures are kept in .compile_cache/ under a hash of everything that they
depend on: the kernel's source and all it calls, types, constants, options, architecture, compiler, and this code.
LOWBIT_COMPILE_CACHE names another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from lowbit_kernels.cases import CompileCase, shipped_cases
from lowbit_kernels.overlap import launch_options
from lowbit_kernels.releases import release
from lowbit_kernels.tiles import shared_limit
from sass_figures import LoopFigures, before_wait, loop_figures

__all__ = ["DEMANDING", "Figures", "cases", "compile_all", "compile_one", "complaints", "planned"]

CACHE = Path(os.environ.get("LOWBIT_COMPILE_CACHE") or Path(__file__).parent.parent / ".compile_cache")
DEMANDING = (80, 90)
"""Where a tile is likeliest to go wrong: the oldest code generation (which spilled first), and wgmma."""
STS_LIMIT = 0.25
"""Bytes stored to shared memory per weight in the main loop. Unpacked weights that went that way would be 2."""
NARROW_LIMIT = 0.1
"""Share of the asynchronously copied bytes that copies of less than 16 bytes may carry: scales, not weights."""
SPILLS = 256 if release() >= (3, 8) else 0
"""Bytes of spills and stack allowed to kernels in Gluon. ptxas 12.9, which Triton 3.8 and 3.9 bring, spills up to 48
words outside of the main loop in three of them; their shapes were found with 12.8."""
SLACK = 1.0 if (3, 5) <= release() < (3, 8) else 1.07
"""Factor on the budgets of integer instructions, which were found with Triton 3.6."""
KEPT = 4000
"""Figures that stay in the cache's folder; the oldest beyond it are deleted."""

Key = tuple[str, str, int]
"""Module, case name, architecture."""


@dataclass(frozen=True)
class Figures:
    """What one compilation came to: registers per thread, bytes of stack, spills and shared memory, the main loop.

    before_wait: accesses to global memory before the kernel before has ended; None where it does not wait for one.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    warnings: tuple[str, ...]
    tcgen05: bool
    loop: LoopFigures
    before_wait: int | None = None


@lru_cache(maxsize=1)
def cases() -> dict[tuple[str, str], CompileCase]:
    """Every case that a module of lowbit_kernels ships, by (module, name)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels of a process with TRITON_INTERPRET=1 are interpreted and cannot be compiled")
    found = {}
    for module, case in shipped_cases():
        name = case.name
        if (module, name) in found:  # the same tile, compiled differently for other architectures
            assert not set(found[module, name].archs) & set(case.archs), f"{module} has two cases called {name!r}"
            name = f"{name} sm_{case.archs[0]}"
        found[module, name] = case
    return found


def planned(shipped: Mapping[tuple[str, str], CompileCase]) -> list[Key]:
    """Each case on those of DEMANDING that it allows; every other architecture on the first of its kind to allow it."""
    seen: set[tuple[str, str, int]] = set()
    plan = []
    for (module, name), case in shipped.items():
        new = [arch for arch in case.archs if (module, case.kind, arch) not in seen]
        seen.update((module, case.kind, arch) for arch in new)
        plan += [(module, name, arch) for arch in case.archs if arch in DEMANDING or arch in new]
    return plan


def compile_all(plan: Iterable[Key], folder: Path = CACHE, workers: int | None = None) -> dict[Key, Figures | str]:
    """Figures of every planned compilation, or the compiler's message where it failed.

    Args:
        folder: the cache; made when missing.
        workers: processes; None: LOWBIT_TEST_WORKERS or 2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{_hash(key)}.json" for key in plan}
    missing = [key for key, file in files.items() if not file.exists()]
    if missing:
        workers = workers or int(os.environ.get("LOWBIT_TEST_WORKERS", "2"))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
            for key, result in zip(missing, pool.map(_compile_key, missing), strict=True):
                _write(files[key], {"case": list(key), **result})
    _forget_oldest(folder)
    return {key: _read(file) for key, file in files.items()}


def compile_one(case: CompileCase, arch: int) -> Figures:
    """Compile here and now, without the cache. Raises whatever the compiler raises."""
    kernel, sass, log = _compile(case, arch)
    warps = case.mma_warps or case.options.get("num_warps", 4)
    return Figures(
        *_ptxas_figures(log),
        shared=kernel.metadata.shared,
        warnings=tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d|warning", line)),
        tcgen05="UTCHMMA" in sass or "UTCIMMA" in sass or "UTCQMMA" in sass,
        loop=loop_figures(sass, tokens=case.tokens, warps=warps, weights=_loop_weights(case)),
        before_wait=before_wait(sass),
    )


def machine_code(case: CompileCase, arch: int) -> str:
    """The disassembly of one compilation, here and now."""
    return _compile(case, arch)[1]


def _compile(case: CompileCase, arch: int) -> tuple[Any, str, str]:
    """The compiled kernel, its machine code and what the assembler said."""
    names = list(case.signature)
    make = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = make(
        case.kernel,
        dict(case.signature),
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    log = io.StringIO()
    options = {**launch_options(), **case.options}
    with tempfile.TemporaryDirectory() as scratch, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = scratch
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return kernel, _disassemble(cubin), log.getvalue() or _assembled_again(kernel, arch, Path(scratch))


def _assembled_again(kernel: Any, arch: int, scratch: Path) -> str:
    """What ptxas says: Triton 3.4 keeps that to itself."""
    ptx = scratch / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"], encoding="utf-8")
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], flags=re.M)
    assert target is not None
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    own = tools / "ptxas-blackwell"
    ptxas = own if arch >= 100 and own.exists() else tools / "ptxas"
    command = [ptxas, "-v", f"--gpu-name={target[1]}", ptx, "-o", scratch / "again.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def complaints(case: CompileCase, arch: int, figures: Figures) -> list[str]:
    """What is wrong with a compilation, one sentence each; [] when it keeps everything that the case claims."""
    loop, found = figures.loop, []
    spills = SPILLS if case.kernel.is_gluon() else 0
    if max(figures.stack, figures.spills) > spills:
        found.append(f"{figures.spills} bytes of spills and {figures.stack} of stack, allowed {spills}")
    if figures.shared > shared_limit(arch):
        found.append(f"{figures.shared} bytes of shared memory, sm_{arch} has {shared_limit(arch)}")
    bound = case.extra.get("shared_bound")
    if bound is not None and figures.shared > bound:
        found.append(f"{figures.shared} bytes of shared memory, but tiles.shared_bytes promises at most {bound}")
    found += [f"the assembler says: {line}" for line in figures.warnings if re.search(r"C7515|C7508|C7510", line)]
    if case.constexprs.get("PDL"):
        if figures.before_wait is None:
            found.append("PDL, but it does not let the next kernel begin or does not wait for the one before")
        elif figures.before_wait:
            found.append(f"{figures.before_wait} accesses to global memory before it waits for the kernel before")
    if not case.tokens or (figures.tcgen05 and not loop.weights):
        return found  # no matrix instructions, or those of sm_100, which take no operand from registers
    if not loop.weights:
        return [*found, "no loop with tensor core instructions"]
    said = _loop_weights(case)
    if said and not 0.99 <= loop.multiplied / said <= 2.01:
        found.append(f"a pass of the main loop multiplies {loop.multiplied} weights, the case says {said}")
    if case.wgmma and arch == 90 and loop.wgmma_a != case.wgmma:
        found.append(f"wgmma takes the weights from {loop.wgmma_a or 'nothing: there is none'}, claimed {case.wgmma}")
    if case.registers_only and loop.sts_bytes > STS_LIMIT:
        found.append(f"{loop.sts_bytes:.2f} bytes per weight stored to shared memory, allowed {STS_LIMIT}")
    if case.wide_copies and not loop.wide:
        found.append("no 16-byte copy in the main loop")
    expected = case.copied_bytes or _copied_bytes(case, loop)
    if case.wide_copies and expected and "LDGSTS" in loop.wide and loop.wide_bytes < 0.99 * expected:
        found.append(f"{loop.wide_bytes} bytes in 16-byte copies per pass, words and activations are {expected}")
    if case.wide_copies and not expected and loop.narrow_bytes > NARROW_LIMIT:
        found.append(
            f"{loop.narrow_bytes:.0%} of the copied bytes in copies below 16 bytes, allowed {NARROW_LIMIT:.0%}"
        )
    if case.integer_budget is not None and loop.integer > SLACK * case.integer_budget:
        found.append(f"{loop.integer:.3f} integer instructions per weight, allowed {SLACK * case.integer_budget:.3f}")
    return found


def _loop_weights(case: CompileCase) -> int | None:
    """Weights per pass where the loop also multiplies x with ones (SUMS_BY_DOT of weight_only.py): one unit per row."""
    if case.loop_weights is None and case.constexprs.get("SUMS") == 1:
        return int(case.constexprs["BLOCK_N"] * 512 // case.constexprs["BITS"])
    return case.loop_weights


def _copied_bytes(case: CompileCase, loop: LoopFigures) -> int:
    """Bytes that a pass over packed words must copy 16 at a time; 0 when the case does not say how they are packed.

    Activations of which one load has too few to give every thread 16 bytes may be copied in smaller parts.
    """
    bits, rows = case.constexprs.get("BITS"), case.constexprs.get("BLOCK_N")
    if not bits or not rows:
        return 0
    words, columns = loop.weights * bits // 8, loop.weights // rows
    at_once = case.constexprs.get("PART", columns) * case.tokens * 2
    return words + (columns * case.tokens * 2 if at_once >= 16 * 32 * case.options.get("num_warps", 4) else 0)


def _hash(key: Key) -> str:
    module, name, arch = key
    case = cases()[module, name]
    parts = [
        case.kernel.cache_key,
        repr(dict(case.signature)),
        repr(sorted(case.constexprs.items())),
        repr((case.divisible, sorted(case.options.items()), case.tokens, _loop_weights(case), case.mma_warps, arch)),
        triton.__version__,
        *(Path(path).read_text(encoding="utf-8") for path in (__file__, loop_figures.__code__.co_filename)),
    ]
    assert " at 0x" not in "".join(parts[1:4]), f"{key}: a constant without a lasting repr would make the cache useless"
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _compile_key(key: Key) -> dict[str, Any]:
    try:
        return {"figures": asdict(compile_one(cases()[key[:2]], key[2]))}
    except Exception as error:  # whatever the compiler raises is the answer
        return {"error": f"{type(error).__name__}: {error}"[-2000:]}


def _read(file: Path) -> Figures | str:
    stored = json.loads(file.read_text(encoding="utf-8"))
    if "error" in stored:
        return str(stored["error"])
    figures = stored["figures"]
    loop = LoopFigures(**figures.pop("loop"))
    return Figures(**{**figures, "warnings": tuple(figures["warnings"])}, loop=loop)


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(file)


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        file.unlink(missing_ok=True)


def _disassemble(cubin: Path) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def _ptxas_figures(log: str) -> tuple[int, int, int]:
    """(registers, stack, spills) from ptxas -v, each the largest of the functions it reports."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert frames and registers, f"ptxas -v reported no resources: {log!r}"
    return (
        max(map(int, registers)),
        max(int(frame[0]) for frame in frames),
        max(int(frame[1]) + int(frame[2]) for frame in frames),
    )

"""Compiles what a run will need before it needs it, in several processes: Triton compiles one kernel per process.

Each process calls the matmuls with the same constants and argument classes (Triton specialises on 1 and on multiples of
16) on few weight rows, or rehearses a check of the suite, with Triton told to compile and load what it would launch,
and not to launch it: that fills its cache on disk, and nothing can wait for ever. What fails here is not judged: the
run meets it again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.tiles import Problem, Tile, fits

__all__ = ["Job", "Rehearsal", "compile_only", "jobs_of", "rehearsals", "warm"]

WORKERS = 12
ROWS = 64
NOT_REHEARSED = ("torch.compile(fullgraph=True)", "offsets past 2**31")
"""Checks that compile mostly something else, or need much memory."""


@dataclass(frozen=True)
class Job:
    """One launch: the problem with few weight rows and few tokens, and its tile; W8A8's where that is an Int8Tile.

    Attributes:
        experts: of so many experts' grouped matmul; 0: of one weight's.
        atomic: the split-K kernel with float atomics, check_atomics.py.
    """

    problem: Problem
    tile: Tile | Int8Tile
    experts: int = 0
    atomic: bool = False


@dataclass(frozen=True)
class Rehearsal:
    """One check of the suite as the run will make it, with its launches compiled only and no result compared."""

    check: str
    arch: int
    tiny: bool
    without: tuple[str, ...]


def rehearsals(arch: int, tiny: bool, without: Sequence[str]) -> list[Rehearsal]:
    """Of every check that is worth it, those under the sanitizer among them."""
    names = _checks(arch, tiny, tuple(without))
    return [Rehearsal(name, arch, tiny, tuple(without)) for name in names if name not in NOT_REHEARSED]


@lru_cache(maxsize=1)
def _checks(arch: int, tiny: bool, without: tuple[str, ...]) -> dict[str, Any]:
    from check_correct import checks
    from check_machinery import sanitized_checks

    device = torch.device("cuda")
    found = {check.name: check for check in checks(device, arch, tiny=tiny, without=without)}
    return {f"sanitized: {check.name}": check for check in sanitized_checks(device, arch, without)} | found


def jobs_of(work: Iterable[tuple[Problem, Tile | Int8Tile, bool]], arch: int) -> list[Job]:
    """The distinct launches behind some problems and tiles (and whether with atomics), in order.

    Those that shrink to one another count once.
    """
    found: dict[Job, None] = {}
    for problem, tile, atomic in work:
        few_m = problem.m if problem.m <= 1 else 16 if problem.m % 16 == 0 else 17
        few_n = ROWS if problem.n % 16 == 0 else ROWS + 1
        small = replace(problem, m=few_m, n=few_n)
        if isinstance(tile, Tile) and tile.family == "scaled":
            tile = replace(tile, split_k=1)  # it is not compiled in
        if isinstance(tile, Int8Tile) or fits(tile, small, arch):
            found[Job(small, tile, atomic=atomic)] = None
    return list(found)


def warm(jobs: Sequence[Job | Rehearsal], workers: int | None = None) -> int:
    """Compile for every job once, spread over processes; how many kernels were. 0 when a process died."""
    workers = min(workers or WORKERS, max(1, (os.cpu_count() or 2) - 2), max(1, len(jobs)))
    if workers < 2:
        return 0
    shares = [list(jobs[first::workers]) for first in range(workers)]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return sum(pool.map(_compile, shares))
    except BrokenExecutor:
        return 0


@contextlib.contextmanager
def compile_only() -> Iterator[set[Any]]:
    """Within it a launch compiles and loads its kernel, sets its result to zero, and does nothing else.

    Yields what was compiled, which grows.
    """
    launch, compiled = JITFunction.run, set()

    def load(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        _ = kernel.run  # builds the launcher, too
        compiled.add(kernel)
        out = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}.get("out_ptr")
        if isinstance(out, torch.Tensor):
            out.zero_()
        return kernel

    with mock.patch.object(JITFunction, "run", load):
        yield compiled


def _compile(jobs: Sequence[Job | Rehearsal]) -> int:
    with compile_only() as compiled:
        for job in jobs:
            # whatever it is, the run itself reports it, with the case it belongs to
            with contextlib.suppress(Exception):
                _rehearse(job) if isinstance(job, Rehearsal) else _launch(job, torch.device("cuda"))
        return len(compiled)


def _rehearse(job: Rehearsal) -> None:
    import check_correct
    import check_grouped
    import check_int8

    with contextlib.ExitStack() as stack:
        for module in (check_correct, check_grouped, check_int8):
            stack.enter_context(mock.patch.object(module, "relative_rms", lambda *_: 0.0))
            stack.enter_context(mock.patch.object(module, "RUNS", 1))
        stack.enter_context(mock.patch.object(torch, "equal", lambda *_: True))
        _checks(job.arch, job.tiny, job.without)[job.check].run()


def _launch(job: Job, device: torch.device) -> None:
    from check_atomics import atomic_matmul
    from check_layers import random_packed

    p = job.problem
    if job.experts:
        _launch_experts(job, device)
    elif isinstance(job.tile, Int8Tile):
        _launch_int8(p, job.tile, device)
    else:
        packed = random_packed(p.n, p.k, p.bits, p.group_size, p.dtype, device, asymmetric=p.asymmetric)
        x = torch.zeros(p.m, p.k, dtype=p.dtype, device=device)
        atomic_matmul(packed, x, job.tile) if job.atomic else packed(x, tile=job.tile)


def _launch_int8(problem: Problem, tile: Int8Tile, device: torch.device) -> None:
    from lowbit_kernels.int8 import int8_matmul
    from lowbit_kernels.int8_quantize import quantize_activations

    codes = torch.zeros(problem.n, problem.k, dtype=torch.int8, device=device)
    scales = torch.ones(problem.n, dtype=torch.float32, device=device)
    x, x_scale, _ = quantize_activations(torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=device))
    int8_matmul(x, x_scale, codes, scales, None, out_dtype=problem.dtype, tile=tile)


def _launch_experts(job: Job, device: torch.device) -> None:
    from lowbit_kernels.grouped import grouped_matmul
    from lowbit_kernels.grouped_int8 import grouped_int8_matmul
    from lowbit_kernels.layout import tiles_shape

    p, ends = job.problem, torch.zeros(job.experts, dtype=torch.int32, device=device)
    if isinstance(job.tile, Int8Tile):
        codes = torch.zeros(job.experts, p.n, p.k, dtype=torch.int8, device=device)
        scales, x_scale = (torch.ones(*size, device=device) for size in ((job.experts, p.n), (p.m,)))
        x = torch.zeros(p.m, p.k, dtype=torch.int8, device=device)
        grouped_int8_matmul(x, x_scale, ends, codes, scales, None, out_dtype=p.dtype, tile=job.tile)
    else:
        words = torch.zeros(job.experts, *tiles_shape(p.n, p.k, p.bits), dtype=torch.int32, device=device)
        groups = 1 if p.group_size == -1 else p.k // p.group_size
        scales = torch.ones(job.experts, groups, p.n, dtype=p.dtype, device=device)
        x = torch.zeros(p.m, p.k, dtype=p.dtype, device=device)
        how = {"bits": p.bits, "group_size": p.group_size, "n": p.n}
        grouped_matmul(x, ends, words, scales, None, None, tile=job.tile, **how)

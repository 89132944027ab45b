"""Compiles what a run will need before it needs it, in several processes: Triton compiles one kernel per process.

Each process calls the matmuls with the same constants and argument classes (Triton specialises on 1 and on multiples of
16) on few weight rows, with Triton told to compile and load what it would launch, and not to launch it: that fills its
cache on disk, and nothing can wait for ever. What fails here is not judged: the run meets it again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from lowbit_kernels.int8_tiles import Int8Tile
from lowbit_kernels.tiles import Problem, Tile, fits

__all__ = ["Job", "compile_only", "jobs_of", "warm"]

WORKERS = 12
ROWS = 64


@dataclass(frozen=True)
class Job:
    """One launch: the problem with few weight rows and few tokens, and its tile; W8A8's where that is an Int8Tile.

    ``experts``: of so many experts' grouped matmul; 0: of one weight's.
    """

    problem: Problem
    tile: Tile | Int8Tile
    experts: int = 0


def jobs_of(work: Iterable[tuple[Problem, Tile | Int8Tile]], arch: int) -> list[Job]:
    """The distinct launches behind some problems and tiles, in order; those that shrink to one another count once."""
    found: dict[Job, None] = {}
    for problem, tile in work:
        few_m = problem.m if problem.m <= 1 else 16 if problem.m % 16 == 0 else 17
        few_n = ROWS if problem.n % 16 == 0 else ROWS + 1
        small = replace(problem, m=few_m, n=few_n)
        if isinstance(tile, Tile) and tile.family == "scaled":
            tile = replace(tile, split_k=1)  # it is not compiled in
        if isinstance(tile, Int8Tile) or fits(tile, small, arch):
            found[Job(small, tile)] = None
    return list(found)


def warm(jobs: Sequence[Job], workers: int | None = None) -> int:
    """Compile for every job once, spread over processes; how many were. 0 when a process died."""
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


def compile_only() -> Any:
    """A context in which a launch compiles and loads its kernel, and does nothing else."""
    launch = JITFunction.run

    def load(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        _ = kernel.run  # builds the launcher, too
        return kernel

    return mock.patch.object(JITFunction, "run", load)


def _compile(jobs: list[Job]) -> int:
    from check_layers import random_packed

    device, done = torch.device("cuda"), 0
    with compile_only():
        for job in jobs:
            p = job.problem
            if job.experts:
                done += _compile_experts(job, device)
                continue
            if isinstance(job.tile, Int8Tile):
                done += _compile_int8(p, job.tile, device)
                continue
            packed = random_packed(p.n, p.k, p.bits, p.group_size, p.dtype, device, asymmetric=p.asymmetric)
            try:
                packed(torch.zeros(p.m, p.k, dtype=p.dtype, device=device), tile=job.tile)
                done += 1
            except Exception:  # the run itself reports it, with the case it belongs to
                continue
    return done


def _compile_int8(problem: Problem, tile: Int8Tile, device: torch.device) -> int:
    from lowbit_kernels.int8 import int8_matmul

    codes = [torch.zeros(rows, problem.k, dtype=torch.int8, device=device) for rows in (problem.m, problem.n)]
    scales = [torch.ones(rows, dtype=torch.float32, device=device) for rows in (problem.m, problem.n)]
    try:
        int8_matmul(codes[0], scales[0], codes[1], scales[1], None, out_dtype=problem.dtype, tile=tile)
    except Exception:  # the run itself reports it, with the case it belongs to
        return 0
    return 1


def _compile_experts(job: Job, device: torch.device) -> int:
    from lowbit_kernels.grouped import grouped_matmul
    from lowbit_kernels.grouped_int8 import grouped_int8_matmul
    from lowbit_kernels.layout import tiles_shape

    p, ends = job.problem, torch.zeros(job.experts, dtype=torch.int32, device=device)
    try:
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
    except Exception:  # the run itself reports it, with the case it belongs to
        return 0
    return 1

"""Sums over runs of columns of x, added up before a kernel whose main loop (product.py) wants them from memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import unit_columns
from .overlap import launch_options
from .tiles import cdiv

__all__ = ["loaded_sums", "run_sums_kernel"]


@triton.jit
def run_sums_kernel(
    x_ptr,  # (M, K)
    sums_ptr,  # (RUNS, M) fp32
    M,
    K: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of BLOCK runs of one token's columns; zero for what lies past K."""
    token = tl.program_id(0).to(tl.int64)
    runs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    tl.store(sums_ptr + runs.to(tl.int64) * M + token, tl.sum(x, axis=1), mask=runs < RUNS)


def loaded_sums(x: Tensor, bits: int, run: int) -> Tensor:
    """``(runs, M)`` fp32 of x (M, K), for the runs of all whole steps that a kernel for ``bits`` reads."""
    m, k = x.shape
    columns = unit_columns(bits)
    runs = cdiv(k, columns) * columns // run
    sums = torch.empty(runs, m, dtype=torch.float32, device=x.device)
    run_sums_kernel[(m, cdiv(runs, 32))](
        x, sums, M=m, K=k, RUN=run, RUNS=runs, BLOCK=32, num_warps=4, **launch_options()
    )
    return sums

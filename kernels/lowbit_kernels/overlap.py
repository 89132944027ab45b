"""Programmatic dependent launch (PDL): a kernel that begins while the one before it on its stream is ending.

A launch with ``launch_pdl=True`` is given what multiprocessors have free as soon as every program of the kernel before
it has said ``griddepcontrol.launch_dependents``, or has ended (CUDA C++ Programming Guide, "Programmatic Dependent
Launch and Synchronization"; sm_90 and newer). Every kernel here that is launched so begins with three things:

    prefetch(...)          words, scales and zeros of the first steps, to the L2
    wait_for_previous()    everything before this kernel has ended, and what it wrote is visible
    let_next_begin()       the kernel after this one may take what this one leaves free

Before the second nothing is read and nothing written: the L2 is the place that all writes go through, so what it holds
is never old, whoever wrote a weight last. Every program waits, so a kernel that has ended vouches for all before it.
The third comes after the second because others may read more than this before they wait: torch's inductor
(``TORCHINDUCTOR_ENABLE_PDL``) waits for the kernel before alone, and takes what came earlier for ended. So kernels that
know nothing of this, and those that do, may come before and after. In a launch without ``launch_pdl`` the instructions
do nothing. What is saved: the launch itself, and the first latency of a memory that the kernel before no longer fills.

hopper_ring.py has the prefetching for kernels in Gluon, which call the others as they are.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["launch_options", "let_next_begin", "prefetch", "prefetch_weight", "to_l2", "wait_for_previous"]


def launch_options(pdl: bool = False, *, fuse: bool = True) -> dict[str, Any]:
    """Keywords of every launch.

    Args:
        fuse: multiply and add in one rounding. Triton 3.10 will not unless told, as 3.9 warns.
    """
    return {"enable_fp_fusion": fuse, "launch_pdl": True} if pdl else {"enable_fp_fusion": fuse}


@triton.jit
def let_next_begin():
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def to_l2(ptrs):
    """The line of 128 bytes that each of some pointers is in."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch(
    ptr, first_row, last_row, stride, first_column, last_column, ROWS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Lines of 128 bytes of a matrix with ``stride`` elements per row: BYTES (at least one line) of each of ROWS rows.

    Where there are fewer rows or columns, the last one again: no address is outside.
    """
    LINES: tl.constexpr = BYTES // 128 if BYTES > 128 else 1  # max() is no constant for Triton 3.5
    LINE: tl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(first_row + tl.arange(0, ROWS), last_row).to(tl.int64)
    columns = tl.minimum(first_column + tl.arange(0, LINES) * LINE, last_column)
    to_l2(ptr + rows[:, None] * stride + columns[None, :])


@triton.jit
def prefetch_weight(
    tiles_ptr, scales_ptr, zeros_ptr, row, begin, N, K: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the first four steps of a program of the ``triton`` family read of the weight, from unit ``begin`` on."""
    prefetch(tiles_ptr, row // 16, tl.cdiv(N, 16) - 1, UNITS * 256, begin * 256, UNITS * 256 - 1, BLOCK_N // 16, 4096)
    COLUMNS: tl.constexpr = 512 // BITS
    MOST: tl.constexpr = 4 * COLUMNS
    GROUPS: tl.constexpr = MOST // GROUP if GROUP > 0 and GROUP < MOST else 1  # one comparison each: Triton 3.5
    LAST: tl.constexpr = 0 if GROUP == -1 else K // GROUP - 1
    group = 0 if GROUP == -1 else begin * COLUMNS // GROUP
    WIDTH: tl.constexpr = scales_ptr.dtype.element_ty.primitive_bitwidth // 8
    prefetch(scales_ptr, group, LAST, N, row, N - 1, GROUPS, BLOCK_N * WIDTH)
    if HAS_ZEROS:
        prefetch(zeros_ptr, group, LAST, N, row, N - 1, GROUPS, BLOCK_N)

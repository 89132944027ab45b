"""W8A8 on sm_90, in Gluon: int8.py's product with both operands by the copy engine and programs that stay.

Same arguments, numerics and bits as int8_matmul (sums are exact), for K a multiple of 16. What plain Triton does not
schedule, and this does: no instruction of the multiplying warps is spent on addresses, one product is always under way
while the next is issued, and the first steps of a tile are loaded while the one before is stored.

Importing this needs no GPU and no Gluon; :func:`launch` needs both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cases import CompileCase
from .epilogue import workspace
from .hopper import gluon_language
from .hopper_plan import packed_strides
from .int8_tiles import HOPPER_TILES, Int8Tile, shared_bytes
from .overlap import launch_options
from .releases import gluon_missing
from .scaled import multiprocessors
from .scaled_plan import schedule
from .tiles import cdiv

__all__ = ["compile_case", "compile_cases", "launch"]


def launch(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_zero: Tensor | None,
    row_sums: Tensor | None,
    out: Tensor,
    tile: Int8Tile,
) -> None:
    """Write the product to ``out (M, N)``; int8_matmul has checked the arguments. M is at least 1.

    Raises:
        ValueError: x_q or w_q does not start at a multiple of 16 bytes, which the copy engine wants.
        RuntimeError: this Triton has no Gluon.
    """
    gluon_language()
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .int8_hopper_kernel import int8_hopper_kernel

    for name, tensor in (("x_q", x_q), ("w_q", w_q)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}")
    (m, k), n = x_q.shape, w_q.shape[0]
    descriptors = [
        TensorDescriptor(tensor, list(tensor.shape), packed_strides(tensor.shape), list(shape), layout)
        for tensor, (shape, layout) in zip((x_q, w_q), _blocks(tile), strict=True)
    ]
    count = cdiv(m, tile.block_m) * cdiv(n, 128)
    programs, left, sharers = schedule(count, cdiv(k, 128), tile.split_k, multiprocessors(x_q.device))
    shared = sharers > left > 0
    floats, counters = workspace(2 * programs, 1, 128 * tile.block_m if shared else 1, x_q.device)
    int8_hopper_kernel[(programs,)](
        *descriptors,
        w_q,
        x_scale,
        w_scale,
        x_q if w_zero is None else w_zero,
        counters if row_sums is None else row_sums,
        w_scale if bias is None else bias,
        out,
        floats.view(torch.int32),
        counters,
        M=m,
        N=n,
        K=k,
        sharers=sharers,
        **_constants(tile, w_zero is not None, bias is not None),
        num_warps=4,
        **launch_options(tile.pdl),
    )


def _constants(tile: Int8Tile, has_zeros: bool, has_bias: bool) -> dict[str, Any]:
    return {
        "HAS_ZEROS": has_zeros,
        "HAS_BIAS": has_bias,
        "BLOCK_M": tile.block_m,
        "STAGES": tile.num_stages,
        "PDL": tile.pdl,
    }


def _blocks(tile: Int8Tile) -> list[tuple[tuple[int, ...], Any]]:
    """Block shape and shared layout of the two descriptors, swizzled as wgmma wants its operands: 128 columns a row."""
    layout = gluon_language().NVMMASharedLayout(128, 8, 2)
    return [((tile.block_m, 128), layout), ((128, 128), layout)]


def compile_case(tile: Int8Tile, name: str, asymmetric: bool) -> CompileCase:
    """The compilation that :func:`launch` would launch."""
    gluon_language()
    from .int8_hopper_kernel import int8_hopper_kernel

    constexprs = _constants(tile, asymmetric, True)
    descriptors = {
        key: f"tensordesc<i8{list(shape)},{layout!r}>"
        for key, (shape, layout) in zip(("x_desc", "w_desc"), _blocks(tile), strict=True)
    }
    pointers = {
        "w_ptr": "i8",
        "x_scale_ptr": "fp32",
        "w_scale_ptr": name,
        "zero_ptr": "i8",
        "sums_ptr": "i32",
        "bias_ptr": name,
        "out_ptr": name,
        "partials_ptr": "i32",
        "counters_ptr": "i32",
    }
    integers = dict.fromkeys(("M", "N", "K", "sharers"), "i32")
    signature = descriptors | {key: f"*{kind}" for key, kind in pointers.items()} | integers
    return CompileCase(
        name=f"{name} {'asym' if asymmetric else 'sym'} {tile}",
        kernel=int8_hopper_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, "N", "K"),
        options={"num_warps": 4},
        kind=f"int8 hopper {name}",
        archs=(90,),
        tokens=tile.block_m,
        mma_warps=8,
        wgmma="shared",
        integer_budget=0.1,
        wide_copies=False,  # the copies are in the producer's loop
        extra={"int8_tile": tile, "shared_bound": shared_bytes(tile)},
    )


def compile_cases() -> list[CompileCase]:
    """Every tile, and the widest with zeros; none where Triton has no Gluon for them.

    A float32 result is not claimed: it spills three words per tile.
    """
    if gluon_missing() is not None:
        return []
    widest = replace(HOPPER_TILES[-1], pdl=True)
    return [*(compile_case(tile, "bf16", False) for tile in HOPPER_TILES), compile_case(widest, "fp16", True)]

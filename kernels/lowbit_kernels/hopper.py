"""Fused matmul for sm_90, written in Gluon: the copy engine fills a ring, warpgroups multiply out of it.

Same arguments, numerics and order of sums as weight_only.py, for 17 tokens and more (it runs with any number), 4 and 8
bits, K a multiple of 8 and any N. What plain Triton does not schedule, and this does:

* words, x and scales come by the copy engine (TMA), asked for by a warp that does nothing else, with STAGES steps of
  128 columns in flight and no instruction of the multiplying warps spent on addresses or masks;
* a lane reads 16 bytes of words and makes its part of wgmma's register operand from them, for the next 64 rows while
  the tensor cores multiply these (ptxas moves a quarter of that behind the wait, which is one reason why there are
  always two warpgroups on a multiprocessor: one program of two, or two programs of one);
* a warpgroup never waits for another: one scales its sums and converts while the other multiplies.

The operand holds ``code - zero``, exact in fp16 and bf16, where the Triton family multiplies ``code + RAW`` and then
subtracts ``(RAW + zero) * sum(x)``. One packed addition per two weights saves the sums of x (a kernel of their own, or
additions and a barrier in this one) and one fp32 operation per output and group: from 64 tokens per tile on that is no
more instructions, and there is no cancellation. Every dot product of a group starts fresh and is scaled in fp32.

Importing this module needs no GPU and no Gluon; :func:`hopper_matmul` needs both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cases import CompileCase
from .checks import check_arguments
from .epilogue import workspace
from .hopper_plan import gluon_shared_bytes, packed_strides, reps
from .overlap import launch_options
from .releases import gluon_missing
from .tiles import Problem, Tile, cdiv, why_not

__all__ = [
    "check_hopper",
    "compile_case",
    "compile_cases",
    "descriptor_types",
    "descriptors",
    "gluon_language",
    "hopper_matmul",
    "integer_budget",
    "register_layouts",
]

SHIPPED = (
    Tile("gluon", 16, 256, 4, 4, 5),
    Tile("gluon", 32, 256, 4, 4, 4),
    Tile("gluon", 32, 128, 4, 4, 6),
    Tile("gluon", 64, 256, 2, 8, 6),
    Tile("gluon", 64, 128, 2, 4, 4),
    Tile("gluon", 128, 128, 1, 8, 5),
)
"""The shapes that are compiled without a GPU. Split_k and num_stages may be others, within gluon_why_not."""
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def hopper_matmul(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    tile: Tile,
) -> Tensor:
    """``x (M, K) @ W.T + bias`` for a packed ``W (n, K)``; shapes and dtypes as in weight_only.py.

    Args:
        bits: 4 or 8.
        group_size: 32, 64, 128, or -1 for the whole row.
        n: rows of the weight: those of ``tiles`` are padded.
        tile: of family ``gluon``.

    Returns:
        ``(M, n)`` in x's dtype, on x's device.

    Raises:
        ValueError: arguments contradict the table, start at an address that the copy engine does not take (x, tiles,
            scales, zeros: 16 bytes), the GPU is not sm_90, or the tile does not fit.
        RuntimeError: this Triton has no Gluon.
    """
    problem = Problem(x.shape[0], n, x.shape[-1], bits, group_size, x.dtype, zeros is not None)
    check_hopper(x, tiles, scales, zeros, bias, problem, tile, "gluon")
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
            _launch(x, tiles, scales, zeros, bias, out, problem, tile)
    return out


def check_hopper(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    tile: Tile,
    family: str,
) -> None:
    """What both families of HOPPER demand of their arguments; ValueError names the first contradiction."""
    if x.device.type != "cuda":
        raise ValueError(f"the kernels need tensors on a CUDA device, got x on {x.device}")
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) != (9, 0):
        raise ValueError(f"the {family} family is written for sm_90, the GPU of x is sm_{major}{minor}")
    check_arguments(x, tiles, scales, zeros, bias, problem, 90)
    other = None if tile.family == family else f"its family is {tile.family!r}, not {family!r}"
    reason = other or why_not(tile, problem, 90)
    if reason is not None:
        raise ValueError(f"{tile} cannot run {problem} on sm_90: {reason}")
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}")


def _launch(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    problem: Problem,
    tile: Tile,
) -> None:
    gluon_language()
    from .hopper_kernel import hopper_kernel

    constexprs = _constants(problem, tile, has_bias=bias is not None)
    consumers = constexprs["CONSUMERS"]
    count = cdiv(problem.m, tile.block_m) * cdiv(problem.n, tile.block_n)
    partials = counters = scales  # arguments that the kernel does not read
    if tile.split_k > 1:
        block = tile.block_m * tile.block_n // consumers
        partials, counters = workspace(count * consumers, tile.split_k, block, x.device)
    hopper_kernel[(count, tile.split_k)](
        *descriptors(x, tiles, scales, zeros, problem, tile),
        tiles,
        scales,
        scales if zeros is None else zeros,
        scales if bias is None else bias,
        out,
        partials,
        counters,
        M=problem.m,
        N=problem.n,
        K=problem.k,
        **constexprs,
        **_options(tile),
        **launch_options(tile.pdl),
    )


def gluon_language() -> Any:
    """Gluon's language module; RuntimeError where Triton has none that this was written for."""
    missing = gluon_missing()
    if missing is not None:
        raise RuntimeError(missing)
    from triton.experimental.gluon import language

    return language


def _options(tile: Tile) -> dict[str, Any]:
    """Compiler options. A Gluon kernel counts the warps of its first warpgroup and adds the others itself.

    Two programs of 8 warps (4 of them idle or loading) share 64 Ki registers when each starts with 128 per thread;
    warp specialization then moves what the producer's warpgroup does not need to the multiplying one.
    """
    return {"num_warps": 4, "maxnreg": 128} if tile.num_warps == 4 else {"num_warps": 4}


def descriptors(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, problem: Problem, tile: Tile
) -> list[Any]:
    """The copy engine's descriptors of x, words, scales and zeros (the scales' again where there are none)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    words, scale_list = tiles.view(tiles.shape[0], tiles.shape[1] * 8, 32), scales.view(-1)
    zero_list = scale_list if zeros is None else zeros.view(-1)
    shapes = _blocks(tile, problem.bits, scale_list.dtype, zero_list.dtype)
    return [
        TensorDescriptor(tensor, list(tensor.shape), packed_strides(tensor.shape), list(shape), layout)
        for tensor, (shape, layout) in zip((x, words, scale_list, zero_list), shapes, strict=True)
    ]


def descriptor_types(problem: Problem, tile: Tile, x_name: str) -> dict[str, str]:
    """Their types in a compilation's signature, for x of dtype ``x_name`` and scales of the problem's."""
    name, zeros = NAMES[problem.dtype], torch.uint8 if problem.asymmetric else problem.dtype
    kinds = (x_name, "i32", name, "u8" if problem.asymmetric else name)
    shapes = _blocks(tile, problem.bits, problem.dtype, zeros)
    return {
        key: f"tensordesc<{kind}{list(shape)},{layout!r}>"
        for key, kind, (shape, layout) in zip(("x_desc", "w_desc", "s_desc", "z_desc"), kinds, shapes, strict=True)
    }


def _blocks(
    tile: Tile, bits: int, scale_dtype: torch.dtype, zero_dtype: torch.dtype
) -> list[tuple[tuple[int, ...], Any]]:
    """Block shape and shared layout of the four descriptors: x, words, scales, zeros.

    x is swizzled by 128 bytes as wgmma wants its shared operand. Words are in rows of 128 bytes, two of a unit's 16;
    the same swizzle permutes 16-byte pieces within such a row, of which each quarter of a warp reads one whole.
    """
    layout = gluon_language().NVMMASharedLayout
    words, rows = (tile.block_n // 16, 2 * bits, 32), (tile.block_n,)
    return [
        ((tile.block_m, 128), layout(128, 16, 2)),
        (words, layout(128, 32, 3)),
        (rows, layout(0, scale_dtype.itemsize * 8, 1)),
        (rows, layout(0, zero_dtype.itemsize * 8, 1)),
    ]


def register_layouts() -> tuple[Any, Any]:
    """Who holds which word of 64 rows: as loaded (4 units, 8 rows of 128 bytes, 32) and as (row, t, b, u).

    Lane l of warp w has the words of row l / 4 and l / 4 + 8 of unit w with kw % 4 == l % 4, 16 bytes each: its columns
    of wgmma's register operand (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
    """
    linear = gluon_language().DistributedLinearLayout
    unit = linear(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 4, 0]],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[],
        shape=[4, 8, 32],
    )
    words = linear(
        reg_bases=[[0, 0, 0, 1], [0, 0, 1, 0], [8, 0, 0, 0]],
        lane_bases=[[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, 4, 2, 2],
    )
    return unit, words


def _constants(problem: Problem, tile: Tile, has_bias: bool) -> dict[str, Any]:
    """Constexpr arguments of the kernel.

    Pieces of 64 columns: of longer ones ptxas makes most fragments behind the wait (kernels/README.md), and if a step
    were a single piece the next fragment would replace the one being multiplied (C7513).
    """
    unit, words = register_layouts()
    return {
        "BITS": problem.bits,
        "GROUP": problem.group_size,
        "HAS_ZEROS": problem.asymmetric,
        "HAS_BIAS": has_bias,
        "BLOCK_M": tile.block_m,
        "CONSUMERS": tile.num_warps // 4,
        "REPS": reps(tile),
        "SPLIT_K": tile.split_k,
        "STAGES": tile.num_stages,
        "PIECE_COLUMNS": 64,
        "CONSUMER_REGISTERS": 240,
        "UNIT": unit,
        "WORDS": words,
        "PDL": tile.pdl,
    }


def compile_case(tile: Tile, problem: Problem) -> CompileCase:
    """The compilation that :func:`hopper_matmul` would launch for ``problem`` with ``tile``, scales in x's dtype."""
    gluon_language()
    from .hopper_kernel import hopper_kernel

    constexprs = _constants(problem, tile, has_bias=True)
    name = NAMES[problem.dtype]
    pointers = {
        "tiles_ptr": "i32",
        "scales_ptr": name,
        "zeros_ptr": "u8" if problem.asymmetric else name,
        "bias_ptr": name,
        "out_ptr": name,
        "partials_ptr": "fp32" if tile.split_k > 1 else name,
        "counters_ptr": "i32" if tile.split_k > 1 else name,
    }
    signature = (
        descriptor_types(problem, tile, name)
        | {key: f"*{kind}" for key, kind in pointers.items()}
        | dict.fromkeys("MNK", "i32")
    )
    kind = "asym" if problem.asymmetric else "sym"
    return CompileCase(
        name=f"{name} {problem.bits}b g{problem.group_size} {kind} {tile}",
        kernel=hopper_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=(*pointers, "N", "K"),
        options=_options(tile),
        kind=f"gluon {name} {problem.bits}",
        archs=(90,),
        tokens=tile.block_m,
        mma_warps=tile.num_warps,
        wgmma="registers",
        registers_only=True,
        integer_budget=integer_budget(problem),
        wide_copies=False,  # the copies are in the producer's loop; tests/test_kernels_hopper.py looks for them there
        extra={"tile": tile, "shared_bound": gluon_shared_bytes(tile, problem)},
    )


def integer_budget(problem: Problem) -> float:
    """Integer instructions per weight that a multiplying warp may spend: the conversion's own and 0.3 of one.

    4 bits: one lop3 per pair and three shifts per four pairs. 8 bits: bf16 two lop3 per pair and a shift per two pairs,
    fp16 one prmt. Zeros of small groups come on top, up to 14 instructions for each weight row of one.
    """
    conversion = 0.875 if problem.bits == 4 else 0.5 if problem.dtype == torch.float16 else 1.25
    zeros = 14 / problem.group_size if problem.asymmetric and problem.group_size in (32, 64) else 0.0
    return conversion + 0.3 + zeros


def compile_cases() -> list[CompileCase]:
    """Every shape of tile, and for the widest each kind of weight. None where Triton has no Gluon for them."""
    if gluon_missing() is not None:
        return []
    fp16, bf16 = torch.float16, torch.bfloat16
    middle, few = SHIPPED[3], SHIPPED[2]
    eight, grouped = Tile("gluon", 64, 256, 2, 8, 4), Tile("gluon", 64, 128, 2, 8, 5)
    kinds: list[tuple[Tile, int, int, torch.dtype, bool]] = [
        (middle, 4, 128, fp16, True),
        (middle, 4, -1, bf16, True),
        (middle, 4, -1, fp16, False),
        (grouped, 4, 64, bf16, True),
        (grouped, 4, 32, bf16, True),
        (few, 4, 32, fp16, False),
        (replace(few, pdl=True), 4, 32, bf16, True),
        (eight, 8, 128, bf16, False),
        (eight, 8, 128, bf16, True),
        (eight, 8, 128, fp16, True),
        (eight, 8, -1, bf16, False),
        (Tile("gluon", 16, 256, 4, 4, 3), 8, 128, bf16, False),
        (Tile("gluon", 128, 128, 1, 8, 4), 8, 128, bf16, False),
        (Tile("gluon", 32, 128, 4, 4, 4), 8, 32, bf16, True),
    ]
    return [
        compile_case(tile, Problem(4 * tile.block_m, 4096, 4096, bits, group, dtype, asymmetric))
        for tile, bits, group, dtype, asymmetric in [(tile, 4, 128, bf16, False) for tile in SHIPPED] + kinds
    ]

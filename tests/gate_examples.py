"""Small kernels with the faults that the compile gate must see."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lowbit_kernels.cases import CompileCase

__all__ = ["copied_words", "narrow_copies", "serialised_wgmma", "spilling"]


@triton.jit
def _pair(words, INDEX: tl.constexpr):
    halves = ((words >> (4 * INDEX)) & 0x000F000F) | 0x43004300
    low = halves.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (halves >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _running_accumulator(w_ptr, x_ptr, out_ptr, K, TOKENS: tl.constexpr, PLANES: tl.constexpr):
    """out = w @ x, w unpacked from int32 words: one accumulator through the whole loop.

    PLANES: whether code i of the words is a run of columns, as the tensor cores like it, or a word holds neighbours.
    """
    rows, words, columns, tokens = tl.arange(0, 128), tl.arange(0, 16), tl.arange(0, 128), tl.arange(0, TOKENS)
    acc = tl.zeros((128, TOKENS), dtype=tl.float32)
    for start in range(0, K, 128):
        w = tl.load(w_ptr + rows[:, None] * (K // 8) + start // 8 + words[None, :])
        x = tl.load(x_ptr + (start + columns)[:, None] + tokens[None, :] * K)
        pairs = tl.join(tl.join(_pair(w, 0), _pair(w, 2)), tl.join(_pair(w, 1), _pair(w, 3)))
        if PLANES:
            pairs = tl.permute(pairs, (0, 3, 4, 1, 2))
        acc = tl.dot(pairs.reshape(128, 128), x, acc)
    tl.store(out_ptr + rows[:, None] * TOKENS + tokens[None, :], acc)


@triton.jit
def _strided_words(w_ptr, x_ptr, out_ptr, K, STRIDE: tl.constexpr):
    """out = w @ x where consecutive elements of w lie STRIDE apart: each can only be copied alone."""
    rows, columns, tokens = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 16)
    acc = tl.zeros((64, 16), dtype=tl.float32)
    for start in range(0, K, 64):
        w = tl.load(w_ptr + rows[:, None] * K * STRIDE + (start + columns)[None, :] * STRIDE)
        x = tl.load(x_ptr + (start + columns)[:, None] + tokens[None, :] * K)
        acc = tl.dot(w, x.to(tl.float32), acc)
    tl.store(out_ptr + rows[:, None] * 16 + tokens[None, :], acc)


def _accumulating(name: str, tokens: int, planes: bool = True, **claims: Any) -> CompileCase:
    types = {"w_ptr": "*i32", "x_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"}
    return CompileCase(
        name=name,
        kernel=_running_accumulator,
        signature=types | {"TOKENS": "constexpr", "PLANES": "constexpr"},
        constexprs={"TOKENS": tokens, "PLANES": planes},
        divisible=tuple(types),
        options={"num_warps": 4, "num_stages": 3},
        kind="fault",
        tokens=tokens,
        **claims,
    )


def serialised_wgmma() -> CompileCase:
    """Registers as the left operand and a running accumulator: the assembler waits after each wgmma (C7515)."""
    return _accumulating("running accumulator", 64, archs=(90,), wgmma="registers")


def spilling() -> CompileCase:
    """An accumulator of 256 registers per thread."""
    return _accumulating("large accumulator", 256)


def copied_words() -> CompileCase:
    """The order of k within these words is not mma.sync's, so unpacked weights go through shared memory."""
    return _accumulating("words in another order", 16, planes=False, registers_only=True)


def narrow_copies() -> CompileCase:
    """4-byte copies of the weight."""
    return CompileCase(
        name="strided words",
        kernel=_strided_words,
        signature={"w_ptr": "*fp32", "x_ptr": "*fp16", "out_ptr": "*fp32", "K": "i32", "STRIDE": "constexpr"},
        constexprs={"STRIDE": 3},
        divisible=("w_ptr", "x_ptr", "out_ptr", "K"),
        options={"num_warps": 4, "num_stages": 3},
        kind="fault",
        archs=(80,),
        tokens=16,
    )

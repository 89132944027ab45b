"""What a launch of each kernel writes, by its documentation, in plain torch: for fake_gpu.py.

Only tensors that the launch was given are read and written, as their shapes and the constants say. Float results are
computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.grouped_int8 import grouped_int8_reference
from lowbit_kernels.int8_quantize import quantize_activations_reference
from lowbit_kernels.weight_only import weight_only_reference

__all__ = ["act"]


def act(kernel: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Write what ``kernel`` would write. KeyError for one that is not here."""
    plain = {
        name: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    _ACTED[kernel](grid, plain)


def _weight_only(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    m, n = a["M"], a["N"]
    tiles = -(-m // a["BLOCK_M"]) * -(-n // a["BLOCK_N"])
    assert grid == (tiles, a["SPLIT_K"], 1), f"grid {grid}, {tiles} output tiles"
    if a["SPLIT_K"] > 1:
        assert a["partials_ptr"].numel() >= tiles * a["SPLIT_K"] * a["BLOCK_M"] * a["BLOCK_N"]
        assert a["partials_ptr"].dtype == torch.float32 and a["counters_ptr"].dtype == torch.int32
        assert a["counters_ptr"].numel() >= tiles and not a["counters_ptr"][:tiles].any()
    if a["SUMS"] == 3:
        runs = -(-a["K"] // (512 // a["BITS"])) * (512 // a["BITS"]) // a["RUN"]
        sums = _run_sums_of(a["x_ptr"], a["RUN"], runs)
        assert a["sums_ptr"].shape == sums.shape and torch.allclose(a["sums_ptr"], sums, rtol=1e-5, atol=1e-4)
    _multiply(a, a["x_ptr"], a["tiles_ptr"], a["scales_ptr"], a["zeros_ptr"])


def _multiply(a: dict[str, Any], x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor) -> None:
    assert a["out_ptr"].shape == (a["M"], a["N"]) and x.shape == (a["M"], a["K"])
    zeros = zeros if a["HAS_ZEROS"] else None
    bias = a["bias_ptr"] if a.get("HAS_BIAS") else None
    groups = 1 if a["GROUP"] == -1 else a["K"] // a["GROUP"]
    assert scales.shape == (groups, a["N"]) and (bias is None or bias.shape == (a["N"],))
    out = weight_only_reference(x, tiles, scales, zeros, bias, bits=a["BITS"], group_size=a["GROUP"])
    a["out_ptr"].copy_(out)


def _atomic(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    before = a["out_ptr"].clone()
    _multiply(a, a["x_ptr"], a["tiles_ptr"], a["scales_ptr"], a["zeros_ptr"])
    a["out_ptr"] += before


def _hopper(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    m, n, consumers = a["M"], a["N"], a["CONSUMERS"]
    block_n = consumers * a["REPS"] * 64
    tiles = -(-m // a["BLOCK_M"]) * -(-n // block_n)
    assert grid == (tiles, a["SPLIT_K"], 1), f"grid {grid}, {tiles} output tiles"
    if a["SPLIT_K"] > 1:
        assert a["partials_ptr"].numel() >= tiles * a["SPLIT_K"] * a["BLOCK_M"] * block_n
        assert a["counters_ptr"].numel() >= tiles * consumers and not a["counters_ptr"][: tiles * consumers].any()
    x, words, scales, zeros = (a[f"{name}_desc"].base.as_subclass(Tensor) for name in "xwsz")
    groups = 1 if a["GROUP"] == -1 else a["K"] // a["GROUP"]
    _check_blocks(a, block_n)
    assert torch.equal(a["scales_ptr"].view(-1), scales)
    _multiply(a, x, words.view(words.shape[0], -1, 16, 16), scales.view(groups, n), zeros.view(groups, n))


def _check_blocks(a: dict[str, Any], block_n: int) -> None:
    assert a["w_desc"].block_shape == [block_n // 16, 2 * a["BITS"], 32]
    assert a["x_desc"].block_shape == [a["BLOCK_M"], 128]
    assert a["s_desc"].block_shape == a["z_desc"].block_shape == [block_n]


def _scaled(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    m, n, programs, block_n = a["M"], a["N"], grid[0], 128 * a["BLOCKS"]
    left = -(-m // a["BLOCK_M"]) * -(-n // block_n) % programs
    assert grid == (programs, 1, 1) and max(1, left) <= a["sharers"] <= programs
    if a["sharers"] > left > 0:
        assert a["partials_ptr"].numel() >= 2 * programs * a["BLOCK_M"] * block_n
        assert a["partials_ptr"].dtype == torch.float32 and a["counters_ptr"].dtype == torch.int32
        assert a["counters_ptr"].numel() >= 2 * left and not a["counters_ptr"][: 2 * left].any()
    x, words, scales, zeros = (a[f"{name}_desc"].base.as_subclass(Tensor) for name in "xwsz")
    groups = 1 if a["GROUP"] == -1 else a["K"] // a["GROUP"]
    _check_blocks(a, block_n)
    assert x.dtype == torch.float16 and torch.equal(a["scales_ptr"].view(-1), scales)
    assert a["HAS_TOKENS"] == (a["out_ptr"].dtype == torch.bfloat16)
    if a["HAS_TOKENS"]:
        assert len(a["tokens_ptr"]) % a["BLOCK_M"] == 0
        x = x.double() * a["tokens_ptr"][:m].double()[:, None]
    factor = torch.ones(2, n) if a["GROUP"] == -1 else a["rows_ptr"].as_subclass(Tensor)
    scaled = (scales.view(groups, n).float() * factor[0]).half().double() * factor[1].double()
    _multiply(a, x, words.view(words.shape[0], -1, 16, 16), scaled, zeros.view(groups, n))


def _grouped(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    out, begin, x = a["out_ptr"], 0, a["x_ptr"]
    ends = a["ends_ptr"].tolist()
    most = sum(-(-rows // a["BLOCK_M"]) for rows in [b - e for e, b in zip([0, *ends], [*ends, len(x)], strict=True)])
    assert a["TOKEN_TILES"] >= most and grid == (a["TOKEN_TILES"] * -(-a["N"] // a["BLOCK_N"]), 1, 1)
    assert a["EXPERTS"] == len(ends) < a["BLOCK_E"] and a["WEIGHTS"] == len(a["tiles_ptr"])
    out.zero_()
    for e, end in zip(_slots(a), ends, strict=True):
        if e < 0:
            begin = end
            continue
        zeros = a["zeros_ptr"][e] if a["HAS_ZEROS"] else None
        bias = a["bias_ptr"][e] if a["HAS_BIAS"] else None
        out[begin:end] = weight_only_reference(
            x[begin:end], a["tiles_ptr"][e], a["scales_ptr"][e], zeros, bias, bits=a["BITS"], group_size=a["GROUP"]
        )
        begin = end


def _slots(a: dict[str, Any]) -> list[int]:
    return a["slots_ptr"].tolist() if a["HAS_SLOTS"] else list(range(a["EXPERTS"]))


def _grouped_int8(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    assert a["x_ptr"].shape == (a["M"], a["K"]) and a["w_ptr"].shape == (a["WEIGHTS"], a["N"], a["K"])
    assert grid == (a["TOKEN_TILES"] * -(-a["N"] // a["BLOCK_N"]), 1, 1) and len(a["ends_ptr"]) == a["EXPERTS"]
    if a["HAS_ZEROS"]:
        assert torch.equal(a["sums_ptr"].long(), a["x_ptr"].long().sum(1))
    out = grouped_int8_reference(
        a["x_ptr"],
        a["x_scale_ptr"],
        a["ends_ptr"],
        a["w_ptr"],
        a["w_scale_ptr"],
        a["bias_ptr"] if a["HAS_BIAS"] else None,
        w_zero=a["zero_ptr"] if a["HAS_ZEROS"] else None,
        slots=a["slots_ptr"] if a["HAS_SLOTS"] else None,
    )
    a["out_ptr"].copy_(out)


def _run_sums_of(x: Tensor, run: int, runs: int) -> Tensor:
    padded = torch.zeros(len(x), runs * run, dtype=torch.float64)
    padded[:, : x.shape[1]] = x
    return padded.view(len(x), runs, run).sum(2).t().float()


def _run_sums(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    assert grid == (a["M"], -(-a["RUNS"] // a["BLOCK"]), 1)
    a["sums_ptr"].copy_(_run_sums_of(a["x_ptr"], a["RUN"], a["RUNS"]))


def _dequantize(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    out, first, rows = a["out_ptr"], a["first_row"], a["rows"]
    assert out.shape == (rows, a["K"]) and grid[1] == -(-rows // a["BLOCK_N"])
    assert grid[0] * (512 // a["BITS"]) >= a["K"]
    zeros = a["zeros_ptr"] if a["HAS_ZEROS"] else None
    identity = torch.eye(a["K"], dtype=torch.float64)
    weight = weight_only_reference(
        identity, a["tiles_ptr"], a["scales_ptr"], zeros, None, bits=a["BITS"], group_size=a["GROUP"]
    )
    if a["HAS_FACTORS"]:
        weight = weight * a["factors_ptr"].double()
    out.copy_(weight.t()[first : first + rows])


def _factors(top: Tensor, exponent: int) -> Tensor:
    _, power = torch.frexp(torch.where(top.isfinite(), top, 2.0**127))  # half of 2 ** power at least
    factor = torch.where(top > 0, torch.ldexp(torch.ones_like(top), exponent + 1 - power), 2.0**126)
    return torch.stack([factor, 1 / factor])


def _to_halves(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    m = a["TOKENS"]
    assert a["scales_ptr"].shape == (a["G"], a["N"]) and grid == (m + -(-a["N"] // a["BLOCK_ROWS"]), 1, 1)
    a["rows_ptr"].copy_(_factors(a["scales_ptr"].float().abs().amax(0) * a["TOP"], a["ROW_EXPONENT"]))
    if m:
        assert a["x_ptr"].shape == (m, a["K"]) and a["tokens_ptr"].shape == (2, a["PADDED"]) and a["PADDED"] >= m
        a["tokens_ptr"][:, :m] = _factors(a["x_ptr"].float().abs().amax(1), a["TOKEN_EXPONENT"])
        a["x16_ptr"].copy_(a["x_ptr"].float() * a["tokens_ptr"][0, :m, None])


def _widen(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    part, out = a["part_ptr"], a["out_ptr"]
    assert part.data_ptr() == out.data_ptr() and part.stride() == out.stride() == (a["N"], 1)
    assert part.shape == out.shape == (a["M"], a["ROWS"]) and len(a["rows_ptr"]) == a["ROWS"]
    assert grid == (-(-a["ROWS"] // a["BLOCK_N"]), -(-a["M"] // a["BLOCK_M"]), 1)
    sums = part.double() * a["tokens_ptr"][: a["M"]].double()[:, None] * a["rows_ptr"].double()
    out.copy_(sums + a["bias_ptr"].double() if a["HAS_BIAS"] else sums)


def _quantize(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    static = a["static_ptr"] if a["STATIC"] else None
    codes, scale, sums = quantize_activations_reference(a["x_ptr"], static)
    assert grid == (len(codes), 1, 1) and a["x_ptr"].shape[1] == a["K"]
    a["q_ptr"].copy_(codes)
    a["scale_ptr"].copy_(scale)
    if a["HAS_SUMS"]:
        a["sums_ptr"].copy_(sums)


def _int8_hopper(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    programs = grid[0]
    left = -(-a["M"] // a["BLOCK_M"]) * -(-a["N"] // 128) % programs
    assert grid == (programs, 1, 1) and max(1, left) <= a["sharers"] <= programs
    assert a["partials_ptr"].dtype == a["counters_ptr"].dtype == torch.int32
    if a["sharers"] > left > 0:
        assert a["partials_ptr"].numel() >= 2 * programs * a["BLOCK_M"] * 128
        assert a["counters_ptr"].numel() >= 2 * left and not a["counters_ptr"][: 2 * left].any()
    assert a["x_desc"].block_shape == [a["BLOCK_M"], 128] and a["w_desc"].block_shape == [128, 128]
    x, w = (a[f"{name}_desc"].base.as_subclass(Tensor) for name in "xw")
    _write_int8(a, x, w)


def _int8(grid: tuple[int, int, int], a: dict[str, Any]) -> None:
    tiles = -(-a["M"] // a["BLOCK_M"]) * -(-a["N"] // a["BLOCK_N"])
    assert grid == (tiles, a["SPLIT_K"], 1)
    if a["SPLIT_K"] > 1:
        assert a["partials_ptr"].dtype == a["counters_ptr"].dtype == torch.int32
        assert a["partials_ptr"].numel() >= tiles * a["SPLIT_K"] * a["BLOCK_M"] * a["BLOCK_N"]
        assert a["counters_ptr"].numel() >= tiles and not a["counters_ptr"][:tiles].any()
    _write_int8(a, a["x_ptr"], a["w_ptr"])


def _write_int8(a: dict[str, Any], x: Tensor, w: Tensor) -> None:
    assert x.shape == (a["M"], a["K"]) and w.shape == (a["N"], a["K"])
    total = x.double() @ w.double().t()
    if a["HAS_ZEROS"]:
        assert torch.equal(a["sums_ptr"].long(), x.long().sum(1))
        total -= a["sums_ptr"].double()[:, None] * a["zero_ptr"].double()
    out = total * a["x_scale_ptr"].double()[:, None] * a["w_scale_ptr"].double()
    a["out_ptr"].copy_(out + a["bias_ptr"].double() if a["HAS_BIAS"] else out)


_ACTED: dict[str, Callable[[tuple[int, int, int], dict[str, Any]], None]] = {
    "weight_only_kernel": _weight_only,
    "_atomic_kernel": _atomic,
    "hopper_kernel": _hopper,
    "grouped_kernel": _grouped,
    "grouped_int8_kernel": _grouped_int8,
    "run_sums_kernel": _run_sums,
    "_dequantize_kernel": _dequantize,
    "scaled_kernel": _scaled,
    "to_halves_kernel": _to_halves,
    "widen_kernel": _widen,
    "_quantize_kernel": _quantize,
    "_int8_matmul_kernel": _int8,
    "int8_hopper_kernel": _int8_hopper,
}

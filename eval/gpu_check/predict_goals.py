"""Prints the predictions for issue 3's goals as a Markdown table: what kernels/README.md wrote down before measuring.

    PYTHONPATH=.:kernels python eval/gpu_check/predict_goals.py

For each mode, layer and number of tokens: bytes through memory, and the time that tune_model.py gives for the H200 with
the tiles that the shipped table picks, for each family's best tile beside it, and for cuBLAS in bf16.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from check_correct import family_tile
from check_layers import LAYERS
from check_measure import GROUP, MODES, TOKENS
from check_report import GOALS
from tune_model import CHIPS, SLOTS_PER_WEIGHT, predict, predict_dense, predict_int8

from lowbit_kernels.dispatch import choose
from lowbit_kernels.tiles import HOPPER, Problem

__all__ = ["goal_rows"]

H200 = next(chip for chip in CHIPS if chip.name == "NVIDIA H200")
HEAD = (
    "| case | MB moved | slots per weight | bound by | predicted us, ours / cuBLAS | predicted, dispatched (tiles) "
    "| predicted, gluon | predicted, scaled | goal | measured |\n|---|---|---|---|---|---|---|---|---|---|"
)


def goal_rows() -> list[str]:
    """One Markdown row per (mode, layer, tokens)."""
    rows = []
    for mode in MODES:
        for layer in ("70b", "8b"):
            for m in TOKENS:
                rows.append(_row(mode, layer, m))
    return rows


def _row(mode: str, layer: str, m: int) -> str:
    problems = [
        Problem(m, linear.n, linear.k, 4 if mode == "w4a16" else 8, GROUP.get(mode, -1), torch.bfloat16)
        for linear in LAYERS[layer]
    ]
    dense = sum(predict_dense(problem, H200).seconds for problem in problems)
    goal = GOALS.get((mode, layer, m))
    if mode == "w8a8":
        parts, tiles, slots = [predict_int8(problem, H200) for problem in problems], "", "-"
        gluon = sum(predict_int8(problem, H200, "gluon").seconds for problem in problems)
        others = [f"{dense / gluon:.2f}x", "-"]
    else:
        chosen = [choose(problem, 90, gpu_name=H200.name) for problem in problems]
        parts = [predict(tile, problem, H200) for tile, problem in zip(chosen, problems, strict=True)]
        names = Counter(
            tile.family if tile.family == "dequant" else f"{tile.family} {tile.block_m}x{tile.block_n}"
            for tile in chosen
        )
        tiles = f" ({', '.join(names)})"
        slots = f"{SLOTS_PER_WEIGHT[problems[0].bits]:.1f}"
        others = [_of_family(family, problems, dense) for family in HOPPER]
    ours = sum(part.seconds for part in parts)
    bound = Counter(part.bound for part in parts).most_common(1)[0][0]
    moved = sum(part.bytes for part in parts) / 1e6
    return (
        f"| {mode} {layer} M={m} | {moved:.0f} | {slots} | {bound} | {ours * 1e6:.0f} / {dense * 1e6:.0f} "
        f"| {dense / ours:.2f}x{tiles} | {' | '.join(others)} | {f'{goal}x' if goal else '-'} | not measured |"
    )


def _of_family(family: str, problems: list[Problem], dense: float) -> str:
    seconds = 0.0
    for problem in problems:
        tile = family_tile(family, problem, 90)
        if tile is None:
            return "-"
        seconds += predict(tile, problem, H200).seconds
    return f"{dense / seconds:.2f}x"


if __name__ == "__main__":
    print(HEAD)
    print("\n".join(goal_rows()))
    sys.exit(0)

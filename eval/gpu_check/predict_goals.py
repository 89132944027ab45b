"""Prints the predictions for issue 3's goals as a Markdown table: what kernels/README.md wrote down before measuring.

    PYTHONPATH=.:kernels python eval/gpu_check/predict_goals.py

For each mode, layer and number of tokens: bytes through memory, and the time that tune_model.py gives for the H200 with
the tiles that the shipped table picks, for each family's best tile beside it, and for cuBLAS in bf16.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import torch
from check_correct import family_tile
from check_layers import LAYERS
from check_measure import GROUP, MODES, TOKENS
from check_report import GOALS
from tune_model import CHIPS, SLOTS_PER_WEIGHT, predict, predict_dense, predict_int8

from lowbit_kernels.dispatch import choose
from lowbit_kernels.tiles import HOPPER, Problem, Tile

__all__ = ["goal_rows"]

H200 = next(chip for chip in CHIPS if chip.name == "NVIDIA H200")
HEAD = (
    "| case | MB moved | slots per weight | bound by | predicted us, ours / cuBLAS | predicted, dispatched (tiles) "
    "| gluon | scaled | the best of them with PDL | goal | measured |\n|---|---|---|---|---|---|---|---|---|---|---|"
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
        overlapped = sum(predict_int8(problem, H200, "gluon", pdl=True).seconds for problem in problems)
        others = [f"{dense / gluon:.2f}x", "-", f"{dense / overlapped:.2f}x"]
    else:
        chosen = [choose(problem, 90, gpu_name=H200.name) for problem in problems]
        parts = [predict(tile, problem, H200) for tile, problem in zip(chosen, problems, strict=True)]
        names = Counter(
            tile.family if tile.family == "dequant" else f"{tile.family} {tile.block_m}x{tile.block_n}"
            for tile in chosen
        )
        tiles = f" ({', '.join(names)})"
        slots = f"{SLOTS_PER_WEIGHT[problems[0].bits]:.1f}"
        others = [_times(dense, _of_family(family, problems)) for family in HOPPER]
        others.append(_times(dense, _best_with_pdl(chosen, problems)))
    ours = sum(part.seconds for part in parts)
    bound = Counter(part.bound for part in parts).most_common(1)[0][0]
    moved = sum(part.bytes for part in parts) / 1e6
    return (
        f"| {mode} {layer} M={m} | {moved:.0f} | {slots} | {bound} | {ours * 1e6:.0f} / {dense * 1e6:.0f} "
        f"| {dense / ours:.2f}x{tiles} | {' | '.join(others)} | {f'{goal}x' if goal else '-'} | not measured |"
    )


def _of_family(family: str, problems: list[Problem], *, pdl: bool = False) -> float | None:
    """Seconds with one family's best tiles; None where one has none."""
    tiles = [family_tile(family, problem, 90) for problem in problems]
    found = [
        predict(replace(tile, pdl=pdl), problem, H200).seconds
        for tile, problem in zip(tiles, problems, strict=True)
        if tile is not None
    ]
    return sum(found) if len(found) == len(problems) else None


def _best_with_pdl(chosen: list[Tile], problems: list[Problem]) -> float:
    """Seconds of the dispatched tiles, or of a family's, whichever are faster, where launches overlap."""
    dispatched = sum(
        predict(replace(tile, pdl=tile.family != "dequant"), problem, H200).seconds
        for tile, problem in zip(chosen, problems, strict=True)
    )
    families = (_of_family(family, problems, pdl=True) for family in HOPPER)
    return min(dispatched, *(seconds for seconds in families if seconds is not None))


def _times(dense: float, seconds: float | None) -> str:
    return "-" if seconds is None else f"{dense / seconds:.2f}x"


if __name__ == "__main__":
    print(HEAD)
    print("\n".join(goal_rows()))
    sys.exit(0)

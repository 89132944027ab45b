"""Tables for GPUs that nobody has measured yet, from tune_model.py; ``scripts/tune --predict`` writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tune_model import CHIPS, EFFICIENCY, LATENCY, LAUNCH, Chip, predict, predict_dense
from tune_table import FLOOR, M_BUCKETS, pick, rows_of, shipped_tiles, table

from lowbit_kernels.dispatch import fill_split
from lowbit_kernels.table import table_for
from lowbit_kernels.tiles import Problem, Tile, fits

__all__ = ["TABLES", "current_table", "predicted_tables", "table_file", "to_text", "write_predicted"]

TABLES = Path(__file__).resolve().parents[2] / "kernels" / "lowbit_kernels" / "tables"
SHAPE = (8192, 8192)
"""The layer a predicted series is made for; it then stands for any shape."""
FAMILIES = ("triton", "dequant")
"""The Gluon families synchronise by hand and have not run on hardware: only a measured table picks them."""


def table_file(gpu: str) -> str:
    """File name of a GPU's table."""
    return gpu.lower().replace(" ", "-").replace("/", "-") + ".json"


def predicted_tables() -> dict[str, str]:
    """Content of every predicted table by file name."""
    return {table_file(chip.name): to_text(_predicted(chip)) for chip in CHIPS}


def to_text(content: dict[str, Any]) -> str:
    """JSON with one row of the table per line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=2)
    return head[:-2] + ',\n  "rows": [\n' + rows + "\n  ]\n}\n"


def write_predicted(folder: Path = TABLES) -> list[Path]:
    """Write the predicted tables of GPUs without a measured one; the files written."""
    written = []
    for name, text in predicted_tables().items():
        path = folder / name
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["source"] == "measured":
            continue
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def current_table(arch: int, gpu: str) -> dict[str, Any]:
    """The JSON content of the table that a GPU has now: its own, else its architecture's or the nearest older one's."""
    content: dict[str, Any] = json.loads((TABLES / table_file(table_for(arch, gpu).gpu)).read_text(encoding="utf-8"))
    return content


def _predicted(chip: Chip) -> dict[str, Any]:
    rows = []
    for bits in (2, 4, 8):
        picks, width = [], 0
        for m in M_BUCKETS:
            problem = Problem(m, *SHAPE, bits, 128, torch.float16)
            times = {
                tile: predict(tile, problem, chip).seconds for tile in _tiles(problem, chip) if tile.block_m >= width
            }
            times[FLOOR] = predict(FLOOR, problem, chip).seconds
            chosen = pick(m, times, predict_dense(problem, chip).seconds)
            width = 1 << 30 if chosen.tile == FLOOR else chosen.tile.block_m
            picks.append(chosen)
        rows += rows_of(picks, bits=bits)
    return table(
        gpu=chip.name,
        arch=chip.arch,
        source="predicted",
        about={
            "model": "eval/gpu_check/tune_model.py; nothing was measured with these kernels",
            "chip": chip.origin,
            "assumed": {"launch_s": LAUNCH, "latency_s": LATENCY, "efficiency": EFFICIENCY},
        },
        chip={
            "multiprocessors": chip.multiprocessors,
            "bandwidth_gbs": round(chip.bandwidth / 1e9),
            "tflops": chip.tflops,
        },
        rows=rows,
    )


def _tiles(problem: Problem, chip: Chip) -> list[Tile]:
    """Shipped tiles that fit, each with the split that fills the GPU."""
    return [
        replace(tile, split_k=fill_split(tile, problem, chip.arch, chip.multiprocessors))
        for tile in shipped_tiles(chip.arch, FAMILIES, problem, fits)
    ]

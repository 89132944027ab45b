"""One rank of tests/test_distributed.py: runs every scenario in one launch and writes down what it saw.

torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lowbit
from helpers import message
from lowbit.cli import main
from lowbit.distributed import Ranks, join
from tiny_models import BOOKS_4M

TEXT = Path(__file__).parent.parent / "eval" / "data" / "books-calib.txt"

SMALL: dict[str, Any] = {"calibration": TEXT, "samples": 5, "seq_len": 64, "group_size": 32, "verbose": False}

WIDE: dict[str, Any] = {**SMALL, "samples": 48, "seq_len": 64}
"""Three batches of a single process: one rank gets one, the other two."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama", {**WIDE, "symmetric": False}),
    "gptq again": ("llama", {**WIDE, "symmetric": False}),
    "many batches": ("llama", {**WIDE, "samples": 35 * 16}),
    "awq+gptq": ("llama", {**WIDE, "method": "awq+gptq"}),
    "awq": ("llama", {**WIDE, "method": "awq"}),
    "experts": ("mixtral", {**WIDE, "seq_len": 32, "samples": 34}),
    "awq experts": ("mixtral", {**WIDE, "seq_len": 32, "samples": 34, "method": "awq"}),
    "static": ("llama", {**WIDE, "bits": 8, "group_size": None, "activations": "int8-static", "smooth": 0.5}),
    "few windows": (str(BOOKS_4M), {**SMALL, "seq_len": 128, "group_size": 64, "dtype": "float32"}),
    "no data": ("llama", {"method": "rtn", "group_size": 32, "verbose": False}),
}
"""Name -> model folder, arguments of lowbit.quantize."""


@dataclass
class Part:
    """What a rank computed of a weight: its rows and something that is no tensor."""

    codes: Tensor
    note: str


def command_line(out: Path, *options: str) -> dict[str, Any]:
    """Exit status and output of ``lowbit quantize`` in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    given = ["quantize", str(BOOKS_4M), str(out), "--calibration", str(TEXT), "--samples", "9", "--seq-len", "256"]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([*given, *options])
    return {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """The methods of Ranks, each with values that tell the ranks apart."""
    rows = ranks.rows(100)
    mine = torch.arange(100)[rows]
    small, nan = torch.full((3, 2), float(ranks.rank)), torch.nan if ranks.rank else 0.0
    part, scales = ranks.whole((Part(mine.to(torch.uint8), f"rank {ranks.rank}"), mine.to(torch.bfloat16)), 100)
    return {
        "share": [list(ranks.share(count)) for count in (5, 1)],
        "collect": ranks.collect(f"rank {ranks.rank}"),
        "first": ranks.first(lambda: f"rank {ranks.rank}"),
        "sum": ranks.sum_(torch.tensor([1.0, 10.0 * ranks.rank])).tolist(),
        "max": ranks.max_(torch.tensor([1.0 - ranks.rank, 5.0 * ranks.rank, nan])).tolist(),
        "whole": [part.codes.tolist(), part.note, scales.tolist()],
        "small": ranks.whole(small, 3).tolist(),
    }


def failing(ranks: Ranks) -> None:
    """Rank 1 fails between two exchanges."""
    ranks.collect(None)
    if ranks.rank == 1:
        raise ValueError("a bad weight")
    ranks.add_up()
    ranks.sum_(torch.zeros(1))


def joined_and_failing() -> None:
    with join() as ranks:
        failing(ranks)


def disagreements(folder: Path, rank: int) -> dict[str, str]:
    """What both ranks are told when they are given different work."""
    llama, out = folder / "llama", folder / "refused"

    def told(model: str = "llama", **options: Any) -> str:
        return message(lambda: lowbit.quantize(folder / model, out, **{**SMALL, **options}))

    return {
        "weights": told(("llama", "llama-edited")[rank]),
        "config": told(("llama", "llama-eps")[rank]),
        "text": told(calibration=(TEXT, folder / "other.txt")[rank]),
        "bits": told(bits=(4, 8)[rank]),
        "ignore": told(ignore=((), ("down_proj",))[rank]),
        "missing": told(("llama", "no-such-model")[rank]),
        "output": message(lambda: lowbit.quantize(llama, (llama, out)[rank], **SMALL)),
        "windows": told(samples=1),
        "overflow": told("llama-large"),
    }


def run(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    seen: dict[str, Any] = {"reports": {}}
    with join() as ranks:
        seen["exchanges"] = exchanges(ranks)
    seen["failing"] = message(joined_and_failing)
    for name, (model, options) in CASES.items():
        report = lowbit.quantize(folder / model, folder / f"{name}-2", **options)
        seen["reports"][name] = report.to_dict()
    seen["command"] = command_line(folder / "by-command-2", "--json", "--group-size", "64")
    seen["bad command"] = command_line(folder / "refused", "--bits", ("4", "8")[rank])
    seen["disagreements"] = disagreements(folder, rank)
    dist.init_process_group("gloo")  # whoever has one already keeps it
    lowbit.quantize(folder / "llama", folder / "in-a-group-2", **CASES["gptq"][1])
    seen["group kept"] = dist.is_initialized() and dist.get_world_size() == 2
    dist.destroy_process_group()
    return seen


if __name__ == "__main__":
    where = Path(sys.argv[1])
    found = run(where)
    (where / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")

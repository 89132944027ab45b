"""eval/bench_experts.py: what it compares, what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import assert_close, tolerance
from lowbit.experts import Experts

EVAL = Path(__file__).parent.parent / "eval"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(EVAL))
    try:
        spec = importlib.util.spec_from_file_location("bench_experts", EVAL / "bench_experts.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EVAL))
    return module


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_experts.py", "--device", "cpu", *arguments])
    bench.main()


@pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small
@pytest.mark.parametrize("weights, stacks", [("w4", 2), ("w8a8", 2), ("w4+w8", 4)])
def test_the_two_ways_of_calling_are_of_the_same_model(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, weights: str, stacks: int
) -> None:
    monkeypatch.setattr(bench, "LAYERS", 2)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        packed, dense = bench.build(bench.WEIGHTS[weights], torch.float32, torch.device("cpu"))
        bench.switch(packed, together=True)
        modules = [module for module in packed.modules() if isinstance(module, Experts)]
        assert len(modules) == 2 and all(len(module._stacks) == stacks for module in modules)
        together = packed(ids).logits
        bench.switch(packed, together=False)
        assert not any(module.stacked for module in modules)
        assert_close(packed(ids).logits, together, **tolerance(torch.float32, 64, 512))
        assert not any(isinstance(module, Experts) for module in dense.modules())
        assert 0.01 < float((dense(ids).logits - together).norm() / together.norm()) < 1, "rounded, and nothing worse"


def test_medians_take_turns_and_leave_the_first_call_out(bench: ModuleType) -> None:
    order: list[str] = []
    now = iter(range(0, 10**6))
    clock = lambda: next(now) * len(order) / 1e3  # noqa: E731
    found = bench.medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, torch.device("cpu"), clock
    )
    assert order == ["a", "b"] * 4 and set(found) == {"a", "b"}
    assert all(value > 0 for value in found.values())


@pytest.mark.filterwarnings("ignore")
def test_the_page_has_a_row_for_everything_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "WEIGHTS", {"w8a8": bench.WEIGHTS["w8a8"]})
    monkeypatch.setattr(bench, "LAYERS", 1)
    monkeypatch.setattr(bench, "TOKENS", (1, 3))
    monkeypatch.setattr(bench, "PROMPT", 2)
    out = tmp_path / "experts.md"
    run(bench, monkeypatch, "--rounds", "1", "--clock", "cpu", "--out", str(out))
    page = out.read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and f"torch {version('torch')}" in page and "threads" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| w")]
    rows = [row for row in rows if row[0] != "weights"]
    cases = [("experts", "1"), ("experts", "3"), ("model", "1"), ("model", "2")]
    dtypes = ("float32", "bfloat16")
    assert [tuple(row[:4]) for row in rows] == [(w, d, *case) for w in bench.WEIGHTS for d in dtypes for case in cases]
    for row in rows:
        one_by_one, together, dense = float(row[4]), float(row[5]), float(row[7])
        assert min(one_by_one, together, dense) > 0
        assert float(row[6].removesuffix("x")) == pytest.approx(one_by_one / together, rel=0.1, abs=0.05)
        assert float(row[8]) == 0, "integers add up exactly"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--out", "no/such/folder/x.md"], "--out: no folder no/such/folder"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--clock", "sun"], "invalid choice: 'sun'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_refuses(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        run(bench, monkeypatch, *arguments)
    assert refused.value.code == 2 and re.search(re.escape(message), capsys.readouterr().err)

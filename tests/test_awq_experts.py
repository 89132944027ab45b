"""AWQ on mixtures of experts: attention is folded, experts get the clip search and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures import logits, tiny, tokens, write_folder
from lowbit import QuantSpec, hf, quantize_
from lowbit.checkpoint import CheckpointWriter

NOT_FOLDED = "clip search alone: no folding table fits this block"


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_it_loses_less_than_rounding_and_comes_back_from_its_folder(name: str, method: str, tmp_path: Path) -> None:
    ids = tokens(16)
    expected = logits(tiny(name), ids)
    rounded, model = tiny(name), tiny(name)
    quantize_(rounded, QuantSpec(4, 32), "rtn", allow_partial=True)
    report = quantize_(model, QuantSpec(4, 32), method, calibration=ids, allow_partial=True)
    found = logits(model, ids)
    assert (found - expected).norm() < (logits(rounded, ids) - expected).norm()
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert experts and all(NOT_FOLDED in layer.notes for layer in experts)
    if name != "deepseek_v3":  # whose attention no folding table knows
        assert not any(NOT_FOLDED in layer.notes for layer in report.layers if "self_attn" in layer.name)
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, None, None, report)
    loaded, _ = hf.load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(loaded, ids), found)

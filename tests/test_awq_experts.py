"""AWQ on mixtures of experts: scales go into the experts where they can, and the report says where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import logits, tiny, tokens, write_folder
from lowbit import QuantSpec, hf, mappings, quantize_
from lowbit.checkpoint import CheckpointWriter
from lowbit.folding import TOO_FEW
from lowbit.linearize import linearize
from lowbit.mappings import NOT_QUANTIZED
from lowbit.report import QuantReport
from lowbit.smooth import UNREACHED, measure_inputs
from lowbit.walk import capture_block_inputs, find_blocks

NOT_PROPORTIONAL = "alone: what comes before it is not proportional to the up projection's output"
NO_TABLE = "alone: no folding table fits this block"


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_it_loses_less_than_rounding_and_comes_back_from_its_folder(name: str, method: str, tmp_path: Path) -> None:
    ids = tokens(32)
    expected = logits(tiny(name), ids)
    rounded, model = tiny(name), tiny(name)
    quantize_(rounded, QuantSpec(4, 32), "rtn", allow_partial=True)
    report = quantize_(model, QuantSpec(4, 32), method, calibration=ids, allow_partial=True)
    found = logits(model, ids)
    assert (found - expected).norm() < (logits(rounded, ids) - expected).norm()
    for layer in report.layers:
        without = [note for note in layer.notes if "alone:" in note]
        if name == "gpt_oss" and layer.name.endswith("down_proj"):  # it clamps the up projection's output and adds one
            assert without == [f"{'clip search' if method == 'awq' else 'gptq'} {NOT_PROPORTIONAL}"]
        elif name == "deepseek_v3" and "self_attn" in layer.name:
            assert without and NO_TABLE in without[0]
        else:
            assert not without
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = hf.load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(loaded, ids), found)


def with_loud_channels() -> Any:
    """Every eighth input of the experts 10 times the others, and every eighth row of the up projections: too much to
    round like the others, too little to clip the others for it."""
    model = tiny("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::8] *= 10
            layer.mlp.gate.weight[:, ::8] /= 10  # the router sees what it saw
            layer.mlp.experts.gate_up_proj[:, 64:][:, ::8] *= 10
    return model


def experts_losses(report: QuantReport, part: str) -> list[float]:
    return [layer.loss for layer in report.layers if layer.name.endswith(part) and ".experts." in layer.name]


def test_scales_lower_the_loss_of_experts_with_loud_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(16)
    reports = {}
    for folded in (True, False):
        with monkeypatch.context() as patch:
            if not folded:  # what AWQ did for experts before it knew them: clip search alone
                patch.setattr(mappings, "find_mixture", lambda block: None)
            model = with_loud_channels()
            reports[folded] = quantize_(model, QuantSpec(4, 32), "awq", calibration=ids, allow_partial=True)
    for part in ("gate_proj", "up_proj", "down_proj"):
        with_scales, without = (sum(experts_losses(reports[folded], part)) for folded in (True, False))
        assert with_scales < 0.9 * without


def test_experts_of_too_few_tokens_get_no_scale_of_their_own() -> None:
    report = quantize_(tiny("qwen3_moe"), QuantSpec(4, 32), "awq", calibration=tokens(3, 16), allow_partial=True)
    notes = {layer.name: layer.notes for layer in report.layers if ".experts." in layer.name}
    for name, found in notes.items():  # 96 routed tokens for 4 experts with 64 inputs each
        if name.endswith("down_proj"):
            assert f"clip search alone: {TOO_FEW}" in found
        else:
            assert not any("alone:" in note for note in found), "the layer's experts share it"
    assert any("starved" in note for found in notes.values() for note in found)


def test_a_dense_reader_takes_the_fold_away_and_the_report_says_so() -> None:
    model = tiny("qwen3_moe")
    ignore = [r"layers\.0\.mlp\.experts\.2\.up_proj"]
    report = quantize_(model, QuantSpec(4, 32), "awq", calibration=tokens(8), ignore=ignore, allow_partial=True)
    notes = {layer.name: layer.notes for layer in report.layers}
    assert f"clip search alone: {NOT_QUANTIZED}" in notes["model.layers.0.mlp.experts.1.gate_proj"]
    assert not any("alone:" in note for note in notes["model.layers.1.mlp.experts.1.gate_proj"])


@pytest.mark.parametrize("ids", [tokens(8), tokens(1, 1)], ids=["fed", "starved"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_smoothing_reaches_the_experts_and_changes_no_output(name: str, ids: Tensor) -> None:
    model = tiny(name)
    linearize(model)
    before, blocks = logits(model, ids), find_blocks(model)
    names = [f"{b.name}.{n}" for b in blocks for n, m in b.module.named_modules() if isinstance(m, nn.Linear)]
    inputs = capture_block_inputs(model, blocks, [ids])
    found = measure_inputs(blocks, names, inputs, torch.device("cpu"), static=False, alpha=0.5)
    assert (logits(model, ids) - before).norm() < 2e-5 * before.norm()  # float32 rounding
    into = {n for n in names if ".mlp." in n and n.endswith(("gate_proj", "up_proj"))}
    assert into <= set(found.smoothed)
    downs = {n for n in names if n.endswith("down_proj")}
    reasons = {found.reasons[n] for n in downs - set(found.smoothed)}
    assert reasons == (set() if len(ids) > 1 else {UNREACHED})

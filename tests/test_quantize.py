"""quantize_: every family with each method, the module handed back as it was, and a report that says what happened."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from lowbit import QuantLinear, QuantSpec, quantize_
from quantized_families import (
    METHODS,
    TOKENS,
    W4,
    WITHOUT_FOLDING,
    dense_twin,
    distance,
    logits,
    original,
    packed,
    quantized,
)
from tiny_models import ALL_LINEARS, FAMILIES, random_tokens, tiny_model

families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


# --- every family, every method


@families
@methods
def test_every_decoder_linear_is_packed_and_recorded(family, method):
    model, report = quantized(family, method)
    linears = {n: m for n, m in original(family).named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert packed(model).keys() == linears.keys() and len(linears) == 2 * ALL_LINEARS[family]
    assert report.coverage == 1.0 and report.method == method
    assert sorted(layer.name for layer in report.layers) == sorted(linears)
    for layer in report.layers:
        assert layer.shape == tuple(linears[layer.name].weight.shape)
        assert layer.spec == W4 and layer.loss_of == "outputs"
        assert math.isfinite(layer.loss) and math.isfinite(layer.rtn_loss)
        assert 0 < layer.loss < 0.02, "4 bits in groups of 32: about 1 / (12 * 2.5^2) of a step squared at worst"
        assert layer.method in (method, "rtn")


@families
@methods
def test_every_matrix_that_was_not_quantized_is_named(family, method):
    model, report = quantized(family, method)
    left = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point() and p.ndim > 1}
    left = {name for name in left if not name.endswith("weight_scale")}
    assert {weight.name for weight in report.skipped} == left
    assert "lm_head.weight" in left and any("embed" in name for name in left)
    assert all(weight.reason for weight in report.skipped)


@families
@methods
def test_the_packed_model_computes_what_its_dequantized_twin_does(family, method):
    model, _ = quantized(family, method)
    assert distance(logits(model), logits(dense_twin(model))) < 1e-3


@families
def test_gptq_is_never_above_round_to_nearest(family):
    for method in ("gptq", "awq+gptq"):
        for layer in quantized(family, method)[1].layers:
            assert layer.loss <= layer.rtn_loss
            assert layer.damp_frac is not None
            every_row = f"{layer.shape[0]} of {layer.shape[0]} rows kept round to nearest, whose loss was lower"
            assert layer.method == ("rtn" if every_row in layer.notes else method)


@families
@methods
def test_the_logits_stay_close_to_the_originals(family, method):
    """On the calibration tokens, of random weights. A scale folded into the wrong place would cost everything."""
    errors = {m: distance(logits(quantized(family, m)[0]), logits(original(family))) for m in ("rtn", method)}
    assert errors["rtn"] < 0.35
    assert errors[method] <= errors["rtn"] * (0.6 if "gptq" in method else 1)


@families
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nothing_but_the_targets_changes(family, method):
    model, _ = quantized(family, method)
    state, before = model.state_dict(), original(family).state_dict()
    same = [name for name in before if name in state]
    assert len(same) == len(before) - 2 * ALL_LINEARS[family], "all but the quantized weights are still there"
    assert all(torch.equal(state[name], before[name]) for name in same)


@families
@pytest.mark.parametrize("method", WITHOUT_FOLDING)
def test_awq_says_where_it_could_not_fold(family, method):
    noted = {
        layer.name.partition(".layers.")[2][2:]: note
        for layer in quantized(family, method)[1].layers
        for note in layer.notes
        if note.startswith(WITHOUT_FOLDING[method])
    }
    without = {"gpt_neox": {"mlp.dense_4h_to_h"}}
    assert noted.keys() == without.get(family, set())
    assert all("no scale passes its activation" in note for note in noted.values())


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_awq_folds_into_norms_and_leaves_the_embeddings(family):
    state, before = quantized(family, "awq")[0].state_dict(), original(family).state_dict()
    changed = {name for name in before if name in state and not torch.equal(state[name], before[name])}
    assert changed and not any("embed" in name or "lm_head" in name for name in changed)
    assert any("norm" in name for name in changed)


# --- the module is handed back as it was


class Stop(BaseException):
    """What a Ctrl-C looks like to the code it passes."""


def modes(model):
    return {name: module.training for name, module in model.named_modules() if not isinstance(module, QuantLinear)}


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_training_flags_are_restored_module_by_module(tokens):
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = modes(model)
    quantize_(model, W4, calibration=tokens)
    assert {name: before[name] for name in modes(model)} == modes(model)
    assert model.model.layers[0].mlp.up_proj.training and not model.model.layers[1].mlp.up_proj.training


def test_an_interrupted_run_leaves_flags_and_hooks_as_they_were(monkeypatch):
    import lowbit.blockwise as blockwise

    def stop(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(blockwise, "gptq_quantize", stop)
    model = tiny_model("llama").train()
    before = modes(model)
    with pytest.raises(Stop):
        quantize_(model, W4, "gptq", calibration=TOKENS)
    assert modes(model) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.equal(logits(model.eval()), logits(original("llama")))


# --- the report


def test_the_report_is_json_and_complete():
    _, report = quantized("llama", "gptq")
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert QuantSpec.from_dict(record["spec"]) == W4
    assert record["calibration"]["windows"] == 6 and record["calibration"]["tokens"] == 6 * 24
    assert len(record["calibration"]["sha256"]) == 64
    assert len(record["layers"]) == 14 and len(record["skipped"]) == 2
    assert record["seconds"]["quantize"] > 0


def test_the_summary_names_what_is_dense_and_everything_unusual():
    text = quantized("gpt_neox", "awq")[1].summary()
    assert "coverage    100.0%" in text and "6 x 24 tokens" in text
    assert "left dense  lm_head.weight [128, 64]: outside the decoder blocks" in text
    assert "note        gpt_neox.layers.0.mlp.dense_4h_to_h: clip search alone" in text


# --- bad arguments, before anything is changed


@pytest.mark.parametrize(
    ("spec", "options", "complaint"),
    [
        (W4, {"method": "magic"}, r"method must be one of \('gptq', 'awq', 'rtn', 'awq\+gptq'\), got 'magic'"),
        (QuantSpec(3, 32), {}, r"3-bit weights have no packed form \(packed widths: \(2, 4, 8\)\); .*packed=False\)"),
        (W4, {"method": "gptq"}, r"method 'gptq' needs calibration tokens"),
        (W4, {"method": "awq"}, r"method 'awq' needs calibration tokens"),
        (W4, {"calibration": TOKENS[0]}, r"must be token ids \(windows, seq_len\) int64 .* got \(24,\)"),
        (W4, {"calibration": TOKENS.int()}, r"got \(6, 24\) torch.int32"),
        (W4, {"calibration": TOKENS[:0]}, r"at least one window, got \(0, 24\)"),
        (W4, {"calibration": TOKENS[:, :0]}, r"at least one window, got \(\d+, 0\)"),
        (W4, {"calibration": TOKENS + 110}, r"the model's vocabulary has 128 entries \(0 to 127\)"),
        (W4, {"calibration": TOKENS - 100}, r"token ids run from -\d+ to"),
        (W4, {"calibration": TOKENS.repeat(1, 6)}, r"windows of 144 tokens exceed the model's context of 128"),
        (QuantSpec(4, 128), {}, r"q_proj: group_size 128 does not divide K = 64; .* would work: \[32, 64, -1\]"),
        (W4, {"ignore": ["nothing"]}, r"ignore 'nothing' matches no weight"),
        (W4, {"ignore": ["mlp"]}, r"only 33.3% of the decoder's weights"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_changed(spec, options, complaint):
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match=complaint):
        quantize_(model, spec, **options)
    assert model.training and not packed(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), original("llama").parameters(), strict=True))


def test_calibration_needs_decoder_blocks():
    with pytest.raises(ValueError, match=r"Sequential: found no ModuleList of decoder blocks"):
        quantize_(nn.Sequential(nn.Linear(32, 32)), W4, calibration=TOKENS)


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_a_model_that_is_quantized_already_is_refused(tokens):
    model = copy.deepcopy(quantized("llama", "rtn")[0])
    with pytest.raises(ValueError, match=r"no linear .*QuantLinear|found no ModuleList"):
        quantize_(model, W4, calibration=tokens)


@pytest.mark.parametrize(("windows", "noted"), [(3, True), (12, False)])
def test_too_few_tokens_for_a_hessian_are_noted(windows, noted):
    """The widest input has 128 channels; a window has 24 tokens."""
    report = quantize_(tiny_model("llama"), QuantSpec(4, 32), "gptq", calibration=random_tokens(windows), packed=False)
    assert [note.startswith("72 calibration tokens for inputs of up to 128") for note in report.notes] == [True] * noted

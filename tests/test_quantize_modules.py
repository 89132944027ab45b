"""quantize_ on modules of no known family: with data a causal LM of any make, without it any module at all."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lowbit import QuantSpec, quantize_
from lowbit.affine import dequantize
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
from tiny_models import ALL_LINEARS, FAMILIES, tiny_model

# --- models the walk has no table for


class Mixer(nn.Module):
    """A decoder block of no known family, with a linear that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 32)

    def forward(self, x, scale):
        return x + self.second(torch.tanh(self.first(x))) * scale


class Unknown(nn.Module):
    """A causal LM that is not from transformers."""

    def __init__(self, block=Mixer):
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.steps = nn.ModuleList(block() for _ in range(2))
        self.out = nn.Linear(32, 128)

    def forward(self, tokens, use_cache):
        x = self.embed(tokens)
        for number, step in enumerate(self.steps):
            x = step(x, 1 / (1 + number))
        return self.out(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_causal_lm_of_no_known_family(method):
    model = Unknown().eval()
    run = torch.no_grad()(functools.partial(model, TOKENS, use_cache=False))
    before = run()
    report = quantize_(model, W4, method, calibration=TOKENS)
    assert len(packed(model)) == 6 and report.coverage == 1.0
    assert distance(run(), before) < 0.05
    notes = {layer.name: layer.notes for layer in report.layers}
    assert notes["steps.1.idle"] == ("no calibration token reached it: rounded to nearest",)
    if method in WITHOUT_FOLDING:
        assert notes["steps.0.first"][0] == f"{WITHOUT_FOLDING[method]}: no folding table fits this block"
    idle = next(layer for layer in report.layers if layer.name == "steps.0.idle")
    assert (idle.method, idle.loss_of) == ("rtn", "weights")


def test_what_ignore_leaves_keeps_its_weight_while_the_rest_of_its_group_is_quantized():
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    report = quantize_(model, W4, "gptq", calibration=TOKENS, ignore=["k_proj"])
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, weight)
    assert len(packed(model)) == 12
    assert sum("'k_proj'" in skipped.reason for skipped in report.skipped) == 2
    assert report.coverage == pytest.approx(1 - 2 * 32 * 64 / 73728)


# --- without data: any module


class Nested(nn.Module):
    """Linears in a dict, in a sequence, with and without bias, with odd numbers of rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.parts = nn.ModuleDict({"a": nn.Linear(32, 70), "b": nn.Sequential(nn.ReLU(), nn.Linear(70, 33, False))})
        self.norm = nn.LayerNorm(33)

    def forward(self, tokens):
        return self.norm(self.parts["b"](self.parts["a"](self.embed(tokens))))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_module_is_rounded_without_data(bits, symmetric):
    model = Nested()
    weight = model.parts["a"].weight.detach().double()
    base_bytes = sum(p.nbytes for p in model.parameters())
    report = quantize_(model, QuantSpec(bits, -1, symmetric))
    assert packed(model).keys() == {"parts.a", "parts.b.1"}
    assert report.coverage == 1.0 and report.calibration is None and report.method == "rtn"
    error = model.parts["a"].dequantize(torch.float64) - weight
    record = report.layers[0]
    assert record.loss == record.rtn_loss == pytest.approx(float(error.square().sum() / weight.square().sum()), 1e-4)
    assert (record.name, record.shape, record.loss_of) == ("parts.a", (70, 32), "weights")
    # Uniform weights: the step is 2 / (2^bits - 1) of the range, so the error is 1 / (2^bits - 1)^2 of the energy.
    assert all(layer.loss < 1.3 / (2**bits - 1) ** 2 for layer in report.layers)
    tokens = torch.arange(50)
    assert distance(model(tokens), dense_twin(model)(tokens)) < 1e-3
    # Sizes, counted anew from the disk layout.
    state = {name: t for name, t in model.state_dict().items() if ".weight_" in name and "shape" not in name}
    stored = sum(8 * t.nbytes for t in state.values())
    assert report.linear_bits == pytest.approx(_without_padding(stored, bits) / (70 * 32 + 33 * 70))
    assert report.base_bytes == base_bytes
    assert report.packed_bytes == pytest.approx(sum(t.nbytes for t in model.state_dict().values()))


def _without_padding(stored, bits):
    """70 columns fill their last word only in part; the padding is not the grid's."""
    return stored - 33 * (-70 * bits % 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_is_rounded_without_data_as_with_its_head_kept(family):
    model = tiny_model(family)
    report = quantize_(model, W4)
    assert report.coverage == 1.0
    assert len(packed(model)) == 2 * ALL_LINEARS[family] == len(report.layers)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert distance(logits(model), logits(original(family))) < 0.35


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("calibrated", [True, False])
def test_widths_without_a_packed_form_are_measured_in_plain_linears(bits, calibrated):
    model, spec = tiny_model("llama"), QuantSpec(bits, 32, True)
    tokens, method = (TOKENS, "gptq") if calibrated else (None, "rtn")
    report = quantize_(model, spec, method, calibration=tokens, packed=False)
    assert not packed(model) and report.coverage == 1.0 and len(report.layers) == 14
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        for group in weight[:4].reshape(4, -1, 32).flatten(0, 1):
            assert len(group.unique()) <= 2**bits
        assert not torch.equal(weight, original("llama").get_submodule(layer.name).weight)
    assert report.linear_bits == bits + 32 / 32, "a float32 scale per 32 weights"


def test_unpacked_and_packed_hold_the_same_weights():
    plain = tiny_model("llama")
    quantize_(plain, W4, "gptq", calibration=TOKENS, packed=False)
    for name, module in packed(quantized("llama", "gptq")[0]).items():
        assert torch.equal(plain.get_submodule(name).weight, dequantize(module.quantized_weight()))

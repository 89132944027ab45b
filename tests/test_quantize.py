"""quantize_: any module without data, every family with each method, and a report that says what happened."""

from __future__ import annotations

import copy
import functools
import json
import math

import pytest
import torch
from torch import nn

from lowbit import QuantLinear, QuantSpec, quantize_
from lowbit.affine import dequantize
from tiny_models import ALL_LINEARS, FAMILIES, random_tokens, tiny_model

W4 = QuantSpec(4, 32, False)
TOKENS = random_tokens()
METHODS = ("rtn", "gptq", "awq", "awq+gptq")
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


@functools.cache
def quantized(family, method):
    """A family's quantized model and its report; tests only read them."""
    model = tiny_model(family)
    return model, quantize_(model, W4, method, calibration=TOKENS)


@functools.cache
def original(family):
    return tiny_model(family)


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def dense_twin(model):
    """The model with an nn.Linear holding the dequantized weight in the place of every QuantLinear."""
    twin = copy.deepcopy(model)
    for name, module in packed(twin).items():
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        linear.weight.data, linear.bias = module.dequantize(), module.bias
        twin.set_submodule(name, linear)
    return twin


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def distance(a, b):
    return float((a - b).double().norm() / b.double().norm())


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
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_awq_says_where_it_could_not_fold(family, method):
    noted = {
        layer.name.partition(".layers.")[2][2:]: note
        for layer in quantized(family, method)[1].layers
        for note in layer.notes
        if "clip search alone" in note
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


# --- what a weight is calibrated on


def spied(monkeypatch, name):
    """Arguments of every call of a function of blockwise.py."""
    import lowbit.blockwise as blockwise

    calls, real = [], getattr(blockwise, name)

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(blockwise, name, spy)
    return calls


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_linears_that_read_one_input_share_one_factorization(monkeypatch, family):
    factorized = spied(monkeypatch, "factorize")
    solved = spied(monkeypatch, "gptq_quantize")
    quantize_(tiny_model(family), W4, "gptq", calibration=TOKENS)
    assert len(factorized) == 2 * 4, "attention input, attention output, MLP input, MLP output of two blocks"
    assert len({id(kwargs["factor"]) for _, kwargs in solved}) == 2 * 4
    assert sum(len(args[0]) for args, _ in solved) == sum(
        m.out_features for n, m in original(family).named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )


QKV = {"q_proj", "k_proj", "v_proj"}
READ_BEFORE_ANYTHING_IS_QUANTIZED = {
    "llama": QKV,
    "gemma3": QKV,
    "opt": QKV,
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},  # attention and MLP side by side
}
"""Linears of the first block whose inputs come straight from the embeddings."""


@pytest.mark.parametrize("family", READ_BEFORE_ANYTHING_IS_QUANTIZED)
def test_every_hessian_is_of_the_inputs_in_the_quantized_model(monkeypatch, family):
    """True-sequential, within a block and from block to block: each weight was fitted to what it will read."""
    solved = spied(monkeypatch, "gptq_quantize")
    model = tiny_model(family)
    report = quantize_(model, W4, "gptq", calibration=TOKENS)
    final, first = _second_moments(dense_twin(model)), _second_moments(tiny_model(family))
    layers, hessians = iter(report.layers), {}
    for (weight, hessian, *_), _ in solved:  # linears of one input are solved together, stacked
        rows = 0
        while rows < len(weight):
            layer = next(layers)
            rows, hessians[layer.name] = rows + layer.shape[0], hessian
        assert rows == len(weight)
    assert hessians.keys() == final.keys()
    assert all(distance(hessian, final[name]) < 1e-5 for name, hessian in hessians.items())
    same = {name.rpartition(".")[2] for name, hessian in hessians.items() if distance(hessian, first[name]) < 1e-3}
    assert same == READ_BEFORE_ANYTHING_IS_QUANTIZED[family]


def _second_moments(model):
    """``E[x x^T]`` of every decoder linear's input, in float64."""
    found = {}

    def hook(name):
        def record(_, args):
            x = args[0].flatten(0, -2).double()
            found[name] = x.T @ x / len(x)

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    logits(model)
    return found


def test_the_reported_loss_is_the_error_of_the_outputs():
    """Recomputed in float64 from the first weights of the model, whose inputs are the original ones."""
    report = quantized("llama", "rtn")[1]
    name = "model.layers.0.self_attn.q_proj"
    moment = _second_moments(tiny_model("llama"))[name]
    weight = original("llama").get_submodule(name).weight.detach().double()
    error = packed(quantized("llama", "rtn")[0])[name].dequantize(torch.float64) - weight
    expected = float((error @ moment * error).sum() / (weight @ moment * weight).sum())
    record = next(layer for layer in report.layers if layer.name == name)
    assert record.loss == pytest.approx(expected, rel=1e-4)
    assert record.loss == record.rtn_loss


def test_without_correction_gptq_aims_at_the_original_weights(monkeypatch):
    solved = spied(monkeypatch, "gptq_quantize")
    quantize_(tiny_model("llama"), W4, "gptq", calibration=TOKENS, correct=False)
    assert all(kwargs["target"] is None or torch.equal(kwargs["target"], args[0]) for args, kwargs in solved)
    solved.clear()
    quantize_(tiny_model("llama"), W4, "gptq", calibration=TOKENS)
    assert not torch.equal(solved[-1][1]["target"], solved[-1][0][0])


def test_two_runs_give_the_same_bits():
    for method in ("gptq", "awq"):
        again = tiny_model("llama")
        quantize_(again, W4, method, calibration=TOKENS)
        before = quantized("llama", method)[0].state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_bfloat16_model_stays_one():
    for method in ("gptq", "awq"):
        model = tiny_model("llama", dtype=torch.bfloat16)
        report = quantize_(model, W4, method, calibration=TOKENS)
        assert {p.dtype for p in model.state_dict().values()} == {torch.bfloat16, torch.int32, torch.int64}
        assert all(layer.loss < 0.02 for layer in report.layers)
        reference = logits(original("llama"))
        assert distance(logits(model).float(), reference) < 0.35


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
    if "awq" in method:
        assert notes["steps.0.first"][0] == "clip search alone: no folding table fits this block"
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
        (QuantSpec(3, 32), {}, r"3-bit weights have no packed form \(packed widths: \(2, 4, 8\)\); use packed=False"),
        (W4, {"method": "gptq"}, r"method 'gptq' needs calibration tokens"),
        (W4, {"method": "awq"}, r"method 'awq' needs calibration tokens"),
        (W4, {"calibration": TOKENS[0]}, r"must be token ids \(windows, seq_len\) int64 .* got \(24,\)"),
        (W4, {"calibration": TOKENS.int()}, r"got \(6, 24\) torch.int32"),
        (W4, {"calibration": TOKENS[:0]}, r"at least one window, got \(0, 24\)"),
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

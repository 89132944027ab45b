"""W8A8 from the one call: what is refused, static scales, SmoothQuant, and folders that run as the model in memory."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import nn

import lowbit
from lowbit import QuantSpec, quantize_
from lowbit.activations import build_spec, check_request
from lowbit.cli import main
from lowbit.linear import Int8Linear
from lowbit.smooth import StaticScale, measure_inputs, smooth_scales
from lowbit.spec import ActivationSpec
from lowbit.walk import capture_block_inputs, find_blocks
from tiny_models import BOOKS_4M, random_tokens, tiny_folder, tiny_model

DYNAMIC, STATIC = (QuantSpec(8, -1, True, ActivationSpec(8, dynamic)) for dynamic in (True, False))
CALIBRATION = BOOKS_4M.parent / "books-calib.txt"
TOKENS = random_tokens()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def distance(a, b):
    return float((a - b).double().norm() / b.double().norm())


def int8_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def ranges(model, **options):
    blocks = find_blocks(model)
    targets = [f"{b.name}.{n}" for b in blocks for n, m in b.module.named_modules() if isinstance(m, nn.Linear)]
    inputs = capture_block_inputs(model, blocks, [TOKENS[:4], TOKENS[4:]])
    return measure_inputs(blocks, targets, inputs, torch.device("cpu"), **options)


# --- what may be asked for


def test_the_arguments_name_the_two_schemes_and_whole_rows_are_the_default():
    assert build_spec(8, activations="int8") == DYNAMIC and build_spec(8, activations="int8-static") == STATIC
    assert build_spec() == QuantSpec(4, 128) and build_spec(8, -1) == QuantSpec(8, -1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"bits": 4}, "got bits 4"),
        ({"group_size": 128}, "got bits 8, group_size 128"),
        ({"symmetric": False}, "asymmetric"),
        ({"activations": "fp8"}, r"activations must be one of \('int8', 'int8-static'\) or None, got 'fp8'"),
    ],
)
def test_weights_that_do_not_go_with_int8_activations_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        build_spec(**{"bits": 8, "activations": "int8", **arguments})


@pytest.mark.parametrize(
    ("spec", "method", "smooth", "given", "complaint"),
    [
        (DYNAMIC, "awq", None, {}, r"must be one of \('gptq', 'rtn'\), got 'awq'"),
        (DYNAMIC, "gptq", None, {"packed": False}, "use packed=True"),
        (STATIC, "rtn", None, {"calibrated": False}, "static activations needs calibration tokens"),
        (DYNAMIC, "rtn", 0.5, {"calibrated": False}, "smooth needs calibration tokens"),
        (DYNAMIC, "rtn", 1, {}, "between 0 and 1, both excluded"),
        (DYNAMIC, "rtn", float("nan"), {}, "between 0 and 1"),
        (QuantSpec(8, -1, True), "gptq", 0.5, {}, "leaves them alone"),
        (QuantSpec(8, -1, False, ActivationSpec()), "gptq", None, {}, "symmetric weights"),
    ],
)
def test_what_does_not_go_together_is_refused(spec, method, smooth, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_request(spec, method, smooth, **{"calibrated": True, "packed": True, **given})


def test_quantize_refuses_before_it_changes_anything():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="static activations needs calibration"):
        quantize_(model, STATIC)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- static scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_static_scale_is_the_candidate_of_least_squared_error(dtype):
    """Every candidate's error again in float64, over inputs one of them an outlier, that came in three batches."""
    x = torch.randn(9999)
    x[7] = 12.0  # clipping it to 0.95 costs 0.36, and finer steps win twice that
    search = StaticScale(float(x.abs().max()), dtype)
    for part in x.split(4000):
        search.add(part)
    wide, candidates = x.double(), search.candidates.double()
    errors = torch.stack([((wide / c).clamp(-128, 127).round() * c - wide).square().sum() for c in candidates])
    chosen = search.best()
    assert chosen.shape == (1,) and chosen.dtype == dtype
    assert float(errors[candidates == chosen.double()][0]) <= float(errors.min()) * (1 + 1e-3)
    assert errors.min() < errors[0], "with an outlier some clipping is better than none"


def test_inputs_of_zeros_have_a_usable_scale():
    search = StaticScale(0.0, torch.float16)
    search.add(torch.zeros(7))
    assert search.best().tolist() == [1.0]


def test_linears_that_read_the_same_input_share_its_scale():
    found = ranges(tiny_model("llama"), static=True, alpha=None).scales
    layer = {name.rpartition(".")[2]: scale for name, scale in found.items() if ".0." in name}
    assert len(found) == 14
    assert layer["q_proj"] == layer["k_proj"] == layer["v_proj"] != layer["o_proj"]
    assert layer["gate_proj"] == layer["up_proj"] != layer["down_proj"]


def test_static_scales_come_from_the_inputs_of_the_model_as_it_runs():
    """The largest candidate of each is max |x| / 127 of the inputs that hooks on a plain forward pass see."""
    model, seen = tiny_model("llama"), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().max()}))
    logits(model)
    tops = {name: float(top) / 127 for name, top in seen.items()}
    for name, scale in ranges(tiny_model("llama"), static=True, alpha=None).scales.items():
        assert 0.3 * tops[name] * (1 - 1e-5) <= float(scale) <= tops[name] * (1 + 1e-5)


# --- SmoothQuant


def test_smoothing_follows_the_papers_formula_and_leaves_dead_channels():
    maxima, a, b = torch.rand(9) * 10, torch.randn(5, 9), torch.randn(3, 9)
    maxima[2], a[:, 4], b[:, 4] = 0, 0, 0
    for alpha in (0.25, 0.5, 0.8):
        expected = maxima.double() ** alpha / torch.cat([a, b]).abs().amax(0).double() ** (1 - alpha)
        expected[[2, 4]] = 1
        assert torch.allclose(smooth_scales(maxima, [a, b], alpha).double(), expected, rtol=1e-5)


def test_columns_that_read_one_channel_get_one_scale():
    channels = torch.tensor([0, 1, 0, 1])
    found = smooth_scales(torch.tensor([1.0, 9, 4, 1]), [torch.ones(2, 4)], 0.5, channels)
    assert found.tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt_neox"])
def test_smoothing_changes_the_weights_and_not_the_model(family):
    model = tiny_model(family)
    before = logits(model)
    found = ranges(model, static=False, alpha=0.5)
    assert distance(logits(model), before) < 2e-5, "float32 rounding alone"
    assert found.smoothed and not found.scales
    assert set(found.reasons).isdisjoint(found.smoothed)
    assert any("no scale passes its activation" in why for why in found.reasons.values()) == (family == "gpt_neox")


def test_smoothing_saves_a_model_whose_inputs_have_outlier_channels():
    """Two channels of every norm 60 times the others, undone in the linears: harmless until inputs share one scale."""

    def with_outliers():
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                readers = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                mlp = layer.mlp.gate_proj, layer.mlp.up_proj
                for norm, linears in ((layer.input_layernorm, readers), (layer.post_attention_layernorm, mlp)):
                    norm.weight[:2] *= 60
                    for linear in linears:
                        linear.weight[:, :2] /= 60
        return model

    expected = logits(with_outliers())
    errors = {}
    for smooth in (None, 0.5):
        model = with_outliers()
        quantize_(model, STATIC, "rtn", calibration=TOKENS, smooth=smooth)
        errors[smooth] = distance(logits(model), expected)
    assert errors[0.5] < 0.5 * errors[None]


# --- the model, in memory and in a folder


@pytest.mark.parametrize("spec", [DYNAMIC, STATIC], ids=lambda spec: spec.label())
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_decoder_linear_multiplies_integers_and_the_logits_stay(spec, method):
    model = tiny_model("llama")
    expected = logits(model)
    report = quantize_(model, spec, method, calibration=TOKENS)
    layers = int8_layers(model)
    assert len(layers) == 14 and report.coverage == 1.0
    assert all((layer.input_scale is None) == spec.activations.dynamic for layer in layers.values())
    assert distance(logits(model), expected) < 0.06
    assert any("14 static input scales" in note for note in report.notes) != spec.activations.dynamic


def test_dynamic_activations_need_no_data():
    model = tiny_model("llama")
    expected = logits(model)
    quantize_(model, DYNAMIC)
    assert len(int8_layers(model)) == 14 and distance(logits(model), expected) < 0.06


@pytest.fixture(scope="module", params=["int8", "int8-static"])
def folder(request, tmp_path_factory):
    """A tiny model's folder, quantized by the command, and the scheme."""
    path = tmp_path_factory.mktemp(request.param)
    tiny_folder(path / "model")
    line = f"--bits 8 --activations {request.param} --smooth 0.5 --calibration {CALIBRATION} --samples 4 --seq-len 64"
    assert main(["quantize", str(path / "model"), str(path / "out"), *line.split(), "--device", "cpu"]) == 0
    return path, request.param


def test_the_folder_runs_w8a8_with_the_logits_of_the_model_in_memory(folder):
    path, scheme = folder
    loaded, tokenizer = lowbit.load(path / "out", device="cpu")
    assert len(int8_layers(loaded)) == 14
    memory, _ = lowbit.hf.load_dense(path / "model")
    tokens = lowbit.data.token_windows(tokenizer, CALIBRATION.read_text(encoding="utf-8"), 64)[:4]
    quantize_(memory, build_spec(8, activations=scheme), "gptq", calibration=tokens, smooth=0.5)
    assert torch.equal(logits(loaded, tokens), logits(memory, tokens))
    state, expected = loaded.state_dict(), memory.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_the_folder_is_int_quantized_and_compressed_tensors_reads_its_weights(folder):
    path, scheme = folder
    section = json.loads((path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    (group,) = config.config_groups.values()
    assert section["format"] == "int-quantized"
    assert (group.input_activations.strategy, group.input_activations.dynamic) == (
        ("token", True) if scheme == "int8" else ("tensor", False)
    )
    stored = load_file(path / "out" / "model.safetensors")
    loaded, _ = lowbit.load(path / "out", device="cpu")
    for name, layer in int8_layers(loaded).items():
        tensors = {part: stored[f"{name}.{part}"] for part in ("weight", "weight_scale")}
        theirs = BaseCompressor.get_value_from_registry("int-quantized").decompress(tensors, group)["weight"]
        assert torch.equal(theirs, layer.dequantize())
        assert (f"{name}.input_scale" in stored) == (scheme == "int8-static")


def test_the_report_says_what_was_done(folder):
    path, scheme = folder
    record = json.loads((path / "out" / "lowbit.json").read_text())
    assert record["spec"]["activations"] == {"bits": 8, "dynamic": scheme == "int8"}
    assert "SmoothQuant with alpha 0.5 on the inputs of 14 weights" in record["notes"]


# --- code that comes with a model


@pytest.fixture
def foreign_code(tmp_path):
    """A model folder whose class is in a Python file of its own, which leaves a mark when it is run."""
    folder = tiny_folder(tmp_path / "model")
    mark = tmp_path / "was-run"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "llama-of-this-folder",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'llama-of-this-folder'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder, mark


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_code_of_the_models_own_runs_only_when_asked_for(foreign_code, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = foreign_code
    text = str(BOOKS_4M.parent / "books-test.txt")
    line = {
        "quantize": [str(folder), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"],
        "eval": [str(folder), "--data", text, "--seq-len", "32", "--max-windows", "1"],
    }[command]
    assert main([command, *line, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "trust" in error and "Traceback" not in error and not mark.exists()
    assert not (tmp_path / "out").exists()
    assert main([command, *line, "--device", "cpu", "--trust-remote-code"]) == 0
    assert mark.exists()

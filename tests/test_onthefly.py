"""LowbitConfig: from_pretrained quantizes a dense checkpoint while loading it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import architectures
import lowbit
from lowbit import LowbitConfig, QuantSpec, quantize_
from lowbit.activations import build_spec
from lowbit.checkpoint import read_checkpoint
from lowbit.hf import pack_op
from packed_folder import BOOKS_4M, edit_config, edit_tensors, packed_modules
from tiny_models import tiny_folder

TOKENS = torch.arange(5, 5 + 2 * 16).reshape(2, 16)
BLOCK_LINEARS = 14


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model", vocab=256)


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copied"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


OPTIONS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 64},
    "4 bits asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "2 bits": {"bits": 2, "group_size": 32},
    "8 bits by row": {"bits": 8, "group_size": -1},
    "8 bits asymmetric": {"bits": 8, "group_size": 64, "symmetric": False},
    "w8a8": {"bits": 8, "activations": "int8"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_codes_are_those_of_quantize(
    options: dict[str, Any], dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pack_op, "_ROWS_AT_A_TIME", 2048)  # so that these small weights, too, are cut into pieces
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowbitConfig(**options))
    expected = AutoModelForCausalLM.from_pretrained(dense)
    quantize_(expected, build_spec(**options), "rtn")
    assert len(packed_modules(model)) == BLOCK_LINEARS
    assert same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    again, _ = lowbit.load(tmp_path / "saved", device="cpu")
    assert same_state(again, model)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "t5", "llava"])
def test_architectures_whose_linears_hide(name: str, tmp_path: Path) -> None:
    """Conv1D, subclasses of nn.Linear, experts stored one by one and merged, two stacks, a text tower."""
    architectures.tiny(name).save_pretrained(tmp_path / "dense")
    auto = getattr(transformers, architectures.ARCHITECTURES[name].auto)
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=LowbitConfig(4, 32))
    report = model.hf_quantizer.report
    packed = packed_modules(model)
    assert report.coverage >= (0.9 if name == "deepseek_v3" else 0.99)  # whose latent attention stays dense in part
    assert list(packed) == [layer.name for layer in report.layers]
    expected = auto.from_pretrained(tmp_path / "dense")
    quantize_(expected, QuantSpec(4, 32), "rtn", allow_partial=True)  # of all the model, towers of pixels too
    for layer, module in packed.items():
        ours, theirs = module.state_dict(), expected.get_submodule(layer).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours), layer
    model.save_pretrained(tmp_path / "saved")
    again, _ = lowbit.load(tmp_path / "saved", device="cpu")
    ids = architectures.tokens()
    assert torch.equal(architectures.logits(again, ids), architectures.logits(model, ids))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_report_names_every_weight(dense: Path) -> None:
    config = LowbitConfig(4, 32, ignore=["down_proj"], allow_partial=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    report = model.hf_quantizer.report
    reasons = {weight.name: weight.reason for weight in report.skipped}
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "matches ignore 'down_proj'"
    assert reasons["lm_head.weight"].startswith("outside the decoder blocks")
    assert reasons["model.embed_tokens.weight"].startswith("embedding")
    matrices = {name for name, tensor in AutoModelForCausalLM.from_pretrained(dense).named_parameters()
                if tensor.ndim == 2}  # fmt: skip
    assert {f"{layer.name}.weight" for layer in report.layers} | reasons.keys() == matrices
    expected = AutoModelForCausalLM.from_pretrained(dense)
    wanted = quantize_(expected, QuantSpec(4, 32), "rtn", ignore=["down_proj", "lm_head"], allow_partial=True)
    errors = {layer.name: layer.loss for layer in wanted.layers}
    assert {layer.name: layer.loss for layer in report.layers} == pytest.approx(errors)
    assert (report.base_bytes, report.packed_bytes) == (wanted.base_bytes, wanted.packed_bytes)
    assert report.linear_bits == pytest.approx(wanted.linear_bits)
    assert "left dense  lm_head.weight" in report.summary()


def test_a_tied_output_head_is_counted_once(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BOOKS_4M, quantization_config=LowbitConfig(bits=4))
    written = lowbit.quantize(BOOKS_4M, tmp_path / "rtn", 4, method="rtn", verbose=False)
    report = model.hf_quantizer.report
    assert (report.base_bytes, report.packed_bytes) == (written.base_bytes, written.packed_bytes)
    assert report.skipped == written.skipped
    assert "the same weight as model.embed_tokens.weight" in [weight.reason for weight in report.skipped]


def test_the_saved_folder_is_anybodys(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowbitConfig(4, 32))
    out = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    checkpoint = read_checkpoint(tmp_path / "saved")
    assert len(checkpoint.linears) == BLOCK_LINEARS
    assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
    stored, original = load_file(tmp_path / "saved/model.safetensors"), load_file(dense / "model.safetensors")
    assert all(torch.equal(stored[name], original[name]) for name in checkpoint.dense)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not packed_modules(plain)
    assert (logits(plain) - logits(model)).norm() <= 1e-3 * logits(model).norm()
    lowbit.install()
    try:
        installed = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    finally:
        lowbit.uninstall()
    assert torch.equal(installed.generate(TOKENS[:1], max_new_tokens=3, do_sample=False), out)


def test_dtype_is_that_of_scales_and_activations(dense: Path) -> None:
    config = LowbitConfig(4, 32)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not any(p.requires_grad for module in packed_modules(model).values() for p in module.parameters())


def test_a_dictionary_will_do(dense: Path) -> None:
    fields = LowbitConfig(4, 32, ignore=["lm_head"]).to_dict()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowbitConfig.from_dict(fields))
    assert len(packed_modules(model)) == BLOCK_LINEARS


# --- bad input ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 7}, r"bits must be one of .*, got 7"),
    "bits without a format": ({"bits": 3}, r"bits must be one of \(2, 4, 8\) to be packed, got 3"),
    "group size": ({"group_size": 48}, r"group_size must be one of .*, got 48"),
    "symmetric": ({"symmetric": "yes"}, "symmetric must be .*, got 'yes'"),
    "activations": ({"activations": "fp8"}, r"activations must be one of \('int8', 'int8-static'\).* got 'fp8'"),
    "static activations": ({"bits": 8, "activations": "int8-static"}, "'int8-static' needs calibration"),
    "activations of 4 bits": ({"activations": "int8"}, "go with weights of 8 bits"),
    "ignore": ({"ignore": "lm_head"}, "ignore must be a sequence of regular expressions, got 'lm_head'"),
    "allow_partial": ({"allow_partial": 1}, "allow_partial must be True or False, got 1"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_not_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowbitConfig(**arguments)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"LowbitConfig has the fields .*, got \['groupsize'\]"):
        LowbitConfig.from_dict({"bits": 4, "groupsize": 64})


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "not finite": (lambda t: t[UP][3].fill_(float("nan")), "up_proj: its weight contains NaN or infinite values"),
    "missing": (lambda t: t.pop(UP), r"no weight for \['model\.layers\.0\.mlp\.up_proj'\], 1 layers in all"),
    "another shape": (lambda t: t.update({UP: t[UP][:64].clone()}), r"up_proj\.weight must have the shape \(128, 64\)"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_weights_that_cannot_be_quantized(
    change: Callable[[dict[str, Tensor]], object], message: str, copied: Path
) -> None:
    edit_tensors(copied, change)
    hf_logging.set_verbosity_error()
    try:
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(copied, quantization_config=LowbitConfig(4, 32))
    finally:
        hf_logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LowbitConfig(4), "group size 128 does not divide|choose another group size"),
        (LowbitConfig(4, 32, ignore=["gate"]), "would be quantized, at least 90% is expected"),
        (LowbitConfig(4, 32, ignore=["nothing"]), "ignore 'nothing' matches no weight"),
        (LowbitConfig(4, 32, ignore=["("]), "is not a regular expression"),
    ],
    ids=["group size", "coverage", "unused", "expression"],
)
def test_models_the_request_does_not_fit(config: LowbitConfig, message: str, dense: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_a_quantized_folder_is_not_quantized_again(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowbitConfig(4, 32))
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig but you are passing a LowbitConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=LowbitConfig(4, 32))


def test_no_folder_may_call_itself_lowbit(copied: Path) -> None:
    """transformers would ignore an unknown method and load what the file says under other names: nothing."""
    edit_config(copied, lambda config: config.update(quantization_config={"quant_method": "lowbit", "bits": 4}))
    with pytest.raises(ValueError, match="names the quantization method 'lowbit', which no file has"):
        AutoModelForCausalLM.from_pretrained(copied)

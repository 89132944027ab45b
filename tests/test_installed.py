"""lowbit.install(): plain from_pretrained keeps compressed-tensors checkpoints packed."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import architectures
import lowbit
from lowbit import QuantSpec
from lowbit.hf.installed import InstalledQuantizer
from packed_folder import BOOKS_4M, edit_config, edit_tensors, pack_folder, packed_modules
from tiny_models import tiny_folder

SPECS = {
    "w4": QuantSpec(4, 32, True),
    "w4-asymmetric": QuantSpec(4, 64, False),
    "w8-channel": QuantSpec(8, -1, True),
    "w8-asymmetric": QuantSpec(8, 32, False),
    "w8a8": None,
}
TOKENS = torch.arange(5, 5 + 2 * 24).reshape(2, 24) * 37 % 4096


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def folders(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    made = {}
    for name, spec in SPECS.items():
        if spec is None:
            lowbit.quantize(dense, root / name, 8, activations="int8", method="rtn", device="cpu", verbose=False)
            made[name] = root / name
        else:
            made[name] = pack_folder(dense, root / name, lambda module, s=spec: None if module == "lm_head" else s)
    return made


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def resident(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


@pytest.mark.parametrize("name", SPECS)
def test_plain_from_pretrained_is_lowbit_load(name: str, folders: dict[str, Path], installed: None) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders[name])
    ours, _ = lowbit.load(folders[name], device="cpu")
    kinds = {key: type(module) for key, module in packed_modules(ours).items()}
    assert len(kinds) == 14
    assert {key: type(module) for key, module in packed_modules(plain).items()} == kinds
    assert torch.equal(logits(plain), logits(ours))
    assert not any(parameter.requires_grad for m in packed_modules(plain).values() for parameter in m.parameters())


@pytest.mark.parametrize("name", SPECS)
def test_generating_leaves_the_model_as_large_as_its_file(name: str, folders: dict[str, Path], installed: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    before = resident(model)
    assert before == pytest.approx((folders[name] / "model.safetensors").stat().st_size, rel=0.05)
    model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert resident(model) == before
    assert [key for key, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]


@pytest.mark.parametrize("name", SPECS)
def test_what_is_saved_is_what_was_read(name: str, folders: dict[str, Path], installed: None, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(folders[name] / "model.safetensors")
    assert saved.keys() == original.keys()
    for key, tensor in original.items():
        assert saved[key].dtype == tensor.dtype and torch.equal(saved[key], tensor), key
    section = json.loads((folders[name] / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == section


def test_pipelines_and_headless_models(folders: dict[str, Path], installed: None) -> None:
    pipe = pipeline("text-generation", model=str(folders["w4-asymmetric"]), device="cpu")
    assert len(packed_modules(pipe.model)) == 14
    out = pipe("It is a truth", max_new_tokens=3, do_sample=False, return_full_text=False)
    ours, tokenizer = lowbit.load(folders["w4-asymmetric"], device="cpu")
    prompt = AutoTokenizer.from_pretrained(folders["w4-asymmetric"])("It is a truth", return_tensors="pt")
    expected = ours.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert out[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(packed_modules(AutoModel.from_pretrained(folders["w4"]))) == 14


def test_experts_stay_packed_one_by_one(installed: None, tmp_path: Path) -> None:
    architectures.tiny("mixtral").save_pretrained(tmp_path / "dense")
    config = lowbit.LowbitConfig(4, 32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(
        tmp_path / "packed"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert "model.layers.1.mlp.experts.3.down_proj" in packed_modules(model)
    assert len(packed_modules(model)) == 2 * (4 + 3 * 4)
    ours, _ = lowbit.load(tmp_path / "packed", device="cpu")
    ids = architectures.tokens()
    assert torch.equal(architectures.logits(model, ids), architectures.logits(ours, ids))


def test_dtype_reaches_scales_and_activations(folders: dict[str, Path], installed: None) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folders["w4-asymmetric"], dtype=dtype)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
        ours, _ = lowbit.load(folders["w4-asymmetric"], device="cpu", dtype=dtype)
        assert torch.equal(logits(model), logits(ours))


def test_install_twice_uninstall_once(folders: dict[str, Path]) -> None:
    rows = AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    before = [row["compressed-tensors"] for row in rows]
    lowbit.uninstall()  # of nothing
    assert [row["compressed-tensors"] for row in rows] == before
    lowbit.install()
    lowbit.install()
    assert rows[1]["compressed-tensors"] is InstalledQuantizer
    packed = AutoModelForCausalLM.from_pretrained(folders["w4"])
    lowbit.uninstall()
    assert [row["compressed-tensors"] for row in rows] == before
    plain = AutoModelForCausalLM.from_pretrained(folders["w4"])
    assert not packed_modules(plain) and len(packed_modules(packed)) == 14
    assert (logits(packed) - logits(plain)).norm() <= 1e-2 * logits(plain).norm()


def test_another_packages_classes_are_put_back() -> None:
    mine = type("Mine", (AUTO_QUANTIZER_MAPPING["compressed-tensors"],), {})
    theirs = AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = mine
    try:
        lowbit.install()
        lowbit.uninstall()
        assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is mine
    finally:
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = theirs


# --- what lowbit does not read goes to transformers, audibly --------------------------------------------------------


def float8_folder(dense: Path, out: Path) -> Path:
    """A ``float-quantized`` checkpoint (W8A8 in float8), which transformers reads and lowbit does not."""
    shutil.copytree(dense, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
    }
    edit_config(out, lambda config: config.update(quantization_config=section))
    return out


def test_a_scheme_lowbit_does_not_read_is_transformers_with_a_warning(
    dense: Path, tmp_path: Path, installed: None
) -> None:
    folder = float8_folder(dense, tmp_path / "float8")
    with pytest.warns(UserWarning, match="leaves this compressed-tensors checkpoint to transformers.*float-quantized"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert not packed_modules(model)
    original = logits(AutoModelForCausalLM.from_pretrained(dense))
    assert (logits(model) - original).norm() <= 0.1 * original.norm()


def test_a_state_dict_is_transformers_with_a_warning(folders: dict[str, Path], installed: None) -> None:
    state = load_file(folders["w4"] / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folders["w4"])
    with pytest.warns(UserWarning, match="given as a state dict"):
        model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert not packed_modules(model)


def test_their_quantizer_can_be_asked_for(folders: dict[str, Path], installed: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that the folder has a configuration of its own
        model = AutoModelForCausalLM.from_pretrained(
            folders["w4-asymmetric"], quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert not packed_modules(model)
    ours, _ = lowbit.load(folders["w4-asymmetric"], device="cpu")
    assert (logits(model) - logits(ours)).norm() <= 1e-2 * logits(ours).norm()


# --- bad input ------------------------------------------------------------------------------------------------------


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_packd"] = tensors.pop("model.layers.0.mlp.up_proj.weight_packed")


DAMAGED: dict[str, tuple[Any, str]] = {
    "a missing part": (rename, r"up_proj has .* but lacks \['weight_packed'\]"),
    "scales of zero": (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].zero_(), "up_proj.weight_scale"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoints_are_refused_as_by_load(
    change: Any, message: str, folders: dict[str, Path], tmp_path: Path, installed: None
) -> None:
    folder = Path(shutil.copytree(folders["w4"], tmp_path / "damaged"))
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_books_4m_says_what_it_said(installed: None, tmp_path: Path) -> None:
    spec = QuantSpec(4, 128, False)
    folder = pack_folder(BOOKS_4M, tmp_path / "w4", lambda name: None if name == "lm_head" else spec)
    model = AutoModelForCausalLM.from_pretrained(folder)
    dequantized = AutoModelForCausalLM.from_pretrained(BOOKS_4M, dtype=torch.float32)
    for name, module in packed_modules(model).items():
        dequantized.get_submodule(name).weight.data = module.dequantize(torch.float32)
    found, expected = logits(model).float(), logits(dequantized)
    # bfloat16 keeps 8 bits; its roundings add up over a few dozen operations
    assert (found - expected).norm() <= 2**-8 * 8 * expected.norm()

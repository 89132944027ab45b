"""Packed folders loaded through transformers stay packed and compute what compressed-tensors says; dense ones too."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from lowbit import hf
from lowbit.checkpoint import read_checkpoint
from lowbit.spec import QuantSpec
from packed_folder import (
    BOOKS_4M,
    decoder_only,
    dequantized_by_compressed_tensors,
    edit_tensors,
    pack_folder,
    packed_modules,
)

SPECS = [QuantSpec(4, 128, True), QuantSpec(4, 64, False), QuantSpec(8, -1, True), QuantSpec(2, 64, False)]
TOKENS = torch.arange(5, 5 + 2 * 48).reshape(2, 48) * 37 % 4096
BOOKS_LINEARS = 4 * 7


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[QuantSpec, Path]:
    root = tmp_path_factory.mktemp("books-4m")
    return {spec: pack_folder(BOOKS_4M, root / spec.label(), decoder_only(spec)) for spec in SPECS}


@pytest.fixture
def w4(folders: dict[QuantSpec, Path], tmp_path: Path) -> Path:
    """A copy of the symmetric 4-bit folder that a test may damage."""
    return Path(shutil.copytree(folders[SPECS[0]], tmp_path / "w4"))


# --- a packed folder stays packed and computes what compressed-tensors says -----------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_packed_logits_agree_with_compressed_tensors_in_float32(
    folders: dict[QuantSpec, Path], spec: QuantSpec
) -> None:
    model, _ = hf.load(folders[spec], device="cpu", dtype="float32")
    ours, theirs = logits(model), logits(dequantized_by_compressed_tensors(folders[spec]))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_every_packed_layer_is_a_quantlinear_and_stays_one(folders: dict[QuantSpec, Path], spec: QuantSpec) -> None:
    model, tokenizer = hf.load(folders[spec], device="cpu")
    before = packed_modules(model)
    assert len(before) == BOOKS_LINEARS
    assert before.keys() == read_checkpoint(folders[spec]).linears.keys()
    assert all(module.spec == spec for module in before.values())
    prompt = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 4
    assert packed_modules(model) == before
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_the_loaded_model_takes_the_memory_of_its_file(folders: dict[QuantSpec, Path], spec: QuantSpec) -> None:
    model, _ = hf.load(folders[spec], device="cpu")
    loaded = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert loaded == pytest.approx((folders[spec] / "model.safetensors").stat().st_size, rel=0.05)
    packed = [parameter for module in packed_modules(model).values() for parameter in module.parameters()]
    assert not any(parameter.requires_grad for parameter in packed)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_save_pretrained_writes_back_what_was_read(
    folders: dict[QuantSpec, Path], spec: QuantSpec, tmp_path: Path
) -> None:
    model, _ = hf.load(folders[spec], device="cpu")
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(folders[spec] / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor), name
    assert json.loads((tmp_path / "config.json").read_text()) == read_checkpoint(folders[spec]).config
    assert read_checkpoint(tmp_path).linears == read_checkpoint(folders[spec]).linears


def test_plain_transformers_opens_the_symmetric_folder(folders: dict[QuantSpec, Path]) -> None:
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folders[SPECS[0]], dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = hf.load(folders[SPECS[0]], device="cpu", dtype="float32")
    a, b = logits(ours), logits(theirs)
    assert (a - b).norm() <= 1e-3 * b.norm()


def test_layers_may_differ_in_spec(tmp_path: Path) -> None:
    def spec_for(name: str) -> QuantSpec | None:
        if name == "lm_head":
            return None
        return QuantSpec(8, -1, True) if "down_proj" in name else QuantSpec(4, 32, "q_proj" not in name)

    folder = pack_folder(BOOKS_4M, tmp_path / "mixed", spec_for, max_shard_bytes=500_000)
    model, _ = hf.load(folder, device="cpu")
    modules = packed_modules(model)
    assert {name: module.spec for name, module in modules.items()} == {name: spec_for(name) for name in modules}
    checkpoint = read_checkpoint(folder)
    for name, module in modules.items():
        stored, loaded = checkpoint.quantized_weight(name), module.quantized_weight()
        assert torch.equal(loaded.codes, stored.codes)
        assert torch.equal(loaded.scales, stored.scales)


def test_tied_embeddings_are_stored_once_and_tied_again(folders: dict[QuantSpec, Path]) -> None:
    stored = load_file(folders[SPECS[0]] / "model.safetensors")
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    model, _ = hf.load(folders[SPECS[0]], device="cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, load_file(BOOKS_4M / "model.safetensors")["model.embed_tokens.weight"])


def test_dtype_and_device(folders: dict[QuantSpec, Path]) -> None:
    for dtype, expected in [("auto", torch.bfloat16), ("float16", torch.float16), (torch.float32, torch.float32)]:
        model, _ = hf.load(folders[SPECS[1]], device="cpu", dtype=dtype)
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        assert floating == {expected}
        assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_loading_leaves_no_setting_behind(folders: dict[QuantSpec, Path], capfd: pytest.CaptureFixture[str]) -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), torch.get_default_dtype()
    hf.load(folders[SPECS[0]], device="cpu", dtype="float16")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), torch.get_default_dtype()) == before
    assert capfd.readouterr() == ("", "")


def test_weights_a_dense_model_has_no_place_for_are_named_in_one_line(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BOOKS_4M, tmp_path / "model"))
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.4.mtp.weight": torch.zeros(3)}))
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        hf.load_dense(copy)
    finally:
        logger.removeHandler(handler)
    assert said == [f"{copy}: LlamaForCausalLM has no place for these weights: ['model.layers.4.mtp.weight'], 1 in all"]


# --- architectures --------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**LLAMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "sliding_window": 16}),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 96, "max_position_embeddings": 64}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 2}),
}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path, quiet: None) -> Path:
    name, options = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_other_architectures_survive_the_round_trip(tiny: Path, tmp_path: Path) -> None:
    spec = QuantSpec(8, 32, False)
    folder = pack_folder(tiny, tmp_path / "packed", decoder_only(spec))
    model, tokenizer = hf.load(folder, device="cpu")
    assert tokenizer is None
    dense, _ = hf.load_dense(tiny)
    modules = packed_modules(model)
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert modules.keys() == linears - {"lm_head"}
    for name, module in modules.items():
        linear = dense.get_submodule(name)
        linear.weight.data = module.dequantize(torch.float32)
        assert (linear.bias is None) == (module.bias is None)
    tokens = TOKENS % 96
    ours, theirs = logits(model, tokens), logits(dense, tokens)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    dense_names = load_file(tiny / "model.safetensors").keys()
    packed_names = load_file(folder / "model.safetensors").keys()
    layers = read_checkpoint(folder).linears
    assert {name for name in packed_names if name.rpartition(".")[0] not in layers or name.endswith(".bias")} == {
        name for name in dense_names if name.removesuffix(".weight") not in layers
    }


def test_names_are_those_of_the_original_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    assert "model.layers.0.mlp.gate.weight" in model.state_dict()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
    assert hf.checkpoint_names(model, names) == {name: name for name in names}
    stored = dict(hf.dense_tensors(model, names))
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored
    assert stored["model.layers.1.block_sparse_moe.experts.1.w2.weight"].shape == (64, 96)
    assert not any("self_attn" in name for name in stored)


@pytest.mark.usefixtures("quiet")
def test_a_renamed_head_stays_dense_in_every_reader(tmp_path: Path) -> None:
    name, options = ARCHITECTURES["gpt_neox"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options, dtype="float32"))
    model.save_pretrained(tmp_path / "dense")
    assert hf.ignore_names(model, ["lm_head"]) == ["lm_head", "embed_out"]
    folder = pack_folder(tmp_path / "dense", tmp_path / "packed", decoder_only(QuantSpec(4, 32, True)))
    assert "embed_out.weight" in read_checkpoint(folder).dense
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    a, b = logits(hf.load(folder, device="cpu")[0], TOKENS % 96), logits(theirs, TOKENS % 96)
    assert (a - b).norm() <= 1e-3 * b.norm()


# --- what a packed folder takes over --------------------------------------------------------------------------------


def test_dense_tensors_and_configuration_are_those_of_the_source() -> None:
    model, _ = hf.load_dense(BOOKS_4M)
    original = load_file(BOOKS_4M / "model.safetensors")
    linears = [name.removesuffix(".weight") for name in original if name.endswith("_proj.weight")]
    dense = dict(hf.dense_tensors(model, linears))
    assert dense.keys() == {name for name in original if not name.endswith("_proj.weight")}
    assert all(torch.equal(dense[name], original[name]) for name in dense)
    stored = json.loads((BOOKS_4M / "config.json").read_text())
    assert hf.config_dict(model) == {**stored, "transformers_version": transformers.__version__}
    with pytest.raises(ValueError, match="cannot exclude nothing"):
        list(hf.dense_tensors(model, ["nothing"]))


def test_companion_files_travel_unchanged(folders: dict[QuantSpec, Path], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folders[SPECS[0]] / name).read_bytes() == (BOOKS_4M / name).read_bytes()
    source = Path(shutil.copytree(BOOKS_4M, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model, tokenizer = hf.load_dense(source)
    (tmp_path / "copied").mkdir()
    hf.companion_files(source, model, tokenizer, tmp_path / "copied")
    assert (tmp_path / "copied" / "chat_template.jinja").read_text() == "{{ messages }}"
    (tmp_path / "written").mkdir()
    written = hf.companion_files(None, model, tokenizer, tmp_path / "written")
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= set(written)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    assert again("A truth universally acknowledged") == tokenizer("A truth universally acknowledged")


def test_finer_scales_than_the_models_dtype_are_kept(w4: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    edit_tensors(w4, lambda t: t.update({name: t[name].float() * (1 + 2**-12)}))
    model, _ = hf.load(w4, device="cpu")
    module = model.model.layers[0].self_attn.q_proj
    assert torch.equal(module.quantized_weight().scales, load_file(w4 / "model.safetensors")[name])

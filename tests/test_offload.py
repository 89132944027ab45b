"""device_map, disk offload, static caches and torch.compile with packed models; only a CPU is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import LowbitConfig, QuantSpec
from packed_folder import pack_folder, packed_modules
from tiny_models import tiny_folder

TOKENS = torch.arange(5, 5 + 2 * 16).reshape(2, 16)
SPECS = {"w4": QuantSpec(4, 32, True), "w4-asymmetric": QuantSpec(4, 64, False), "w8": QuantSpec(8, -1, True)}
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model", vocab=256)


@pytest.fixture(scope="module", params=SPECS)
def folder(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = SPECS[request.param]
    out = tmp_path_factory.mktemp("packed") / request.param
    return pack_folder(dense, out, lambda name: None if name == "lm_head" else spec)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, module in packed_modules(model).items() if module.weight_packed.is_meta}


def assert_same_file(saved: Path, original: Path) -> None:
    found, expected = load_file(saved / "model.safetensors"), load_file(original / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps_of_one_device(device_map: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    ours, _ = lowbit.load(folder, device="cpu")
    assert len(packed_modules(model)) == 14 and not on_meta(model)
    assert torch.equal(logits(model), logits(ours))


def test_layers_on_disk_come_back_for_each_forward(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=SPLIT, offload_folder=tmp_path / "offload")
    away = {name for name in packed_modules(model) if name.startswith("model.layers.1.")}
    assert on_meta(model) == away and len(away) == 7
    ours, _ = lowbit.load(folder, device="cpu")
    # layers that come and go stay in the disk layout, and the repacked one adds in another order
    assert (logits(model) - logits(ours)).norm() <= 1e-5 * logits(ours).norm()
    out = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(out, ours.generate(TOKENS[:1], max_new_tokens=4, do_sample=False))
    assert on_meta(model) == away


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_is_saved_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=SPLIT, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", folder)


def test_all_on_disk(folder: Path, tmp_path: Path) -> None:
    everything = {"model": "disk", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=everything, offload_folder=tmp_path / "offload")
    assert len(on_meta(model)) == 14
    ours, _ = lowbit.load(folder, device="cpu")
    assert (logits(model) - logits(ours)).norm() <= 1e-5 * logits(ours).norm()


def test_quantizing_on_the_way_to_the_disk(dense: Path, tmp_path: Path) -> None:
    config = LowbitConfig(4, 32)
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, device_map=SPLIT, offload_folder=tmp_path / "offload"
    )
    assert len(on_meta(model)) == 7
    whole = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert (logits(model) - logits(whole)).norm() <= 1e-5 * logits(whole).norm()
    out = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(out, whole.generate(TOKENS[:1], max_new_tokens=4, do_sample=False))


def test_load_spreads_foreign_checkpoints_too(folder: Path, tmp_path: Path) -> None:
    """GPTQ's layout is converted while it is read; what belongs on the disk is written there."""
    spec = SPECS[folder.name]
    lowbit.convert(folder, tmp_path / "gptq", "gptq-v2", dtype="float16")
    whole, _ = lowbit.load(tmp_path / "gptq", device="cpu")
    model, _ = lowbit.load(tmp_path / "gptq", device_map=SPLIT, offload_folder=tmp_path / "offload")
    assert {module.spec for module in packed_modules(model).values()} == {spec}
    assert len(on_meta(model)) == 7
    assert (logits(model) - logits(whole)).norm() <= 1e-5 * logits(whole).norm()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_what_gptq_and_awq_wrote_is_saved_as_compressed_tensors(dense: Path, tmp_path: Path) -> None:
    """Codes, scales and zero points unchanged, from memory and from disk offload alike."""
    spec = QuantSpec(4, 32, False)
    folder = pack_folder(dense, tmp_path / "packed", lambda name: None if name == "lm_head" else spec)
    for to in ("gptq-v2", "awq"):
        lowbit.convert(folder, tmp_path / to, to, dtype="float16")
        lowbit.convert(tmp_path / to, tmp_path / f"{to}-expected", "compressed-tensors")
        lowbit.load(tmp_path / to, device="cpu")[0].to("cpu").save_pretrained(tmp_path / f"{to}-saved")
        assert_same_file(tmp_path / f"{to}-saved", tmp_path / f"{to}-expected")
        spread, _ = lowbit.load(tmp_path / to, device_map=SPLIT, offload_folder=tmp_path / f"{to}-offload")
        spread.save_pretrained(tmp_path / f"{to}-spread")
        assert_same_file(tmp_path / f"{to}-spread", tmp_path / f"{to}-expected")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device must be auto, got cpu"),
        ({"device_map": 3}, "device_map must be a name such as 'auto' or a dict of modules and devices, got 3"),
        ({"offload_folder": "somewhere"}, "offload_folder 'somewhere' goes with a device_map"),
        ({"device_map": "auto", "distributed_config": object()}, "not both"),
    ],
    ids=["device", "kind", "offload alone", "both"],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.load(folder, **options)


# --- moves, conversions, repacking and back -------------------------------------------------------------------------


def test_saving_after_moves_and_repacking(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in packed_modules(model).values():
        module.repack()
    model.to("cpu")
    for module in packed_modules(model).values():
        module.to(torch.float32).repack()
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", folder)


def test_push_to_hub_uploads_the_folder_that_was_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload itself is replaced by a copy of the files it is given."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, RepoUrl

    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    def create_repo(self: Any, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self: Any, repo_id: str, operations: Any, **_: Any) -> str:
        assert repo_id == "someone/packed"
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as source:
                    (uploaded / operation.path_in_repo).write_bytes(source.read())
        return "https://huggingface.co/commit"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nobody has written a card yet
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("someone/packed")
    assert_same_file(uploaded, folder)
    monkeypatch.undo()
    shutil.copyfile(folder / "tokenizer.json", uploaded / "tokenizer.json")
    again, _ = lowbit.load(uploaded, device="cpu")
    assert torch.equal(logits(again), logits(model))


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_cache_gives_the_same_tokens(cache: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    cached = model.generate(TOKENS, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(plain, cached)


def test_generate_with_a_static_cache_compiles(dense: Path) -> None:
    """On an accelerator transformers compiles the step of one token by itself for a static cache; here it is asked."""
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowbitConfig(4, 32, symmetric=False))
    assert model.hf_quantizer.is_compileable
    plain = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    compiled = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, compiled)
    torch._dynamo.reset()

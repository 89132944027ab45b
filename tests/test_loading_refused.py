"""Folders, ids, devices and tensors that load and load_dense must refuse, and how they say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit import hf
from lowbit.spec import QuantSpec
from packed_folder import BOOKS_4M, decoder_only, edit_config, edit_tensors, pack_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_folder(BOOKS_4M, tmp_path_factory.mktemp("books-4m") / "w4", decoder_only(QuantSpec(4, 128, True)))


@pytest.fixture
def w4(pristine: Path, tmp_path: Path) -> Path:
    """A packed folder that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "w4"))


def test_a_missing_folder_is_reported_as_one(tmp_path: Path) -> None:
    for load in (hf.load, hf.load_dense):
        for missing in (tmp_path / "nothing", "./nothing", "a/b/c", "~/no such folder"):
            with pytest.raises(FileNotFoundError, match="no such model folder"):
                load(missing)
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            load(tmp_path)
        with pytest.raises(NotADirectoryError, match="is a file"):
            load(BOOKS_4M / "config.json")


def test_an_unreachable_id_mentions_folder_and_hub() -> None:
    code = "from lowbit import hf\ntry: hf.load('no-such-org/no-such-model')\nexcept FileNotFoundError as e: print(e)"
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "no folder no-such-org/no-such-model here" in done.stdout, done.stderr
    assert "Hugging Face hub" in done.stdout


def test_a_quantized_folder_is_not_a_dense_model(w4: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantized already \\(quant_method 'compressed-tensors'\\)"):
        hf.load_dense(w4)
    other = Path(shutil.copytree(BOOKS_4M, tmp_path / "gptq"))
    edit_config(other, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ValueError, match="quant_method 'gptq'"):
        hf.load_dense(other)
    with pytest.raises(ValueError, match="says gptq, but no tensor is packed"):
        hf.load(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused_before_loading(tmp_path: Path) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"'{device}' was asked for, but torch sees 0 CUDA devices"):
            hf.load(tmp_path / "does not even exist", device=device)


def test_devices_and_dtypes_that_are_none(w4: Path) -> None:
    for device in ("gpu", "mps", ""):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
            hf.load(w4, device=device)
    for dtype in ("fp16", "int8", torch.float64):
        with pytest.raises(ValueError, match="dtype must be auto, float32"):
            hf.load(w4, device="cpu", dtype=dtype)


def test_a_corrupt_shard_is_refused_before_a_model_is_built(w4: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(BOOKS_4M, tmp_path / "dense"))
    for folder, message in ((w4, r"model\.safetensors is not the file"), (dense, r"model\.safetensors is corrupt")):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=message):
            hf.load(folder, device="cpu")
    (w4 / "lowbit.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or truncated"):
        hf.load(w4, device="cpu")


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def down_from_up(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.0.mlp.down_proj" in name]:
        tensors[name] = tensors[name.replace("down_proj", "up_proj")].clone()


UNFIT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing dense": (lambda t: t.pop("model.norm.weight"), r"missing from the folder: \['model\.norm\.weight'\]"),
    "missing packed": (rename("model.layers.3.mlp.up_proj", "x"), "x is packed, but LlamaForCausalLM has no nn.Linear"),
    "extra dense": (lambda t: t.update({"extra.weight": torch.ones(2)}), r"no place for: \['extra\.weight'\]"),
    "dense shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"another shape .*model\.norm\.weight"),
    "packed shape": (down_from_up, r"down_proj is packed with the shape \(768, 256\)"),
}


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_tensors_that_do_not_fit_the_model_are_refused(
    w4: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(w4, change)
    with pytest.raises(ValueError, match=message):
        hf.load(w4, device="cpu")


def test_a_packed_tied_head_is_refused(w4: Path) -> None:
    edit_tensors(w4, rename("model.layers.0.self_attn.q_proj", "lm_head"))
    edit_config(w4, lambda config: config["quantization_config"].update(ignore=[]))
    with pytest.raises(ValueError, match="lm_head is packed, but the configuration ties its weight"):
        hf.load(w4, device="cpu")


def test_scales_that_a_narrower_dtype_cannot_hold_are_refused(w4: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    edit_tensors(w4, lambda t: t[name].fill_(1e-30))
    hf.load(w4, device="cpu")
    with pytest.raises(ValueError, match="q_proj: its scales do not fit into"):
        hf.load(w4, device="cpu", dtype="float16")


def test_missing_dense_weights_are_never_random(tmp_path: Path) -> None:
    dense = Path(shutil.copytree(BOOKS_4M, tmp_path / "dense"))
    edit_tensors(dense, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing from the folder: \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        hf.load_dense(dense)

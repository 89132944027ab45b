"""A folder that is no model, not a dense one, or a damaged one."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from refusals import CALIBRATED, DAMAGE, arguments
from tiny_models import tiny_folder


def test_a_missing_folder(refused, tmp_path, out):
    message = refused(arguments(tmp_path / "missing", out, *CALIBRATED))
    assert str(tmp_path / "missing") in message and "no such model folder" in message


def test_a_folder_that_is_no_model(refused, tmp_path, out):
    (tmp_path / "photos").mkdir()
    message = refused(arguments(tmp_path / "photos", out, *CALIBRATED))
    assert message == f"{tmp_path / 'photos'} has no config.json, so it is not a model folder"


def test_a_folder_that_is_quantized_already(refused, packed, tmp_path, out):
    folder = shutil.copytree(packed, tmp_path / "packed")
    message = refused(arguments(folder, out, *CALIBRATED))
    assert message == f"{folder} is quantized already (quant_method 'compressed-tensors'); give the unquantized model"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_or_truncated_shard(refused, model, out, damage):
    damage(model / "model.safetensors")
    message = refused(arguments(model, out, *CALIBRATED))
    assert message.startswith(f"{model / 'model.safetensors'} is corrupt or truncated: ")


def test_a_missing_shard(refused, model, out):
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(arguments(model, out, *CALIBRATED))
    assert "the shard model-00001-of-00002.safetensors named by model.safetensors.index.json is missing" in message


def test_weights_that_are_missing_are_never_random(refused, model, out):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(arguments(model, out, *CALIBRATED))
    assert "weights missing from the folder: ['model.layers.1.mlp.up_proj.weight']" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_weights_that_are_not_finite(refused, tmp_path, out, name, value):
    model = tiny_folder(tmp_path / "broken", damage=lambda m: m.get_parameter(name).view(-1)[5:6].fill_(value))
    message = refused(arguments(model, out, *CALIBRATED))
    assert message == f"{name} contains NaN or infinite values; the model cannot be quantized"


def test_a_config_that_is_not_json(refused, model, out):
    (model / "config.json").write_text('{"model_type": "llama", ')
    message = refused(arguments(model, out, *CALIBRATED))
    assert message.startswith(f"{model / 'config.json'} is not a readable JSON file")

"""What ``lowbit inspect`` says about a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoint import CheckpointWriter, linear_tensors, quantization_config
from lowbit.spec import QuantSpec
from packed_folder import BOOKS_4M, TINY_LAYERS, edit_config, random_layer, write_tiny


def test_bits_and_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    found = lowbit.inspect(write_tiny(tmp_path / "out", TINY_LAYERS))
    assert found.packed
    assert found.hashes_verified is True
    assert found.dense_bytes == 7 * 4
    assert found.dense_dtypes == {"float32": 28}
    down, up, second = found.layers
    assert (up.name, up.shape, up.spec) == ("layers.0.up", (5, 64), "w4g32sym")
    # 64 codes of 4 bits, 2 bfloat16 scales per row, and the shape's two int64
    assert up.bytes == 5 * (64 * 4 // 8 + 2 * 2) + 16
    # 13 codes of 8 bits fill 4 words; one scale per row; 7 zero points of 8 bits fill 2 words
    assert down.bytes == 7 * (4 * 4 + 2) + 2 * 4 + 16
    assert up.bits_per_weight == 8 * up.bytes / (5 * 64)
    assert found.packed_bytes == up.bytes + down.bytes + second.bytes
    assert found.bits_per_weight == 8 * found.packed_bytes / (5 * 64 + 7 * 13 + 17 * 64)
    assert {info.spec: (info.layers, info.weights) for info in found.specs} == {
        "w2g32asym": (1, 17 * 64),
        "w4g32sym": (1, 5 * 64),
        "w8gchasym": (1, 7 * 13),
    }
    assert [info.weights for info in found.specs] == sorted((info.weights for info in found.specs), reverse=True)


def test_a_symmetric_group_of_128_costs_an_eighth_of_a_bit(tmp_path: Path) -> None:
    found = lowbit.inspect(write_tiny(tmp_path / "out", {"m": random_layer(256, 1024, QuantSpec(4, 128, True))}))
    assert found.bits_per_weight == pytest.approx(4.125, abs=1e-3)


def test_records_of_lowbit_json_are_shown(tmp_path: Path) -> None:
    qw = random_layer(5, 64, QuantSpec(4, 32, True))
    record = {
        "model": "books",
        "method": "gptq",
        "layers": [
            {"name": "a", "shape": [5, 64], "spec": "w4g32sym", "method": "gptq", "loss": 0.125, "rtn_loss": 0.5}
        ],
        "skipped": [{"name": "lm_head", "shape": [9, 64], "reason": "output head"}],
    }
    with CheckpointWriter(tmp_path / "out") as writer:
        for key, tensor in linear_tensors("a", qw).items():
            writer.add(key, tensor)
        writer.add_json("config.json", {"quantization_config": quantization_config({"a": qw.spec}, ["lm_head"])})
        writer.finish(record)
    found = lowbit.inspect(tmp_path / "out")
    assert (found.layers[0].method, found.layers[0].loss, found.layers[0].rtn_loss) == ("gptq", 0.125, 0.5)
    assert found.skipped == (record["skipped"][0],)
    assert found.record == {"lowbit_version": lowbit.__version__, "model": "books", "method": "gptq"}
    text = str(found)
    for expected in ("w4g32sym", "gptq", "0.125", "0.5", "output head", "every file agrees with lowbit.json"):
        assert expected in text


def test_the_dict_is_json_and_holds_what_the_object_holds(tmp_path: Path) -> None:
    found = lowbit.inspect(write_tiny(tmp_path / "out", TINY_LAYERS))
    again = json.loads(json.dumps(found.to_dict()))
    assert again["bits_per_weight"] == found.bits_per_weight
    assert [layer["name"] for layer in again["layers"]] == sorted(TINY_LAYERS)
    assert again["layers"][0]["loss"] is None


def test_a_folder_of_another_tool_has_no_hashes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out", TINY_LAYERS)
    (folder / "lowbit.json").unlink()
    found = lowbit.inspect(folder)
    assert found.hashes_verified is None
    assert found.layers[0].loss is None
    assert "no lowbit.json" in str(found)


def test_a_dense_folder_says_so() -> None:
    found = lowbit.inspect(BOOKS_4M)
    assert not found.packed
    assert found.bits_per_weight is None
    assert found.layers == found.specs == ()
    assert found.dense_dtypes == {"bfloat16": found.dense_bytes}
    assert "dense, not quantized" in str(found)
    json.dumps(found.to_dict())


def test_damage_and_foreign_formats_are_errors(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out", TINY_LAYERS)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was written"):
        lowbit.inspect(folder)
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ValueError, match="'fp8'"):
        lowbit.inspect(folder)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        lowbit.inspect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        lowbit.inspect(tmp_path / "empty")


def test_a_local_folder_is_described_without_transformers(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out", {"m": random_layer(4, 32, QuantSpec(4, 32, True))})
    root = Path(__file__).parent.parent
    code = f"import sys, lowbit; lowbit.inspect({str(folder)!r}); print('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_foreign_formats_are_described_too() -> None:
    fixtures = Path(__file__).parent / "fixtures"
    found = lowbit.inspect(fixtures / "gptqmodel-v2-w4g32-asym-actorder")
    assert (found.format, len(found.layers), found.hashes_verified) == ("gptq-v2", 7, None)
    assert {layer.spec for layer in found.layers} == {"w4g32asym+order"}
    assert "gptq-v2, 7 packed layers" in str(found)
    assert lowbit.inspect(fixtures / "gptqmodel-awq-w4g32").format == "awq"
    mixed = lowbit.inspect(fixtures / "llmcompressor-mixed")
    assert {info.spec: info.layers for info in mixed.specs} == {"w8gchsym": 4, "w4g32asym": 2, "w4g32sym": 1}

"""What lowbit.convert refuses: one message that names what the target cannot hold, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.checkpoint import CheckpointWriter, linear_tensors, quantization_config
from lowbit.cli import main
from lowbit.convert import convert
from lowbit.spec import QuantSpec
from packed_folder import BOOKS_4M, edit_tensors, names_in, random_layer, write_tiny

FIXTURES = Path(__file__).parent / "fixtures"

REFUSED: dict[str, tuple[str, str, str]] = {
    "column order": ("gptqmodel-v1-w4g32-actorder", "compressed-tensors", "cannot hold reordered columns (act-order"),
    "column order awq": ("gptqmodel-v1-w4g32-actorder", "awq", "awq cannot hold reordered columns"),
    "8 bits": ("llmcompressor-w8ch-sym", "awq", "awq holds 4-bit weights, this one has 8 bits"),
    "zero": ("gptqmodel-v2-w4g32-asym", "gptq", "cannot hold a zero point of 0"),
    "mixed": ("llmcompressor-mixed", "awq", "this one has 8 bits"),
    "activations": ("llmcompressor-w8a8-dynamic", "gptq", "gptq cannot hold quantized activations"),
    "activations awq": ("llmcompressor-w8a8-static", "awq", "awq cannot hold quantized activations"),
}


@pytest.mark.parametrize(("name", "to", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_what_a_format_cannot_hold_is_one_message(
    name: str, to: str, message: str, existing: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / name
    if name == "gptqmodel-v2-w4g32-asym":  # whose zero points are from 1: the shift of its weights can be turned round
        source = flipped(source, tmp_path / "flipped")
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "config.json").write_text("{}")
    before = names_in(tmp_path)
    arguments = ["convert", str(source), str(out), "--to", to, *(["--overwrite"] if existing else [])]
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.startswith("lowbit: error: ") and captured.err.count("\n") == 1
    assert message in captured.err and "model.layers.0." in captured.err
    assert names_in(tmp_path) == before and (not existing or names_in(out) == ["config.json"])


def flipped(source: Path, out: Path) -> Path:
    """The same model with every code and zero point mirrored: zero points of 15 become 0."""
    shutil.copytree(source, out)

    def mirror(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith((".qweight", ".qzeros")):
                tensors[name] = ~tensor

    edit_tensors(out, mirror)
    return out


def test_differing_group_sizes_and_ambiguous_names_do_not_fit_awq(tmp_path: Path) -> None:
    two = {"a.0.m": random_layer(8, 64, QuantSpec(4, 32, False)), "a.0.n": random_layer(8, 64, QuantSpec(4, 64, False))}
    with pytest.raises(ValueError, match=r"one group size for all layers, this checkpoint has \[32, 64\]"):
        convert(write_tiny(tmp_path / "two", two), tmp_path / "out", "awq", verbose=False)
    with CheckpointWriter(tmp_path / "gate") as writer:
        for key, tensor in linear_tensors("a.0.gate_proj", two["a.0.m"]).items():
            writer.add(key, tensor)
        writer.add("a.0.gate.weight", torch.ones(2, 64))
        section = quantization_config({"a.0.gate_proj": two["a.0.m"].spec}, ["a.0.gate"])
        writer.add_json("config.json", {"quantization_config": section})
        writer.finish({})
    with pytest.raises(ValueError, match=r"awq cannot leave a\.0\.gate dense: .* a\.0\.gate_proj has it too"):
        convert(tmp_path / "gate", tmp_path / "out", "awq", verbose=False)
    assert not (tmp_path / "out").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"to": "gguf"}, "the target must be one of compressed-tensors, gptq, gptq-v2, awq, dense, got 'gguf'"),
    "dtype": ({"to": "gptq", "dtype": "int8"}, "dtype must be auto, float32, float16, bfloat16, got 'int8'"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_mistyped_option_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        convert(FIXTURES / "gptqmodel-v1-w4g32-sym", tmp_path / "out", verbose=False, **options)
    assert str(error.value) == message


def test_a_dense_model_and_a_folder_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not quantized"):
        convert(BOOKS_4M, tmp_path / "out", "awq", verbose=False)
    with pytest.raises(FileNotFoundError, match="no/such"):
        convert("no/such/folder", tmp_path / "out", "awq", verbose=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        convert(FIXTURES / "gptqmodel-v1-w4g32-sym", tmp_path / "out", "gptq", verbose=False)
    inside = shutil.copytree(FIXTURES / "gptqmodel-v1-w4g32-sym", tmp_path / "model")
    with pytest.raises(ValueError, match="outside the input folder"):
        convert(inside, inside / "out", "gptq", verbose=False)


LARGE = 1e6
"""More than float16 holds (65504), less than bfloat16 does."""


def with_a_large_norm(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"][3] = -LARGE


def with_large_scales(tensors: dict[str, Tensor]) -> None:
    tensors["a.weight_scale"].fill_(LARGE / 100)  # in range themselves: 15 - 8 of them are not


@pytest.mark.parametrize(
    ("to", "change", "message"),
    [
        (
            "compressed-tensors",
            with_a_large_norm,
            r"norm\.weight: 1 of 7 .* range of float16, such as -1e\+06",
        ),
        ("dense", with_a_large_norm, r"norm\.weight: 1 of 7 values are out of the range of float16"),
        ("dense", with_large_scales, r"a\.weight: \d+ of 512 values are out of the range of float16, such as -?[6-8]"),
    ],
    ids=["dense tensor", "dense tensor of an expanded model", "expanded weight"],
)
def test_what_a_dtype_cannot_hold_is_refused_before_anything_is_written(
    to: str, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    """Never an infinity in the place of a number."""
    source = write_tiny(tmp_path / "packed", {"a": random_layer(8, 64, QuantSpec(4, 32, True))})
    edit_tensors(source, change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to, dtype="float16", verbose=False)
    assert names_in(tmp_path) == ["packed"]
    convert(source, tmp_path / "out", to, dtype="bfloat16", verbose=False)
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in stored if tensor.is_floating_point())


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = FIXTURES / "gptqmodel-v1-w4g32-sym"
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "compressed-tensors", "--json"]) == 0
    fields = json.loads(capfd.readouterr().out)
    assert fields["read"] == "gptq" and fields["written"] == "compressed-tensors" and fields["scale_error"] == 0
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "gptq"]) == 2
    assert "exists" in capfd.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "gptq", "--overwrite"]) == 0
    assert "7 layers, gptq -> gptq" in capfd.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "gguf"]) == 2
    assert names_in(tmp_path) == ["out"]

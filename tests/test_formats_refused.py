"""Foreign checkpoints that are damaged, contradict themselves, or are of a kind lowbit does not read; and the habits of
old writers that are no damage."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import hf
from lowbit.affine import QuantizedWeight
from lowbit.checkpoint import read_checkpoint
from lowbit.cli import main
from lowbit.convert import convert
from lowbit.formats import parse_section
from lowbit.formats.base import StoredWeight
from lowbit.formats.gptq import gptq_tensors
from lowbit.linear import QuantLinear
from lowbit.packing import pack_codes
from lowbit.spec import QuantSpec
from packed_folder import edit_config, edit_tensors

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) * 7 % 32
DOWN_PROJ = "model.layers.0.mlp.down_proj"
V1, V2, AWQ_FILE = "gptqmodel-v1-w4g32-sym", "gptqmodel-v2-w4g32-asym-actorder", "gptqmodel-awq-w4g32"


def test_gptq_zeros_that_underflowed_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file of AutoRound's as it is: 36 zero points of 0, stored as 15."""
    folder = FIXTURES / "autoround-gptq-w4g32-underflow"
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "dense"]) == 2
    error = capsys.readouterr().err
    assert "down_proj.qzeros holds 15 in 36 of 192 places" in error and "gptq_v2" in error
    assert not (tmp_path / "out").exists()


def test_asymmetric_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_activations\.symmetric must be True, got False"):
        read_checkpoint(FIXTURES / "llmcompressor-w8a8-static-asym")


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


# --- what must be refused -------------------------------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
SECTIONS: dict[str, tuple[Any, str]] = {
    "another method": ({"quant_method": "bitsandbytes"}, r"lowbit reads .*gptq.*awq.*'bitsandbytes'"),
    "a private method": ({"quant_method": "my-own"}, "lowbit reads .*'my-own'"),
    "no method": ({}, "lowbit reads .* None"),
    "no object": (["gptq"], "JSON object"),
    "gptq format": ({**GPTQ, "checkpoint_format": "marlin"}, r"\['gptq', 'gptq_v2'\], got 'marlin'"),
    "gptq format type": ({**GPTQ, "checkpoint_format": ["gptq"]}, "checkpoint_format must be one of"),
    "gptq marlin": ({**GPTQ, "is_marlin_format": True}, "is_marlin_format"),
    "gptq words": ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype must be 'int32'"),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, r"bits must be one of \(2, 4, 8\) to be read, got 3"),
    "gptq bits missing": ({key: GPTQ[key] for key in GPTQ if key != "bits"}, "bits must be"),
    "gptq group": ({**GPTQ, "group_size": 48}, "group_size must be one of .* got 48"),
    "gptq sym": ({**GPTQ, "sym": "yes"}, "sym must be true or false"),
    "gptq activations": ({**GPTQ, "activation": {"bits": 8}}, "activation must be empty"),
    "gptq adapter": ({**GPTQ, "adapter": {"name": "lora"}}, "adapter must be empty"),
    "gptq dynamic regex": ({**GPTQ, "dynamic": {"+:(": {}}}, "not a regular expression"),
    "gptq dynamic bits": ({**GPTQ, "dynamic": {"+:a": {"bits": 3}}}, r"dynamic\['\+:a'\].bits must be"),
    "auto-round packing": ({**ROUND, "packing_format": "auto_round:llm_compressor"}, "packing_format must be one of"),
    "auto-round float": ({**ROUND, "data_type": "mx_fp"}, "data_type must be 'int', got 'mx_fp'"),
    "auto-round activations": ({**ROUND, "act_bits": 8}, "act_bits must be 16, got 8"),
    "auto-round rotation": ({**ROUND, "rotation_config": {"name": "h"}}, "rotation_config must be empty"),
    "auto-round 3 bits": ({**ROUND, "bits": 3}, r"bits must be one of \(2, 4, 8\) to be read, got 3"),
    "auto-round layer": ({**ROUND, "extra_config": {"a": 4}}, r"extra_config\['a'\] must be a JSON object"),
    "auto-round awq layer": (
        {**ROUND, "packing_format": "auto_round:auto_awq", "extra_config": {"a": {"bits": 8}}}, "settings of their own"
    ),
    "awq version": ({**AWQ, "version": "gemv"}, "AWQ version must be 'gemm' to be read, got 'gemv'"),
    "awq backend": ({**AWQ, "backend": "llm-awq"}, "backend must be 'autoawq'"),
    "awq 8 bits": ({**AWQ, "bits": 8}, "AWQ weights have 4 bits, got 8"),
    "awq group": ({**AWQ, "group_size": 48}, "group_size must be one of"),
    "awq exceptions": ({**AWQ, "modules_to_not_convert": "lm_head"}, "must be a list"),
}  # fmt: skip


@pytest.mark.parametrize(("section", "message"), SECTIONS.values(), ids=SECTIONS)
def test_a_configuration_lowbit_does_not_read_is_refused(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_section(section)


@pytest.mark.parametrize(("section", "message"), SECTIONS.values(), ids=SECTIONS)
def test_the_command_line_refuses_it_in_one_message(
    section: Any, message: str, damaged: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(V1)
    edit_config(folder, lambda config: config.update(quantization_config=section))
    text = folder.parent / "text.txt"
    text.write_text("It was the best of times.")
    before = sorted(folder.parent.rglob("*"))
    convert_to_dense = ["convert", str(folder), str(folder.parent / "out"), "--to", "dense"]
    evaluate = ["eval", str(folder), "--data", str(text), "--device", "cpu"]
    for command in (["inspect", str(folder)], ["doctor", str(folder)], convert_to_dense, evaluate):
        assert main(command) == 2
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.startswith("lowbit: error: ") and "Traceback" not in captured.err
        assert re.search(message, captured.err) and captured.err.count("\n") == 1
    assert sorted(folder.parent.rglob("*")) == before


def change(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN_PROJ}.{name}"] = make(tensors[f"{DOWN_PROJ}.{name}"])

    return apply


def poke(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return apply


STATIC, DYNAMIC = "llmcompressor-w8a8-static", "llmcompressor-w8a8-dynamic"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "g_idx too large": (V2, change("g_idx", poke((5,), 3)), r"g_idx must be in \[0, 2\], got 3 at column 5"),
    "g_idx negative": (V2, change("g_idx", poke((0,), -1)), r"g_idx must be in .* got -1 at column 0"),
    "g_idx irregular": (V2, change("g_idx", torch.zeros_like), "every group 32 columns, but group 0 has 96"),
    "g_idx length": (V2, change("g_idx", lambda t: t[:-1].clone()), "group_size 32 does not divide K = 95"),
    "g_idx without desc_act": (V1, change("g_idx", lambda t: t.flip(0)), "says desc_act: false"),
    "v1 zero underflow": (V1, change("qzeros", poke((1, 2), -1)), "qzeros holds 15 in 8 of 192 places"),
    "zeros of a symmetric layer": (V1, change("qzeros", poke((0, 0), 0)), "zero points other than 8, .* sym: true"),
    "no zeros": (V1, lambda t: t.pop(f"{DOWN_PROJ}.qzeros"), "lacks .*qzeros"),
    "no scales": (V1, lambda t: t.pop(f"{DOWN_PROJ}.scales"), "lacks .*scales"),
    "codes dtype": (V1, change("qweight", Tensor.long), "qweight must be torch.int32"),
    "codes too few": (V1, change("qweight", lambda t: t[:-4].clone()), r"qweight must be .* \(12, 64\), got .* \(8,"),
    "zero scale": (V1, change("scales", poke((2, 1), 0.0)), r"finite and not zero, got 0.0 at \[2, 1\]"),
    "nan scale": (V1, change("scales", poke((0, 0), float("nan"))), "finite and not zero, got nan"),
    "scales shape": (V1, change("scales", lambda t: t.t().contiguous()), r"scales must be .* \(3, 64\)"),
    "dense weight too": (V1, lambda t: t.update({f"{DOWN_PROJ}.weight": torch.zeros(64, 96)}), "must not have"),
    "nothing packed": (V1, lambda t: [t.pop(n) for n in list(t) if ".layers." in n], "no tensor is packed"),
    "awq codes": (AWQ_FILE, change("qweight", lambda t: t[:-1].clone()), "does not divide K = 127"),
    "awq zeros": (AWQ_FILE, change("qzeros", lambda t: t[:1].clone()), r"qzeros must be .* \(4, 8\)"),
    "int8 dtype": (DYNAMIC, change("weight", Tensor.short), "weight must be torch.int8"),
    "int8 scales": (DYNAMIC, change("weight_scale", lambda t: t.flatten()), r"weight_scale must be .* \(64, 1\)"),
    "int8 zero scale": (DYNAMIC, change("weight_scale", poke((3, 0), 0.0)), r"not zero, got 0.0 at \[3, 0\]"),
    "int8 weight gone": (DYNAMIC, lambda t: t.pop(f"{DOWN_PROJ}.weight"), r"down_proj has .* lacks \['weight'\]"),
    "int8 zeros": (
        DYNAMIC, lambda t: t.update({f"{DOWN_PROJ}.weight_zero_point": torch.zeros(64, 1).char()}), "symmetric: True"
    ),
    "input scale of dynamic activations": (
        DYNAMIC, lambda t: t.update({f"{DOWN_PROJ}.input_scale": torch.ones(1)}), "must not have a tensor 'input_scale'"
    ),
    "no input scale": (STATIC, lambda t: t.pop(f"{DOWN_PROJ}.input_scale"), r"lacks \['input_scale'\]"),
    "negative input scale": (STATIC, change("input_scale", torch.neg), "input_scale must be finite and positive"),
    "input scales": (STATIC, change("input_scale", lambda t: t.repeat(2)), r"input_scale must be .* \(1,\), got"),
    "awq scale": (AWQ_FILE, change("scales", poke((1, 1), float("inf"))), "finite and not zero, got inf"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_agree_are_refused(
    damaged: Callable[[str], Path],
    name: str,
    damage: Callable[[dict[str, Tensor]], object],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = damaged(name)
    edit_tensors(folder, damage)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)
    before = sorted(folder.parent.rglob("*"))
    out = str(folder.parent / "out")
    for command in (["inspect", str(folder)], ["convert", str(folder), out, "--to", "dense"]):
        assert main(command) == 2
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.startswith("lowbit: error: ") and "Traceback" not in captured.err
        assert re.search(message, captured.err) and captured.err.count("\n") == 1
    assert sorted(folder.parent.rglob("*")) == before


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bits": (V1, {"bits": 8}, r"qweight must be torch.int32 \(24, 64\)"),
    "group size": (V1, {"group_size": 64}, "group_size 64 does not divide K = 96"),
    "symmetric": (V2, {"sym": True}, "sym: true"),
    "version": (V2, {"checkpoint_format": "gptq"}, "qzeros holds 15"),
    "act-order": (V2, {"desc_act": False}, "desc_act: false"),
    "excluded": (V1, {"dynamic": {"-:.*down_proj": {}}}, "leaves it out"),
    "method": (V1, {"quant_method": "awq"}, "group_size 32 does not divide K = 12"),
    "awq symmetric": (AWQ_FILE, {"zero_point": False}, "zero_point: false"),
    "awq excluded": (AWQ_FILE, {"modules_to_not_convert": ["down_proj"]}, "modules_to_not_convert lists 'down_proj'"),
    "awq group size": (AWQ_FILE, {"group_size": 128}, r"qzeros must be torch.int32 \(1, 8\)"),
}


@pytest.mark.parametrize(("name", "fields", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_configuration_that_contradicts_its_tensors_is_refused(
    damaged: Callable[[str], Path], name: str, fields: dict[str, Any], message: str
) -> None:
    folder = damaged(name)
    edit_config(folder, lambda config: config["quantization_config"].update(fields))
    with pytest.raises(ValueError, match=message):
        hf.load(folder, device="cpu")


def test_a_missing_shard_is_named(damaged: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = damaged(V1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {**dict.fromkeys(tensors, "model-00001-of-00002.safetensors"), "x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileNotFoundError, match=r"the shard model-00002-of-00002\.safetensors .* is missing"):
        read_checkpoint(folder)
    for command in ("inspect", "doctor"):
        assert main([command, str(folder)]) == 2
        assert "the shard model-00002-of-00002.safetensors" in capfd.readouterr().err


def test_code_that_comes_with_a_model_is_not_run(
    damaged: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(V1)
    edit_config(folder, lambda config: config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}))
    (folder / "own.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load(folder, device="cpu")
    text = folder / "text.txt"
    text.write_text("It was the best of times.")
    assert main(["eval", str(folder), "--data", str(text), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowbit: error: ") and "Traceback" not in error and "trust_remote_code" in error


# --- anything else: an answer or one error, never a traceback -------------------------------------------------------

SOURCES = (V1, V2, AWQ_FILE, STATIC, "llmcompressor-mixed")
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats(allow_nan=False)
    | st.sampled_from(["gptq", "re:(", ""]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["+:.*", "bits", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def paths_in(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = (
        [path for key, item in value.items() for path in paths_in(item, (*prefix, key))]
        if isinstance(value, dict)
        else []
    )
    return [prefix, *inner]


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_anywhere_in_a_configuration(data: st.DataObject) -> None:
    folder = FIXTURES / data.draw(st.sampled_from(SOURCES))
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    *parents, last = data.draw(st.sampled_from(paths_in(section)[1:]))
    target = section
    for key in parents:
        target = target[key]
    target[last] = data.draw(ANY_JSON)
    with contextlib.suppress(ValueError):
        parse_section(section)


@settings(max_examples=80)
@given(data=st.data())
def test_any_tensor_in_the_place_of_another(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SOURCES))
    tensors = load_file(FIXTURES / name / "model.safetensors")
    key = data.draw(st.sampled_from([key for key in tensors if key.startswith(DOWN_PROJ)]))
    shape = data.draw(
        st.lists(st.sampled_from([0, 1, 3, 8, 12, 64, 96]), max_size=3) | st.just(list(tensors[key].shape))
    )
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.int8, torch.float16, torch.float32, torch.bool]))
    tensors[key] = torch.full(shape, data.draw(st.sampled_from([0, 1, -1]))).to(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(FIXTURES / name / "config.json", folder / "config.json")
        save_file(tensors, folder / "model.safetensors")
        with contextlib.suppress(ValueError):
            checkpoint = read_checkpoint(folder)
            for layer in checkpoint.linears:
                checkpoint.stored_weight(layer)


# --- habits of old writers ------------------------------------------------------------------------------------------


def test_a_configuration_in_a_file_of_its_own_is_read(damaged: Callable[[str], Path]) -> None:
    """AutoGPTQ's first checkpoints say nothing in config.json."""
    folder = damaged(V1)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, lambda config: config.pop("quantization_config"))
    for field in ("quant_method", "checkpoint_format", "format"):
        section.pop(field)
    (folder / "quantize_config.json").write_text(json.dumps(section))
    ours, theirs = read_checkpoint(folder), read_checkpoint(FIXTURES / V1)
    assert ours.linears == theirs.linears and ours.format == theirs.format
    model, _ = hf.load(folder, device="cpu")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 7


def test_a_bias_of_zeros_is_dropped_where_the_layer_has_none(damaged: Callable[[str], Path], tmp_path: Path) -> None:
    """AutoGPTQ wrote one for every layer. One that is not zero belongs to another model."""
    folder = damaged(V1)
    edit_tensors(folder, lambda tensors: tensors.update({f"{DOWN_PROJ}.bias": torch.zeros(64).half()}))
    expected, _ = hf.load(FIXTURES / V1, device="cpu")
    for source in (folder, Path(convert(folder, tmp_path / "ct", "compressed-tensors", verbose=False).out)):
        model, _ = hf.load(source, device="cpu")
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    edit_tensors(folder, lambda tensors: tensors.update({f"{DOWN_PROJ}.bias": torch.ones(64).half()}))
    with pytest.raises(ValueError, match=r"no place for: .*down_proj\.bias"):
        hf.load(folder, device="cpu")


def test_a_file_of_twos_complement_words_is_read_as_such(tmp_path: Path) -> None:
    """The sign bit of a word belongs to its last code."""
    codes = torch.full((8, 32), 15, dtype=torch.uint8)
    assert bool((pack_codes(codes, 4) == -1).all())
    stored = StoredWeight(QuantizedWeight(codes, torch.ones(8, 1).half(), None, QuantSpec(4, 32, True)))
    save_file(gptq_tensors("m", stored, 2), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**GPTQ, "checkpoint_format": "gptq_v2"}}))
    assert torch.equal(read_checkpoint(tmp_path).quantized_weight("m").codes, codes)

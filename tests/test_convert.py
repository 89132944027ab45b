"""lowbit.convert: every pair of formats, bit for bit where the target can hold it, refused by name where it cannot."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit import hf
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    StoredWeight,
    linear_tensors,
    quantization_config,
    read_checkpoint,
)
from lowbit.convert import TARGETS, convert
from lowbit.formats.base import PackedLinear, order_from_groups
from lowbit.formats.gptq import gptq_config, gptq_tensors
from lowbit.inspection import inspect_checkpoint
from lowbit.spec import ActivationSpec, QuantSpec
from packed_folder import BOOKS_4M, names_in, pack_folder, random_layer, write_tiny

FIXTURES = Path(__file__).parent / "fixtures"
PACKED = tuple(target for target in TARGETS if target != "dense")
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) * 7 % 32


def weights_of(folder: Path) -> dict[str, StoredWeight]:
    checkpoint = read_checkpoint(folder)
    return {name: checkpoint.stored_weight(name) for name in checkpoint.linears}


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


def same(a: Mapping[str, StoredWeight], b: Mapping[str, StoredWeight]) -> bool:
    """Codes, scales, zero points, column orders and scales of activations, values and dtypes.

    AWQ's explicit zero points of a symmetric grid count as the zero points the grid has.
    """
    assert a.keys() == b.keys()
    for name in a:
        left, right = a[name].weight, b[name].weight
        zeros = [left.zeros, right.zeros]
        if left.spec.symmetric != right.spec.symmetric:
            zeros = [torch.full_like(left.codes[:, : left.scales.shape[1]], 8) if z is None else z for z in zeros]
        pairs = [(left.codes, right.codes), (left.scales, right.scales), zeros, (a[name].order, b[name].order)]
        pairs.append((a[name].input_scale, b[name].input_scale))
        if not all(equal(x, y) for x, y in pairs) or left.spec.group_size != right.spec.group_size:
            return False
        if left.spec.activations != right.spec.activations:
            return False
    return True


def can_hold(to: str, stored: Mapping[str, StoredWeight]) -> bool:
    """The table of the README, written down again."""
    for weight, order in ((s.weight, s.order) for s in stored.values()):
        (n, k), bits = weight.codes.shape, weight.spec.bits
        whole_words = n % (32 // bits) == 0 and k % (32 // bits) == 0
        zero = weight.zeros is not None and bool((weight.zeros == 0).any())
        holds = {
            "compressed-tensors": order is None,
            "gptq": whole_words and not zero,
            "gptq-v2": whole_words,
            "awq": bits == 4 and order is None and n % 8 == 0,
        }
        if weight.spec.activations is not None:
            holds |= {"gptq": False, "gptq-v2": False, "awq": False}
        if not holds[to]:
            return False
    return to != "awq" or len({s.weight.spec.group_size for s in stored.values()}) == 1


# --- all pairs ------------------------------------------------------------------------------------------------------


def int8_layer(dynamic: bool, seed: int) -> StoredWeight:
    """One of an ``int-quantized`` file."""
    g = torch.Generator().manual_seed(seed)
    spec = QuantSpec(8, -1, True, ActivationSpec(8, dynamic=dynamic))
    codes = torch.randint(0, 256, (16, 64), generator=g).to(torch.uint8)
    qw = QuantizedWeight(codes, torch.rand(16, 1, generator=g) + 0.1, None, spec)
    return StoredWeight(qw, None, None if dynamic else torch.rand(1, generator=g) + 0.1)


@st.composite
def models(draw: st.DrawFn) -> dict[str, StoredWeight]:
    """Up to three layers; what no format but one can hold is drawn too, int8 activations among it."""
    layers = {}
    int8 = draw(st.integers(0, 3)) == 0
    for i in range(draw(st.integers(1, 3))):
        if int8 and draw(st.booleans()):
            layers[f"layers.{i}.up"] = int8_layer(draw(st.booleans()), draw(st.integers(0, 2**31)))
            continue
        spec = QuantSpec(
            draw(st.sampled_from([4, 4, 4, 2, 8])), draw(st.sampled_from([32, 32, 64, -1])), draw(st.booleans())
        )
        n = draw(st.sampled_from([16, 32, 48, 8, 5]))
        size = 64 if spec.group_size == -1 else spec.group_size
        k = size * draw(st.integers(1, 3))
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        count = spec.num_groups(k)
        zeros = torch.randint(draw(st.integers(0, 1)), 2**spec.bits, (n, count), generator=g).to(torch.uint8)
        scales = (torch.rand(n, count, generator=g) + 0.1).to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
        codes = torch.randint(0, 2**spec.bits, (n, k), generator=g).to(torch.uint8)
        order = None
        if not int8 and draw(st.integers(0, 3)) == 0 and count > 1 and n % 16 == 0:
            shuffled = torch.randperm(k, generator=g)
            order = order_from_groups("g_idx", torch.arange(k)[shuffled] // size, count)
        qw = QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec)
        layers[f"layers.{i}.up"] = StoredWeight(qw, order)
    return layers


def write_source(folder: Path, stored: Mapping[str, StoredWeight]) -> Path:
    """As compressed-tensors, or where a layer is reordered as GPTQ version 2."""
    specs = {name: s.weight.spec for name, s in stored.items()}
    reordered = any(s.order is not None for s in stored.values())
    linears = {
        name: PackedLinear(
            name, tuple(s.weight.codes.shape), specs[name], s.weight.scales.dtype, 0, s.order is not None
        )
        for name, s in stored.items()
    }
    with CheckpointWriter(folder) as writer:
        for name, s in stored.items():
            tensors = gptq_tensors(name, s, 2) if reordered else linear_tensors(name, s.weight, s.input_scale)
            for key, tensor in tensors.items():
                writer.add(key, tensor)
        writer.add("layers.0.norm.weight", torch.ones(5))
        writer.add("layers.0.gate.weight", torch.ones(5, 5))
        section = (
            gptq_config(linears, ["layers.0.gate"], 2) if reordered else quantization_config(specs, ["layers.0.gate"])
        )
        writer.add_json("config.json", {"model_type": "tiny", "dtype": "float16", "quantization_config": section})
        return writer.finish({"model": "tiny"})


@settings(max_examples=25)
@given(stored=models())
def test_every_pair_of_formats_keeps_codes_scales_and_zeros(stored: dict[str, StoredWeight]) -> None:
    if any(s.order is not None for s in stored.values()) and not can_hold("gptq-v2", stored):
        return  # no format holds all of it
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = write_source(root / "source", stored)
        assert same(weights_of(source), stored)
        held = {}
        for to in PACKED:
            if can_hold(to, stored):
                report = convert(source, root / to, to, verbose=False)
                assert report.scale_error == 0
                assert same(weights_of(root / to), stored), to
                held[to] = root / to
            else:
                with pytest.raises(ValueError, match=r"hold|awq"):
                    convert(source, root / to, to, verbose=False)
                assert not (root / to).exists()
        for first, second in itertools.product(held, held):
            out = root / f"{first} to {second}"
            convert(held[first], out, second, verbose=False)
            assert same(weights_of(out), stored), (first, second)
            if "awq" not in (first, second):  # which forgets that a grid was symmetric
                assert (
                    load_file(out / "model.safetensors").keys() == load_file(held[second] / "model.safetensors").keys()
                )
                for key, tensor in load_file(held[second] / "model.safetensors").items():
                    assert equal(load_file(out / "model.safetensors")[key], tensor), key
        dense = load_file(
            Path(convert(source, root / "dense", "dense", dtype="float32", verbose=False).out) / "model.safetensors"
        )
        for name, s in stored.items():
            weight = dense[f"{name}.weight"] if s.order is None else dense[f"{name}.weight"][:, s.order]
            assert torch.equal(weight, dequantize(s.weight))
        assert names_in(root) == sorted(["source", "dense", *held, *(f"{a} to {b}" for a in held for b in held)])


UNREADABLE = ("autoround-gptq-w4g32-underflow", "llmcompressor-w8a8-static-asym")  # see test_formats.py


@pytest.mark.parametrize(
    "name", [p.name for p in sorted(FIXTURES.iterdir()) if p.is_dir() and p.name not in UNREADABLE]
)
def test_a_peers_file_comes_back_from_its_own_format_unchanged(name: str, tmp_path: Path) -> None:
    source = FIXTURES / name
    label = read_checkpoint(source).format.label
    convert(source, tmp_path / "again", label, verbose=False)
    ours, theirs = load_file(tmp_path / "again" / "model.safetensors"), load_file(source / "model.safetensors")
    if name.startswith("autoround-native"):  # which leaves out the g_idx of columns in order
        for key in ours.keys() - theirs.keys():
            assert key.endswith(".g_idx") and torch.equal(ours[key], torch.arange(len(ours[key])).int() // 32)
        ours = {key: tensor for key, tensor in ours.items() if key in theirs}
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not equal(ours[key], theirs[key])] == []


def loaded_logits(folder: Path, dtype: str = "float32") -> Tensor:
    model, _ = hf.load(folder, device="cpu", dtype=dtype)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize(
    "name", ["gptqmodel-v2-w4g32-asym-actorder", "gptqmodel-v1-w2g32-mixed", "llmcompressor-mixed"]
)
def test_a_converted_model_computes_the_same(name: str, tmp_path: Path) -> None:
    expected = loaded_logits(FIXTURES / name)
    stored = weights_of(FIXTURES / name)
    for to in PACKED:
        if can_hold(to, stored):
            convert(FIXTURES / name, tmp_path / to, to, verbose=False)
            assert torch.equal(loaded_logits(tmp_path / to), expected), to


# --- what others make of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptqmodel-v1-w4g32-sym", "gptqmodel-v1-w2g32-mixed", "autoround-gptq-w4g32-sym"])
def test_plain_transformers_opens_compressed_tensors(name: str, tmp_path: Path) -> None:
    """Symmetric ones: transformers 5.23 fails to load any asymmetric compressed-tensors folder."""
    convert(FIXTURES / name, tmp_path / "out", "compressed-tensors", verbose=False)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = theirs(TOKENS).logits
    expected = loaded_logits(FIXTURES / name)
    assert (logits - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("name", ["gptqmodel-v2-w4g32-asym-actorder", "gptqmodel-awq-w4g32", "llmcompressor-mixed"])
def test_plain_transformers_opens_dense(name: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "out", "dense", dtype="float32", verbose=False)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(TOKENS).logits
    expected = loaded_logits(FIXTURES / name)
    assert (logits - expected).norm() <= 1e-3 * expected.norm()
    weight = theirs.model.layers[0].mlp.down_proj.weight
    reference = load_file(FIXTURES / name / "reference.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(weight.to(reference.dtype), reference)


PEER = os.environ.get("PEER_PYTHON", "")


@pytest.mark.skipif(not PEER, reason="PEER_PYTHON names no Python with GPTQModel (scripts/make_fixtures makes one)")
@pytest.mark.parametrize(
    ("name", "to", "linear"),
    [
        ("llmcompressor-w4g32-sym-gptq", "gptq", "TorchLinear"),
        ("llmcompressor-w8ch-sym", "gptq", "TorchLinear"),
        ("autoround-ct-w4g32-sym", "gptq", "TorchLinear"),
        ("llmcompressor-w4g32-asym", "gptq-v2", "TorchLinear"),
        ("llmcompressor-mixed", "gptq-v2", "TorchLinear"),
        ("gptqmodel-v2-w4g32-asym-actorder", "gptq-v2", "TorchLinear"),
        ("llmcompressor-w4g32-asym", "awq", "AwqTorchLinear"),
        ("llmcompressor-w4g32-sym-gptq", "awq", "AwqTorchLinear"),
    ],
)
def test_gptqmodel_opens_gptq_and_awq(name: str, to: str, linear: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "out", to, verbose=False)
    expected = loaded_logits(tmp_path / "out")
    script = Path(__file__).parent.parent / "scripts" / "make_fixtures.py"
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [PEER, str(script), "--open", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert linear in found["kinds"]
    theirs = torch.tensor(found["logits"])
    assert (theirs - expected).norm() <= 4e-3 * expected.norm()  # theirs are computed in float16


def test_compressed_tensors_own_converter_agrees(tmp_path: Path) -> None:
    """Its AutoAWQConverter turns AWQ tensors into pack-quantized ones."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert")
    source = load_file(FIXTURES / "gptqmodel-awq-w4g32" / "model.safetensors")
    theirs = converters.AutoAWQConverter.from_pretrained(FIXTURES / "gptqmodel-awq-w4g32").process(dict(source))
    convert(FIXTURES / "gptqmodel-awq-w4g32", tmp_path / "out", "compressed-tensors", verbose=False)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor.long() if "packed" in key else tensor, theirs[key].to(tensor.dtype)
                           .long() if "packed" in key else theirs[key].to(tensor.dtype)), key  # fmt: skip


# --- the folder around the tensors ----------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return pack_folder(
        BOOKS_4M, tmp_path / "books", lambda name: None if name == "lm_head" else QuantSpec(4, 64, False)
    )


def test_a_whole_model_there_and_back(books: Path, tmp_path: Path) -> None:
    report = lowbit.convert(books, tmp_path / "v2", "gptq-v2", verbose=False)
    assert (report.read, report.written, report.layers, report.scale_error) == (
        "compressed-tensors",
        "gptq-v2",
        28,
        0.0,
    )
    assert "codes, scales and zero points as they were" in str(report)
    lowbit.convert(tmp_path / "v2", tmp_path / "back", "compressed-tensors", verbose=False)
    ours, source = load_file(tmp_path / "back" / "model.safetensors"), load_file(books / "model.safetensors")
    assert ours.keys() == source.keys()
    assert all(equal(ours[key], source[key]) for key in source)
    extra = {"quantize_config.json"}
    assert set(names_in(tmp_path / "v2")) == set(names_in(books)) | extra
    assert set(names_in(tmp_path / "back")) == set(names_in(books))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (books / name).read_bytes()
    record = read_checkpoint(tmp_path / "back").record
    assert record is not None and record["method"] == "rtn" and record["conversion"]["from"] == "gptq-v2"
    config = json.loads((tmp_path / "v2" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "v2" / "quantize_config.json").read_text())
    found = inspect_checkpoint(tmp_path / "v2")
    assert found.packed and found.hashes_verified and len(found.layers) == 28
    model, tokenizer = hf.load(tmp_path / "v2", device="cpu")
    assert tokenizer is not None and model.generation_config.eos_token_id == model.config.eos_token_id


def test_the_dense_model_has_the_dtype_of_the_configuration(books: Path, tmp_path: Path) -> None:
    convert(books, tmp_path / "dense", "dense", verbose=False)
    checkpoint: Checkpoint = read_checkpoint(books)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name in checkpoint.linears:
        assert torch.equal(tensors[f"{name}.weight"], dequantize(checkpoint.quantized_weight(name)).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not inspect_checkpoint(tmp_path / "dense").packed


@pytest.mark.parametrize("name", ["llmcompressor-w8a8-dynamic", "llmcompressor-w8a8-static"])
def test_dense_of_quantized_activations_says_what_is_lost(name: str, tmp_path: Path) -> None:
    report = convert(FIXTURES / name, tmp_path / "dense", "dense", verbose=False)
    assert "activations are no longer quantized" in str(report)
    weight = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    reference = load_file(FIXTURES / name / "reference.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(weight, reference)


def test_a_dtype_rounds_scales_and_says_so(books: Path, tmp_path: Path) -> None:
    exact = convert(books, tmp_path / "a", "awq", dtype="float16", verbose=False)
    assert exact.scale_error == 0.0  # bfloat16's 8 bits of precision fit into float16's 11
    assert {t.dtype for t in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.int32, torch.float16}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float16"
    lossy = convert(
        FIXTURES / "gptqmodel-v1-w4g32-sym", tmp_path / "b", "compressed-tensors", dtype="bfloat16", verbose=False
    )
    assert 0 < lossy.scale_error <= 2**-8
    assert "scales changed by at most" in str(lossy)


def test_float32_scales_go_to_16_bits_only_exactly_or_when_asked(tmp_path: Path) -> None:
    qw = random_layer(16, 64, QuantSpec(4, 32, False))
    third = QuantizedWeight(qw.codes, torch.full_like(qw.scales, 1 / 3, dtype=torch.float32), qw.zeros, qw.spec)
    half = QuantizedWeight(qw.codes, torch.full_like(third.scales, 0.5), qw.zeros, qw.spec)
    huge = QuantizedWeight(qw.codes, torch.full_like(third.scales, 1e30), qw.zeros, qw.spec)
    folders = {
        name: write_tiny(tmp_path / name, {"m": w}) for name, w in {"third": third, "half": half, "huge": huge}.items()
    }
    assert convert(folders["half"], tmp_path / "exact", "awq", verbose=False).scale_error == 0
    assert read_checkpoint(tmp_path / "exact").linears["m"].scale_dtype == torch.float16
    assert read_checkpoint(tmp_path / "exact").dense["norm.weight"].dtype == torch.float32
    for to in ("awq", "gptq-v2"):
        with pytest.raises(ValueError, match="m: its scales are float32 and do not fit"):
            convert(folders["third"], tmp_path / "no", to, verbose=False)
    rounded = convert(folders["third"], tmp_path / "rounded", "awq", dtype="float16", verbose=False)
    assert 0 < rounded.scale_error < 2**-11
    with pytest.raises(ValueError, match="m: its scales are out of the range of float16"):
        convert(folders["huge"], tmp_path / "no", "compressed-tensors", dtype="float16", verbose=False)
    assert not (tmp_path / "no").exists()

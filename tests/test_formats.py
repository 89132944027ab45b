"""Foreign checkpoints, read: against the tools that wrote them, against the formats' definitions, and damaged ones.

tests/fixtures holds one-layer models that GPTQModel, AutoRound and llm-compressor quantized (scripts/make_fixtures),
each with the peer's own dense weights and logits in reference.safetensors.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lowbit import hf
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.checkpoint import Checkpoint, read_checkpoint
from lowbit.foreign_config import (
    AwqConfig,
    GptqConfig,
    parse_auto_round_config,
    parse_awq_config,
    parse_gptq_config,
)
from lowbit.formats.awq import AwqFormat, awq_tensors
from lowbit.formats.base import LayerTensors, PackedLinear, StoredWeight, order_from_groups, read_weight
from lowbit.formats.gptq import GptqFormat, gptq_config, gptq_tensors
from lowbit.formats.reordered import ReorderedLinear
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.spec import QuantSpec
from packed_folder import edit_config, random_layer

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) * 7 % 32  # as in scripts/make_fixtures.py
# name -> quant_method's label, specs of k_proj and down_proj, largest relative error of the logits.
# The peers' logits are float16 (GPTQModel) or float32 sums of exact weights (llm-compressor); AutoRound leaves none.
# compressed-tensors takes a token's scale to be absmax / 127.5, the int8 kernels of vLLM and lowbit absmax / 127: the
# scales of dynamic activations are no part of a file, and the two round differently. Static scales are, and agree.
HALF, SINGLE, STATIC_INT8, DYNAMIC_INT8 = 4e-3, 1e-5, 2e-3, 5e-2
READ: dict[str, tuple[str, str, str, float | None]] = {
    "gptqmodel-v1-w4g32-sym": ("gptq", "w4g32sym", "w4g32sym", HALF),
    "gptqmodel-v1-w4g32-actorder": ("gptq", "w4g32sym", "w4g32sym", HALF),
    "gptqmodel-v1-w8ch-sym": ("gptq", "w8gchsym", "w8gchsym", HALF),
    "gptqmodel-v1-w2g32-mixed": ("gptq", "dense", "w8g32sym", HALF),
    "gptqmodel-v2-w4g32-asym": ("gptq-v2", "w4g32asym", "w4g32asym", HALF),
    "gptqmodel-v2-w4g32-asym-actorder": ("gptq-v2", "w4g32asym", "w4g32asym", HALF),
    "gptqmodel-v2-w8g32-asym": ("gptq-v2", "w8g32asym", "w8g32asym", HALF),
    "gptqmodel-awq-w4g32": ("awq", "w4g32asym", "w4g32asym", HALF),
    "autoround-awq-w4g32-asym": ("awq", "w4g32asym", "w4g32asym", None),
    "autoround-gptq-w4g32-sym": ("gptq", "w4g32sym", "w4g32sym", None),
    "autoround-gptq-w4g32-asym": ("gptq", "w4g32asym", "w4g32asym", None),
    "autoround-native-w4g32-sym": ("gptq", "w4g32sym", "w4g32sym", None),
    "autoround-native-mixed": ("gptq", "w8g32sym", "w4g32sym", None),
    "autoround-ct-w4g32-sym": ("compressed-tensors", "w4g32sym", "w4g32sym", None),
    "llmcompressor-w4g32-sym-gptq": ("compressed-tensors", "w4g32sym", "w4g32sym", SINGLE),
    "llmcompressor-w4g32-asym": ("compressed-tensors", "w4g32asym", "w4g32asym", SINGLE),
    "llmcompressor-w8ch-sym": ("compressed-tensors", "w8gchsym", "w8gchsym", SINGLE),
    "llmcompressor-w4g32-actorder": ("compressed-tensors", "w4g32sym", "w4g32sym", SINGLE),
    "llmcompressor-mixed": ("compressed-tensors", "w8gchsym", "w4g32sym", SINGLE),
    "llmcompressor-w8a8-dynamic": ("compressed-tensors", "w8a8gchsym", "w8a8gchsym", DYNAMIC_INT8),
    "llmcompressor-w8a8-static": ("compressed-tensors", "w8a8staticgchsym", "w8a8staticgchsym", STATIC_INT8),
}
W8A8 = [name for name in READ if "w8a8" in name]
K_PROJ, DOWN_PROJ = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
ACT_ORDER = [name for name in READ if name.startswith("gptqmodel") and "actorder" in name]


def dense_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """``(N, K)`` float32, columns in the layer's order."""
    stored = checkpoint.stored_weight(name)
    weight = dequantize(stored.weight)
    return weight if stored.order is None else torch.zeros_like(weight).index_copy_(1, stored.order, weight)


def rounded_inputs(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """x on the int8 grid: of its own scale per row, or of the stored one for all."""
    scale = x.double().abs().amax(1, keepdim=True) / 127 if input_scale is None else input_scale.double()
    return (x.double() / scale).round().clamp(-128, 127) * scale


# --- files of the peers ---------------------------------------------------------------------------------------------


def test_every_fixture_is_tested() -> None:
    others = {"versions.json", "autoround-gptq-w4g32-underflow", "llmcompressor-w8a8-static-asym"}
    assert {path.name for path in FIXTURES.iterdir()} == READ.keys() | others


@pytest.mark.parametrize("name", READ)
def test_a_layer_is_what_the_peer_makes_of_it(name: str) -> None:
    """Bit for bit in the dtype the peer computes in."""
    label, *specs, _ = READ[name]
    checkpoint, reference = read_checkpoint(FIXTURES / name), load_file(FIXTURES / name / "reference.safetensors")
    assert checkpoint.format.label == label
    for layer, spec in zip((K_PROJ, DOWN_PROJ), specs, strict=True):
        if spec == "dense":
            assert layer not in checkpoint.linears
            continue
        linear, theirs = checkpoint.linears[layer], reference[f"{layer}.weight"]
        assert linear.spec.label() == spec
        assert linear.reordered == (name in ACT_ORDER)
        assert torch.equal(dense_weight(checkpoint, layer).to(theirs.dtype), theirs)


@pytest.mark.parametrize("name", READ)
def test_a_model_is_loaded_packed_and_computes_what_the_peer_computes(name: str) -> None:
    checkpoint, tolerance = read_checkpoint(FIXTURES / name), READ[name][-1]
    model, _ = hf.load(FIXTURES / name, device="cpu", dtype="float32")
    kind = Int8Linear if name in W8A8 else ReorderedLinear if name in ACT_ORDER else QuantLinear
    packed = {key: module for key, module in model.named_modules() if type(module) is kind}
    assert packed.keys() == checkpoint.linears.keys()
    with torch.no_grad():
        logits = model(TOKENS).logits
        for key, module in packed.items():
            assert torch.equal(module.dequantize(), dense_weight(checkpoint, key))
            x = torch.randn(3, module.in_features)
            inputs = rounded_inputs(x, checkpoint.stored_weight(key).input_scale) if name in W8A8 else x.double()
            expected = inputs @ dense_weight(checkpoint, key).double().T
            assert (module(x) - expected).norm() <= 1e-3 * expected.norm()
    if tolerance is not None:
        theirs = load_file(FIXTURES / name / "reference.safetensors")["logits"].float()
        assert (logits - theirs).norm() <= tolerance * theirs.norm()
    assert model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


@pytest.mark.parametrize("name", ["gptqmodel-v2-w4g32-asym", "autoround-awq-w4g32-asym"])
def test_save_pretrained_writes_compressed_tensors(name: str, tmp_path: Path) -> None:
    model, _ = hf.load(FIXTURES / name, device="cpu")
    model.save_pretrained(tmp_path)
    saved, source = read_checkpoint(tmp_path), read_checkpoint(FIXTURES / name)
    assert saved.format.label == "compressed-tensors"
    for layer in source.linears:
        ours, theirs = saved.quantized_weight(layer), source.quantized_weight(layer)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)
        assert ours.zeros is not None and theirs.zeros is not None and torch.equal(ours.zeros, theirs.zeros)
    again, _ = hf.load(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", W8A8)
def test_save_pretrained_writes_an_int_quantized_folder_back(name: str, tmp_path: Path) -> None:
    model, _ = hf.load(FIXTURES / name, device="cpu")
    model.save_pretrained(tmp_path)
    saved, source = load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / name / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(saved[key].dtype == source[key].dtype and torch.equal(saved[key], source[key]) for key in source)
    assert read_checkpoint(tmp_path).linears == read_checkpoint(FIXTURES / name).linears


def test_save_pretrained_refuses_reordered_layers(tmp_path: Path) -> None:
    model, _ = hf.load(FIXTURES / ACT_ORDER[0], device="cpu")
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained(tmp_path / "out")


def test_the_scale_of_static_activations_is_read() -> None:
    name = "llmcompressor-w8a8-static"
    stored = read_checkpoint(FIXTURES / name).stored_weight(DOWN_PROJ)
    assert stored.input_scale is not None
    assert torch.equal(stored.input_scale, load_file(FIXTURES / name / "model.safetensors")[f"{DOWN_PROJ}.input_scale"])
    assert read_checkpoint(FIXTURES / "llmcompressor-w8a8-dynamic").stored_weight(DOWN_PROJ).input_scale is None


# --- the formats by their definitions, in numpy ---------------------------------------------------------------------


def numpy_gptq(codes: Any, zeros: Any, bits: int, version: int) -> tuple[Any, Any]:
    """qweight and qzeros: code k of a column at bit ``bits * (k % per)`` of word ``k // per``; zeros along N."""
    n, k = codes.shape
    per = 32 // bits
    qweight = np.zeros((k // per, n), np.uint64)
    for row in range(k):
        qweight[row // per] |= codes[:, row].astype(np.uint64) << np.uint64(bits * (row % per))
    groups = zeros.shape[1]
    qzeros = np.zeros((groups, n // per), np.uint64)
    for column in range(n):
        stored = zeros[column].astype(np.int64) - (version == 1)
        qzeros[:, column // per] |= stored.astype(np.uint64) << np.uint64(bits * (column % per))
    return qweight.astype(np.uint32).view(np.int32), qzeros.astype(np.uint32).view(np.int32)


def numpy_awq(matrix: Any) -> Any:
    """(R, C) -> (R, C/8): nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    rows, columns = matrix.shape
    words = np.zeros((rows, columns // 8), np.uint64)
    for word in range(columns // 8):
        for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= matrix[:, 8 * word + column].astype(np.uint64) << np.uint64(4 * i)
    return words.astype(np.uint32).view(np.int32)


def as_layer(name: str, tensors: dict[str, Tensor]) -> LayerTensors:
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
    return LayerTensors(name, parts, parts.__getitem__)


def random_stored(spec: QuantSpec, n: int, groups: int, reorder: bool, seed: int) -> StoredWeight:
    """Codes, zeros (from 1, so that every version holds them) and scales at random."""
    g = torch.Generator().manual_seed(seed)
    k = groups * (32 if spec.group_size == -1 else spec.group_size)
    count = spec.num_groups(k)
    codes = torch.randint(0, 2**spec.bits, (n, k), generator=g).to(torch.uint8)
    zeros = torch.randint(1, 2**spec.bits, (n, count), generator=g).to(torch.uint8)
    scales = (torch.rand(n, count, generator=g) + 0.1).half() * (1 - 2 * torch.randint(0, 2, (n, count), generator=g))
    qw = QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec)
    if not reorder or count == 1:
        return StoredWeight(qw)
    shuffled = torch.randperm(k, generator=g)
    order = order_from_groups("g_idx", torch.arange(k)[shuffled] // spec.group_size, count)
    return StoredWeight(qw, order)


def same(a: StoredWeight, b: StoredWeight) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        return x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))

    left, right = a.weight, b.weight
    pairs = [(left.codes, right.codes), (left.scales, right.scales), (left.zeros, right.zeros), (a.order, b.order)]
    return left.spec == right.spec and all(equal(x, y) for x, y in pairs)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
    version=st.sampled_from([1, 2]),
    words=st.integers(1, 3),
    groups=st.integers(1, 3),
    reorder=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_gptq_by_its_definition(
    bits: int, group: int, symmetric: bool, version: int, words: int, groups: int, reorder: bool, seed: int
) -> None:
    spec = QuantSpec(bits, group, symmetric)
    stored = random_stored(spec, words * 32 // bits, groups, reorder, seed)
    qw, (n, k) = stored.weight, stored.weight.codes.shape
    tensors = gptq_tensors("m", stored, version)
    # by definition W[n, k] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]
    zeros = np.full(qw.scales.shape, spec.mid_code) if qw.zeros is None else qw.zeros.numpy()
    columns = np.arange(k) if stored.order is None else np.argsort(stored.order.numpy())
    qweight, qzeros = numpy_gptq(qw.codes.numpy()[:, columns], zeros, bits, version)
    assert np.array_equal(tensors["m.qweight"].numpy(), qweight)
    assert np.array_equal(tensors["m.qzeros"].numpy(), qzeros)
    g_idx = tensors["m.g_idx"].long()
    assert g_idx.dtype == torch.int64 and g_idx.shape == (k,)
    weight = dequantize(qw)
    weight = weight if stored.order is None else weight[:, torch.from_numpy(columns)]
    centered = qw.codes[:, torch.from_numpy(columns)].float() - torch.from_numpy(zeros).float()[:, g_idx]
    assert torch.equal(weight, centered * qw.scales.float()[:, g_idx])
    # and back
    linear = PackedLinear("m", (n, k), spec, torch.float16, 0, stored.order is not None)
    form = GptqFormat(parse_gptq_config(json.loads(json.dumps(gptq_config({"m": linear}, [], version)))))
    layer = as_layer("m", tensors)
    assert (form.config.version, form.check(layer).reordered) == (version, stored.order is not None)
    assert same(read_weight(form, layer, form.check(layer)), stored)


@settings(max_examples=30)
@given(
    group=st.sampled_from([32, 64, -1]), words=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 2**31)
)
def test_awq_by_its_definition(group: int, words: int, groups: int, seed: int) -> None:
    spec = QuantSpec(4, group, False)
    stored = random_stored(spec, words * 8, groups, False, seed)
    assert stored.weight.zeros is not None
    tensors = awq_tensors("m", stored)
    assert np.array_equal(tensors["m.qweight"].numpy(), numpy_awq(stored.weight.codes.numpy().T))
    assert np.array_equal(tensors["m.qzeros"].numpy(), numpy_awq(stored.weight.zeros.numpy().T))
    form = AwqFormat(parse_awq_config({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}))
    layer = as_layer("m", tensors)
    assert same(read_weight(form, layer, form.check(layer)), stored)


def test_awq_rows_that_do_not_fill_a_word() -> None:
    qw = random_layer(16, 13, QuantSpec(4, -1, False))
    form, layer = AwqFormat(AwqConfig(qw.spec)), as_layer("m", awq_tensors("m", StoredWeight(qw)))
    assert same(read_weight(form, layer, form.check(layer)), StoredWeight(qw))


def test_old_names_of_awq_fields_are_read() -> None:
    form = parse_awq_config({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"})
    assert form.spec == QuantSpec(4, 64, False)


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


@pytest.mark.parametrize(
    ("packing", "same_as", "label"),
    [
        ("auto_round:auto_gptq", "autoround-gptq-w4g32-asym", "gptq"),
        ("auto_round", "gptqmodel-v2-w4g32-asym", "gptq-v2"),
        ("auto_round:auto_awq", "autoround-awq-w4g32-asym", "awq"),
    ],
)
def test_auto_rounds_own_method_is_another_name_for_the_packing(
    packing: str, same_as: str, label: str, tmp_path: Path
) -> None:
    """Its files have the tensors of GPTQ, versions 1 and 2, and of AWQ."""
    folder = shutil.copytree(FIXTURES / same_as, tmp_path / "m")
    edit_config(folder, lambda config: config.update(quantization_config={**AUTO_ROUND, "packing_format": packing}))
    (folder / "quantize_config.json").unlink(missing_ok=True)
    ours, theirs = read_checkpoint(folder), read_checkpoint(FIXTURES / same_as)
    assert ours.format.label == theirs.format.label == label
    assert all(same(ours.stored_weight(name), theirs.stored_weight(name)) for name in theirs.linears)


def test_auto_rounds_settings_of_single_layers() -> None:
    extra = {"a.b": {"bits": 16}, "c": {"bits": 8, "group_size": 64}, "c.*(q|k)": {"bits": 2}}
    form = parse_auto_round_config({**AUTO_ROUND, "extra_config": extra})
    assert isinstance(form, GptqConfig) and form.version == 1
    assert form.settings_for("c").spec == QuantSpec(8, 64, False)
    assert form.settings_for("x.c.q").spec == QuantSpec(2, 32, False)
    assert form.settings_for("a.bc").spec == form.settings_for("other").spec == QuantSpec(4, 32, False)
    with pytest.raises(ValueError, match="leaves it out"):
        form.settings_for("a.b")
    awq = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "extra_config": {"a.b": {"bits": 16}}}
    assert parse_auto_round_config(awq) == AwqConfig(QuantSpec(4, 32, False), ("a.b",))


def test_gptq_dynamic_rules_apply_in_order_and_from_the_start_of_a_name() -> None:
    form = parse_gptq_config(
        {"bits": 4, "group_size": 32, "dynamic": {r"-:.*\.gate$": {}, r"+:a\.b": {"bits": 8}, "a": {"sym": False}}}
    )
    assert form.settings_for("a.b").spec == QuantSpec(8, 32, True)
    assert form.settings_for("a.c").spec == QuantSpec(4, 32, False)
    assert form.settings_for("x.a.b").spec == QuantSpec(4, 32, True)
    with pytest.raises(ValueError, match="leaves it out"):
        form.settings_for("mlp.gate")


# --- act-order ------------------------------------------------------------------------------------------------------
@given(groups=st.integers(1, 6), size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_the_order_sorts_columns_by_group_and_keeps_their_own(groups: int, size: int, seed: int) -> None:
    g_idx = (torch.arange(groups * size) // size)[torch.randperm(groups * size, generator=torch.manual_seed(seed))]
    order = order_from_groups("g_idx", g_idx, groups)
    if order is None:
        assert torch.equal(g_idx, g_idx.sort().values)
        return
    assert torch.equal(g_idx[order], torch.arange(groups * size) // size)
    for group in range(groups):
        inside = order[group * size : (group + 1) * size]
        assert torch.equal(inside, inside.sort().values)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        ([0, 0, 2, 1], r"must be in \[0, 1\], got 2 at column 2"),
        ([0, -1, 1, 1], r"must be in \[0, 1\], got -1 at column 1"),
        ([0, 0, 0, 1], "every group 2 columns, but group 0 has 3"),
    ],
)
def test_a_g_idx_that_is_no_regular_grouping(g_idx: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order_from_groups("m.g_idx", torch.tensor(g_idx), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_reordered_linear_multiplies_like_its_dense_weight(dtype: torch.dtype, device: torch.device) -> None:
    stored = random_stored(QuantSpec(4, 32, False), 24, 3, True, 5)
    assert stored.order is not None
    module = ReorderedLinear.from_quantized(stored.weight, torch.randn(24), dtype=torch.float32)
    module.column_order.data.copy_(stored.order)
    module = module.to(device).repack()
    weight = module.dequantize(torch.float64)
    assert torch.equal(weight[:, stored.order], dequantize(stored.weight, torch.float64).to(device))
    x = torch.randn(2, 5, 96, device=device).to(dtype)
    expected = x.double() @ weight.T + module.bias.double()
    rounding = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert (module(x).double() - expected).norm() <= rounding * expected.norm()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)).to(device)):
        assert isinstance(twin, ReorderedLinear)
        assert torch.equal(twin(x), module(x))
    assert set(module.state_dict()) >= {"column_order", "weight_packed"}
    assert "reordered" in repr(module)
    with pytest.raises(ValueError, match="must be"):
        module(x[..., :95])

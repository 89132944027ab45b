"""The file format and its configuration, against compressed-tensors itself, and the configurations that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.affine import QuantizedWeight, dequantize
from lowbit.checkpoint import linear_tensors, parse_quantization_config, quantization_config
from lowbit.spec import ActivationSpec, QuantSpec
from packed_folder import TINY_LAYERS as LAYERS
from packed_folder import random_layer

W4 = QuantSpec(4, 32, True)
W8A = QuantSpec(8, -1, False)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
    n=st.integers(1, 40),
    groups=st.integers(1, 3),
    odd=st.integers(1, 33),
    seed=st.integers(0, 2**31),
)
def test_a_layer_is_what_compressed_tensors_decompresses(
    bits: int, group: int, symmetric: bool, n: int, groups: int, odd: int, seed: int
) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    spec = QuantSpec(bits, group, symmetric)
    qw = random_layer(n, odd if group == -1 else groups * group, spec, seed)
    qw = QuantizedWeight(qw.codes, qw.scales.float(), qw.zeros, spec)
    tensors = {key.removeprefix("m."): value for key, value in linear_tensors("m", qw).items()}
    section = quantization_config({"m": spec}, [])["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(section)
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, dequantize(qw, torch.float32))


def test_the_configuration_is_valid_for_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    mixed = quantization_config({"a.b": W4, "a.c": W8A, "a.d": W4}, ["lm_head"])
    read = QuantizationConfig.model_validate(mixed)
    assert sorted(read.config_groups["group_0"].targets) == ["a.b", "a.d"]
    assert read.config_groups["group_1"].weights.strategy == "channel"
    assert read.ignore == ["lm_head"]
    assert read.format == "pack-quantized"


def test_one_spec_targets_the_class_and_several_target_names() -> None:
    uniform = quantization_config({"a": W4, "b": W4}, ["lm_head"])
    assert [group["targets"] for group in uniform["config_groups"].values()] == [["Linear"]]
    mixed = quantization_config({"a": W4, "b": W8A}, ["lm_head"])
    assert [group["targets"] for group in mixed["config_groups"].values()] == [["a"], ["b"]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_int_quantized_layer_is_what_compressed_tensors_decompresses(symmetric: bool, dynamic: bool) -> None:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    spec = QuantSpec(8, -1, symmetric, ActivationSpec(8, dynamic))
    weights_only = random_layer(7, 13, QuantSpec(8, -1, symmetric))
    qw = QuantizedWeight(weights_only.codes, weights_only.scales.float(), weights_only.zeros, spec)
    input_scale = None if dynamic else torch.tensor([0.25])
    tensors = {key.removeprefix("m."): value for key, value in linear_tensors("m", qw, input_scale).items()}
    expected = {
        "weight",
        "weight_scale",
        *([] if symmetric else ["weight_zero_point"]),
        *([] if dynamic else ["input_scale"]),
    }
    assert tensors.keys() == expected and tensors["weight"].dtype == torch.int8
    read = QuantizationConfig.model_validate(quantization_config({"m": spec}, ["lm_head"]))
    assert read.format == "int-quantized"
    scheme = read.config_groups["group_0"]
    assert scheme.input_activations.dynamic is dynamic and scheme.input_activations.symmetric
    theirs = IntQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, dequantize(qw, torch.float32))
    assert parse_quantization_config(quantization_config({"m": spec}, [])).spec_for("m") == spec


def test_groups_of_both_formats_have_a_format_each() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    specs = {"a": W4, "b": QuantSpec(8, -1, True, ActivationSpec()), "c": W8A}
    config = quantization_config(specs, [])
    QuantizationConfig.model_validate(config)
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "pack-quantized", "int-quantized", "pack-quantized"
    ]  # fmt: skip
    parsed = parse_quantization_config(config)
    assert {name: parsed.spec_for(name) for name in specs} == specs


@pytest.mark.parametrize("specs", [{"a": W4, "b": W4}, {"a": W4, "b": W8A, "c": QuantSpec(2, 64, False)}])
def test_the_configuration_reads_back(specs: dict[str, QuantSpec]) -> None:
    parsed = parse_quantization_config(json.loads(json.dumps(quantization_config(specs, ["lm_head"]))))
    assert {name: parsed.spec_for(name) for name in specs} == specs
    with pytest.raises(ValueError, match="ignore lists it"):
        parsed.spec_for("lm_head")


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class() -> None:
    config = quantization_config({"a": W4, "b": W8A}, [])
    groups = list(config["config_groups"].values())
    third = copy.deepcopy(groups[0])
    third["weights"]["num_bits"] = 2
    groups[0]["targets"], groups[1]["targets"], third["targets"] = ["Linear"], ["re:.*down"], ["x.down"]
    config["config_groups"] = {str(i): group for i, group in enumerate([*groups, third])}
    parsed = parse_quantization_config(config)
    assert parsed.spec_for("x.up") == W4
    assert parsed.spec_for("y.down") == W8A
    assert parsed.spec_for("x.down").bits == 2


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    return change


WEIGHTS = "config_groups.group_0.weights"
REFUSED = {
    "quant_method": set_at("quant_method", "gptq"),
    "no quant_method": lambda c: c.pop("quant_method"),
    "format": set_at("format", "int-quantized"),
    "quantization_status": set_at("quantization_status", "frozen"),
    "kv_cache_scheme": set_at("kv_cache_scheme", {"num_bits": 8}),
    "sparsity_config": set_at("sparsity_config", {"format": "sparse-24-bitmask"}),
    "transform_config": set_at("transform_config", {"config_groups": {"R1": {}}}),
    "config_groups": set_at("config_groups", {}),
    "config_groups type": set_at("config_groups", ["group_0"]),
    "num_bits": set_at(f"{WEIGHTS}.num_bits", 3),
    "num_bits bool": set_at(f"{WEIGHTS}.num_bits", True),
    "type": set_at(f"{WEIGHTS}.type", "float"),
    "symmetric": set_at(f"{WEIGHTS}.symmetric", None),
    "strategy": set_at(f"{WEIGHTS}.strategy", "tensor"),
    "group_size": set_at(f"{WEIGHTS}.group_size", 48),
    "group_size missing": set_at(f"{WEIGHTS}.group_size", None),
    "dynamic": set_at(f"{WEIGHTS}.dynamic", True),
    "actorder": set_at(f"{WEIGHTS}.actorder", "group"),
    "unknown weights key": set_at(f"{WEIGHTS}.rotation", "hadamard"),
    "input_activations": set_at("config_groups.group_0.input_activations", {"num_bits": 8}),
    "group format": set_at("config_groups.group_0.format", "naive-quantized"),
    "targets": set_at("config_groups.group_0.targets", []),
    "regex": set_at("config_groups.group_0.targets", ["re:("]),
    "ignore": set_at("ignore", "lm_head"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_configuration_lowbit_does_not_read_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    config = quantization_config({"a": W4}, ["lm_head"])
    parse_quantization_config(config)
    change(config)
    with pytest.raises(ValueError):
        parse_quantization_config(config)


def test_fields_of_older_releases_are_read() -> None:
    config = quantization_config({"a": W4}, ["lm_head"])
    config["sparsity_config"] = {"format": "dense", "global_sparsity": 0.14, "ignore": [], "targets": []}
    config["transform_config"] = {}
    config["config_groups"]["group_0"]["weights"] |= {"observer": "minmax", "observer_kwargs": {}, "actorder": None}
    assert parse_quantization_config(config).spec_for("a") == W4


def test_weights_that_have_no_file_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 8\) bits, got 3"):
        quantization_config({"a": QuantSpec(3, 32, True)}, [])
    with pytest.raises(ValueError, match="both packed and ignored"):
        quantization_config({"a": W4}, ["a"])
    bad = LAYERS["layers.0.up"].scales.clone()
    bad[2, 1] = float("inf")
    with pytest.raises(ValueError, match="finite and not zero"):
        linear_tensors("a", QuantizedWeight(LAYERS["layers.0.up"].codes, bad, None, W4))

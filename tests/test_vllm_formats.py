"""The configurations that lowbit's plugin registers with vLLM, GPTQ of 8 bits and packed experts, behind a stand-in.

With the real vLLM they run in scripts/check_vllm, on a CPU (eval/results/vllm-cpu.md).
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fake_vllm
from fake_vllm import RoutedExperts
from lowbit.packing import pack_codes
from lowbit.spec import PACKED_BITS

EXPERTS, HIDDEN, INNER, TOP = 5, 64, 96, 2


@pytest.fixture
def vllm(monkeypatch):
    with fake_vllm.installed(monkeypatch) as made:
        yield made


@pytest.fixture
def gptq(vllm):
    return importlib.import_module("lowbit.vllm_gptq")


@pytest.fixture
def experts(vllm):
    return importlib.import_module("lowbit.vllm_experts")


# --- GPTQ


@pytest.mark.parametrize(
    "config, user, platform, ours",
    [
        ({"quant_method": "gptq", "bits": 8}, None, "cpu", True),
        ({"quant_method": "gptq", "bits": 8}, "gptq_marlin", "cpu", True),
        ({"quant_method": "gptq", "bits": 8}, "lowbit-gptq", "cpu", True),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 8}}}, None, "cpu", True),
        ({"quant_method": "gptq", "bits": 4, "dynamic": None}, None, "cpu", False),
        ({"quant_method": "gptq", "bits": 8}, "awq", "cpu", False),
        ({"quant_method": "gptq", "bits": 8}, None, "cuda", False),
        ({"quant_method": "awq", "bits": 8}, None, "cpu", False),
    ],
    ids=str,
)
def test_gptq_is_lowbits_where_vllm_would_refuse_it(vllm, gptq, config, user, platform, ours):
    vllm.platforms.current_platform.kind = platform
    assert gptq.GPTQConfig.override_quantization_method(config, user) == (gptq.NAME if ours else None)


def test_linears_of_gptq_are_vllms_without_marlins_question_and_experts_as_vllm_has_them(vllm, gptq):
    config = gptq.GPTQConfig()
    method = config.get_quant_method(nn.Linear(1, 1), "model.layers.0.mlp.up_proj")
    assert isinstance(method, fake_vllm.AutoGPTQLinearMethod)
    assert (method.quant_config, method.quant_type, method.input_dtype) == (config, config.quant_type, None)
    assert vllm.v2 == [type(method).__name__]  # vLLM loads merged packed weights by these only
    assert config.get_quant_method(RoutedExperts(), "model.layers.0.mlp.experts") == "vLLM's"


# --- experts


def quantization(bits=4, group_size=32, symmetric=True, **fields):
    made = {"type": "int", "num_bits": bits, "group_size": group_size, "symmetric": symmetric, "actorder": None}
    return SimpleNamespace(**{**made, "strategy": "group", **fields})


def configured(experts, **fields):
    """A configuration whose experts are of that quantization."""
    scheme = {"weights": quantization(**fields), "input_activations": None, "format": "pack-quantized"}
    return experts.ExpertsConfig({"experts.0.gate_proj": scheme})


PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
MIXED = {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "pack-quantized"}}}


@pytest.mark.parametrize(
    "config, user, model, platform, ours",
    [
        (PACKED, None, {"num_experts": 8}, "cpu", True),
        (PACKED, "compressed-tensors", {"num_local_experts": 8}, "cpu", True),
        (PACKED, "compressed-tensors", {"num_local_experts": 8}, "cuda", False),
        (MIXED, None, {"n_routed_experts": 8}, "cpu", True),
        (PACKED, None, {}, "cpu", False),
        (PACKED, None, {"num_experts": None}, "cpu", False),
        (PACKED, None, {"num_experts": 8}, "rocm", False),
        (PACKED, "fp8", {"num_experts": 8}, "cpu", False),
        ({**PACKED, "format": "int-quantized"}, None, {"num_experts": 8}, "cpu", False),
        ({**PACKED, "quant_method": "gptq"}, None, {"num_experts": 8}, "cpu", False),
    ],
    ids=str,
)
def test_models_with_packed_experts_are_lowbits_to_configure(vllm, experts, config, user, model, platform, ours):
    vllm.platforms.current_platform.kind = platform
    text = SimpleNamespace(**model)
    for hf_config in (text, SimpleNamespace(get_text_config=lambda: text)):
        found = experts.ExpertsConfig.override_quantization_method(config, user, hf_config)
        assert found == (experts.NAME if ours else None)
    assert experts.ExpertsConfig.override_quantization_method(config, user, None) is None


def test_what_vllm_takes_is_vllms(experts):
    assert configured(experts).get_quant_method(nn.Linear(1, 1), "q_proj") == "vLLM's"
    with pytest.raises(NotImplementedError, match=r"^vLLM's own reason$"):
        configured(experts).get_quant_method(nn.Linear(1, 1), "unknown")


@pytest.mark.parametrize(
    "fields, layer, reason",
    [
        ({"bits": 3}, {}, "integers of"),
        ({"group_size": 256}, {}, "in groups of"),
        ({"type": "float"}, {}, "integers of"),
        ({"actorder": "group"}, {}, "no activation ordering"),
        ({}, {"dtype": torch.float32}, "float16 or bfloat16"),
        ({}, {"activation": "swigluoai"}, "silu, gelu, gelu_tanh without limits"),
    ],
    ids=str,
)
def test_experts_that_lowbit_does_not_run_either_are_refused_with_both_reasons(experts, fields, layer, reason):
    with pytest.raises(NotImplementedError, match="No WNA16 MoE backend") as raised:
        configured(experts, **fields).get_quant_method(RoutedExperts(**layer), "experts")
    assert reason in str(raised.value)


def test_a_limit_of_the_activation_is_refused(experts):
    layer = RoutedExperts()
    layer.swiglu_limit = 7.0
    with pytest.raises(NotImplementedError, match="without limits"):
        configured(experts).get_quant_method(layer, "experts")


def filled(bits, group_size, symmetric, dtype, seed=0):
    """A layer as vLLM has loaded it, and its weights (E, N, K) in float64."""
    draw = torch.Generator().manual_seed(seed)
    layer, dense = RoutedExperts(dtype), {}
    for name, n, k in (("w13", 2 * INNER, HIDDEN), ("w2", HIDDEN, INNER)):
        groups = 1 if group_size == -1 else k // group_size
        codes = torch.randint(0, 2**bits, (EXPERTS, n, k), generator=draw, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (EXPERTS, n, groups), generator=draw, dtype=torch.uint8)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
        scales = ((torch.rand(EXPERTS, n, groups, generator=draw) + 0.1) / 2**bits / k**0.5).to(dtype)
        tensors = {"packed": torch.stack([pack_codes(one, bits) for one in codes]), "scale": scales}
        if not symmetric:
            tensors["zero_point"] = torch.stack([pack_codes(one, bits, dim=0) for one in zeros])
        for part, tensor in tensors.items():
            setattr(layer, f"{name}_weight_{part}", nn.Parameter(tensor, requires_grad=False))
        wide = [part.double().repeat_interleave(k // groups, 2) for part in (zeros, scales)]
        dense[name] = (codes.double() - wide[0]) * wide[1]
    return layer, dense


def reference(dense, x, weights, ids):
    """Expert by expert and token by token in float64; an id of -1 adds nothing."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, (row, chosen, shares) in enumerate(zip(x.double(), ids.tolist(), weights.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if expert >= 0:
                gate, up = (dense["w13"][expert] @ row).chunk(2)
                out[token] += share * (dense["w2"][expert] @ (nn.functional.silu(gate) * up))
    return out


def ready(experts, bits, group_size, symmetric, dtype):
    layer, dense = filled(bits, group_size, symmetric, dtype)
    method = configured(
        experts, bits=bits, group_size=None if group_size == -1 else group_size, symmetric=symmetric
    ).get_quant_method(layer, "experts")
    assert type(method).__name__ == "LowbitExpertsMethod"
    method.process_weights_after_loading(layer)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, HIDDEN, generator=draw).to(dtype)
    weights = torch.rand(7, TOP, generator=draw)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=draw)[:TOP] for _ in range(7)]).int()  # the last has none
    return method, layer, dense, x, weights, ids


def assert_close(out, exact, dtype):
    """Rounded are: gate and up, their product, the expert's result, its share and the product with it, the sum; gate
    goes through silu, whose slope is at most 1.1. Against the size of the results, which nearly cancel nowhere."""
    roundings = 8
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= roundings * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits, group_size", [(bits, size) for bits in PACKED_BITS for size in (32, -1)])
def test_experts_compute_what_their_weights_say(experts, bits, group_size, symmetric, dtype):
    method, layer, dense, x, weights, ids = ready(experts, bits, group_size, symmetric, dtype)
    out = method.apply(layer, x, weights, ids, None, None)
    assert_close(out, reference(dense, x, weights, ids), dtype)
    assert method.apply(layer, x[:0], weights[:0], ids[:0], None, None).shape == (0, HIDDEN)


def test_experts_of_another_rank_add_nothing(experts):
    method, layer, dense, x, weights, ids = ready(experts, 4, 32, True, torch.float16)
    everywhere = ids * 2  # of 2 E experts the even ones are here
    layer.expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    layer.expert_map[::2] = torch.arange(EXPERTS, dtype=torch.int32)
    everywhere[::2, 0] += 1
    ids[::2, 0] = -1
    assert_close(method.apply(layer, x, weights, everywhere, None, None), reference(dense, x, weights, ids), x.dtype)


def test_router_weights_on_the_input(experts):
    method, layer, dense, x, weights, ids = ready(experts, 4, 32, False, torch.float16)
    layer.apply_router_weight_on_input = True
    weights = weights[:, :1]
    scaled = (x * weights.half()).double()
    exact = reference(dense, scaled, torch.ones_like(weights), ids[:, :1])
    assert_close(method.apply(layer, x, weights, ids[:, :1], None, None), exact, x.dtype)

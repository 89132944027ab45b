"""lowbit inside vLLM, as far as it can be tested where vLLM is not installed.

That vLLM's loader, configuration and kernel selection fit is shown by scripts/check_vllm with the real vLLM on a CPU
(eval/results/vllm-cpu.md); on a GPU it has not been measured. Here: the plugin without vLLM, and the kernel's own code
behind a stand-in for the names that it takes from vLLM 0.32. Experts and GPTQ are in test_vllm_formats.py.
"""

import importlib
import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fake_vllm
from architectures import tiny
from fake_vllm import LayerConfig, ScalarType
from lowbit import QuantLinear, QuantSpec, hf, quantize_
from lowbit.packing import pack_codes
from lowbit.spec import PACKED_BITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
N, K = 48, 256


@pytest.fixture
def vllm(monkeypatch):
    with fake_vllm.installed(monkeypatch) as made:
        yield made


@pytest.fixture
def plugin():
    """The plugin's module, as a process imports it for the first time."""
    module = importlib.import_module("lowbit.vllm_plugin")
    module.register.cache_clear()
    yield module
    module.register.cache_clear()


@pytest.fixture
def kernel_class(vllm):
    return importlib.import_module("lowbit.vllm_kernel").LowbitLinearKernel


# --- the plugin


def test_the_entry_point_that_vllm_calls_is_the_plugins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"lowbit": "lowbit.vllm_plugin:register"}


def test_vllm_pays_nothing_for_the_plugins_import():
    code = "import sys, lowbit.vllm_plugin; assert not {'torch', 'vllm', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_so_and_raises_nothing(plugin, caplog):
    with caplog.at_level(logging.WARNING):
        assert plugin.register() is False
    assert "no vllm is installed" in caplog.text and "ModuleNotFoundError" in caplog.text


EVERYTHING = [
    ("LowbitLinearKernel", "cuda", "mp"),
    ("LowbitLinearKernel", "cpu", "mp"),
    ("GPTQConfig", "lowbit-gptq"),
    ("ExpertsConfig", "lowbit-compressed-tensors"),
]


def test_it_registers_once_per_process_and_kernels_for_both_platforms(plugin, vllm):
    assert plugin.register() is True and plugin.register() is True
    assert [(cls.__name__, *rest) for cls, *rest in vllm.registered] == EVERYTHING


@pytest.mark.parametrize(
    "module, name, lost",
    [
        ("vllm.model_executor.kernels.linear", "register_linear_kernel", EVERYTHING[:2]),
        ("vllm.model_executor.layers.quantization.auto_gptq", "AutoGPTQLinearMethod", EVERYTHING[2:3]),
        ("vllm.model_executor.layers.fused_moe", "FusedMoEMethodBase", EVERYTHING[3:]),
    ],
)
def test_a_vllm_with_another_interface_starts_without_what_does_not_fit(plugin, vllm, caplog, module, name, lost):
    delattr(sys.modules[module], name)
    with caplog.at_level(logging.WARNING):
        assert plugin.register() is False
    assert name in caplog.text and "0.32" in caplog.text
    kept = [entry for entry in EVERYTHING if entry not in lost]
    assert [(cls.__name__, *rest) for cls, *rest in vllm.registered] == kept


# --- the kernel


def parameter(data, output_dim):
    made = nn.Parameter(data, requires_grad=False)
    made.output_dim = output_dim
    return made


def layer_of(form, bits, group_size, symmetric, dtype, seed=0):
    """A layer as vLLM has loaded it from a checkpoint of that format, and its weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (N, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, groups, generator=generator) / 2**bits + 0.01).to(dtype)
    layer, middle = nn.Module(), torch.full_like(zeros, 2 ** (bits - 1))
    weight, rows_first = pack_codes(codes, bits), form == "compressed-tensors"
    layer.q = parameter(weight if rows_first else weight.t().contiguous(), 0 if rows_first else 1)
    layer.s = parameter(scales if rows_first else scales.t().contiguous(), 0 if rows_first else 1)
    if form == "gptq":  # has packed zeros for a symmetric weight too
        layer.z = parameter(pack_codes(middle if symmetric else zeros, bits, dim=0).t().contiguous(), 1)
    elif not symmetric:
        layer.z = parameter(pack_codes(zeros, bits, dim=0), 0)
    zero = (middle if symmetric else zeros).double().repeat_interleave(K // groups, 1)
    return layer, (codes.double() - zero) * scales.double().repeat_interleave(K // groups, 1)


def config(bits, group_size, symmetric, **fields):
    return LayerConfig(
        (K, N), ScalarType(bits, 2 ** (bits - 1) if symmetric else 0), group_size, not symmetric, **fields
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_every_orientation_that_vllm_loads_gives_the_same_product(kernel_class, form, bits, symmetric, dtype):
    group_size = {2: 32, 4: 64, 8: K}[bits]  # vLLM may give a whole row as its length
    layer, weight = layer_of(form, bits, group_size, symmetric, dtype)
    c = config(bits, group_size, symmetric, act_type=dtype)
    assert kernel_class.can_implement(c) == (True, None)
    kernel = kernel_class(c, "q", "s", "z")
    kernel.process_weights_after_loading(layer)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = kernel.apply_weights(layer, x, bias)
    assert out.dtype == dtype and out.shape == (2, 3, N)
    # bf16 weights are rounded once (2^-9 each), sums of K terms average it out; the result is rounded once
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    error = (out.double() - (x.double() @ weight.T + bias.double())).abs()
    assert (error <= magnitude * (2**-8 if dtype == torch.bfloat16 else 2**-11)).all()


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"weight_type": ScalarType(3, 4)}, "(2, 4, 8) bits"),
        ({"weight_type": ScalarType(4, 0)}, "zero"),
        ({"weight_type": ScalarType(4, 8), "zero_points": True}, "zero"),
        ({"group_size": 256, "partition_weight_shape": (1024, N)}, "groups are"),
        ({"group_size": 64, "partition_weight_shape": (96, N)}, "divide the 96 columns"),
        ({"act_type": torch.float32}, "float16 or bfloat16"),
        ({"act_type": torch.float16, "out_type": torch.float32}, "of the result's dtype"),
    ],
    ids=str,
)
def test_what_the_op_does_not_do_is_left_to_others_with_a_reason(kernel_class, changed, reason):
    fields = {**vars(config(4, 64, symmetric=True)), **changed}
    possible, why = kernel_class.can_implement(LayerConfig(**fields))
    assert not possible and reason in why


# --- what vLLM needs of the files: it makes a quantized linear of everything that config.json does not exempt


@pytest.mark.parametrize(
    "name, router", [("mixtral", "model.layers.0.block_sparse_moe.gate"), ("qwen3_moe", "model.layers.0.mlp.gate")]
)
def test_routers_are_exempt_under_the_names_of_the_files(name, router):
    model = tiny(name)
    quantize_(model, QuantSpec(4, 32))
    ignored = hf.ignore_names(model, ["lm_head"])
    assert router in ignored and "lm_head" in ignored
    assert f"{router}.weight" in dict(hf.dense_tensors(model, _packed(model)))
    assert not any("experts" in pattern for pattern in ignored)


def test_dense_experts_are_exempt_by_a_pattern_that_their_names_in_the_files_match():
    model = tiny("mixtral")
    quantize_(model, QuantSpec(4, 32), ignore=[r"layers\.0\.mlp\.experts", "lm_head"], allow_partial=True)
    patterns = [name.removeprefix("re:") for name in hf.ignore_names(model, ["lm_head"]) if name.startswith("re:")]
    dense = [name for name in dict(hf.dense_tensors(model, _packed(model))) if "experts" in name]
    assert dense and all(any(re.match(p, name) for p in patterns) for name in dense)
    assert any(re.match(p, "model.layers.0.block_sparse_moe.experts.3.w2") for p in patterns)
    assert not any(re.match(p, "model.layers.1.block_sparse_moe.experts.0.w1") for p in patterns)


def _packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]

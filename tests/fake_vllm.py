"""Stands in for the names that lowbit's plugin takes from vLLM 0.32, where vLLM is not installed.

Signatures and what the plugin relies on are as read in vLLM's source; scripts/check_vllm shows that the real one fits.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch

OURS = ("lowbit.vllm_kernel", "lowbit.vllm_gptq", "lowbit.vllm_experts")
QUANTIZATION = "vllm.model_executor.layers.quantization"
CT = f"{QUANTIZATION}.compressed_tensors"
NAMES = (
    "vllm",
    "vllm.envs",
    "vllm.platforms",
    "vllm.model_executor",
    "vllm.model_executor.kernels",
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.linear",
    QUANTIZATION,
    f"{QUANTIZATION}.auto_gptq",
    f"{QUANTIZATION}.utils",
    f"{QUANTIZATION}.utils.gptq_utils",
    CT,
    f"{CT}.compressed_tensors",
    f"{CT}.compressed_tensors_moe",
    f"{CT}.compressed_tensors_moe.compressed_tensors_moe_wna16",
)


@dataclass(frozen=True)
class ScalarType:
    """vLLM's weight types are unsigned codes, and ``bias`` what is subtracted from one."""

    size_bits: int
    bias: int

    def is_integer(self):
        return True

    def is_signed(self):
        return False


@dataclass
class LayerConfig:
    """Fields of vLLM's MPLinearLayerConfig; shapes are (in, out)."""

    partition_weight_shape: tuple
    weight_type: ScalarType
    group_size: int
    zero_points: bool
    act_type: torch.dtype = torch.float16
    out_type: object = None


class MPLinearKernel:
    def __init__(self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None):
        self.config = c
        self.w_q_name, self.w_s_name, self.w_zp_name = w_q_param_name, w_s_param_name, w_zp_param_name

    def _get_weight_params(self, layer):
        return tuple(getattr(layer, name, None) for name in (self.w_q_name, self.w_s_name, self.w_zp_name))


class Platform:
    """vllm.platforms.current_platform; a test may change what it is."""

    kind = "cpu"

    def is_cpu(self):
        return self.kind == "cpu"

    def is_cuda(self):
        return self.kind == "cuda"


class RoutedExperts(torch.nn.Module):
    """What a method reads of vLLM's layer of experts."""

    ckpt_gate_proj_name = "gate_proj"

    def __init__(self, dtype=torch.float16, activation="silu"):
        super().__init__()
        self.activation = types.SimpleNamespace(value=activation)
        self.moe_config = types.SimpleNamespace(in_dtype=dtype)
        self.expert_map, self.apply_router_weight_on_input = None, False
        self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None


class FusedMoEMethodBase:
    def __init__(self, moe):
        self.moe = moe


class CompressedTensorsWNA16MoEMethod(FusedMoEMethodBase):
    def __init__(self, weight_quant, input_quant, moe):
        raise NotImplementedError("No WNA16 MoE backend supports the deployment configuration.")


class CompressedTensorsConfig:
    """``schemes``: layer name -> scheme; experts are refused, linears get a word."""

    def __init__(self, schemes=None):
        self.schemes = schemes or {}

    def get_scheme_dict(self, layer, layer_name):
        return self.schemes.get(layer_name)

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, RoutedExperts):
            return CompressedTensorsWNA16MoEMethod(None, None, layer.moe_config)
        if prefix == "unknown":
            raise NotImplementedError("vLLM's own reason")
        return "vLLM's"


class AutoGPTQConfig:
    quant_type = ScalarType(8, 128)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        known = user_quant in (None, "gptq", "gptq_marlin", "auto_gptq", "marlin")
        return "auto_gptq" if hf_quant_cfg.get("quant_method") == "gptq" and known else None

    def get_quant_method(self, layer, prefix):
        return "vLLM's"


class AutoGPTQLinearMethod:
    def __init__(self, quant_config):
        raise ValueError("Marlin does not support weight_bits = uint8b128.")


@contextmanager
def installed(monkeypatch):
    """The modules, in sys.modules; the first has what is ``registered``, and ``v2``, the classes with that loader."""
    made = {name: types.ModuleType(name) for name in NAMES}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    registered = made["vllm"].registered = []
    linear = made["vllm.model_executor.kernels.linear"]
    linear.MPLinearKernel, linear.MPLinearLayerConfig = MPLinearKernel, LayerConfig
    linear.register_linear_kernel = lambda *arguments: registered.append(arguments)
    made[QUANTIZATION].register_quantization_config = lambda name: lambda cls: registered.append((cls, name))
    made["vllm.envs"].VLLM_BATCH_INVARIANT = False
    made["vllm.platforms"].current_platform = Platform()
    made["vllm.platforms"].PlatformEnum = types.SimpleNamespace(CUDA="cuda", CPU="cpu")
    made[f"{QUANTIZATION}.utils"].replace_parameter = setattr
    made["vllm"].v2 = []
    made["vllm.model_executor.layers.linear"].register_weight_loader_v2_supported_method = lambda cls: (
        made["vllm"].v2.append(cls.__name__) or cls
    )
    moe = made["vllm.model_executor.layers.fused_moe"]
    moe.FusedMoEMethodBase, moe.RoutedExperts = FusedMoEMethodBase, RoutedExperts
    gptq = made[f"{QUANTIZATION}.auto_gptq"]
    gptq.AutoGPTQConfig, gptq.AutoGPTQLinearMethod = AutoGPTQConfig, AutoGPTQLinearMethod
    made[f"{QUANTIZATION}.utils.gptq_utils"].get_linear_quant_method = lambda config, layer, prefix, cls: cls(config)
    made[f"{CT}.compressed_tensors"].CompressedTensorsConfig = CompressedTensorsConfig
    experts = made[f"{CT}.compressed_tensors_moe.compressed_tensors_moe_wna16"]
    experts.CompressedTensorsWNA16MoEMethod = CompressedTensorsWNA16MoEMethod
    for name in OURS:
        sys.modules.pop(name, None)
    try:
        yield made["vllm"]
    finally:
        for name in OURS:  # they hold the stand-in's classes
            sys.modules.pop(name, None)

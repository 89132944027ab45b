"""GPTQ checkpoints of 8 bits in vLLM on a CPU; importable where vLLM is, see vllm_plugin.py.

vLLM 0.32 reads them, and has kernels chosen for their layers as for those of every other format, but asks first whether
Marlin computes them, which on a CPU it says of 4 bits only. The configuration registered here is vLLM's own without
that question; vLLM asks registered ones before its own which of them wants a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.platforms import current_platform

__all__ = ["NAME", "GPTQConfig"]

NAME = "lowbit-gptq"
"""What vLLM calls it, in its log too."""


@register_weight_loader_v2_supported_method  # by name, so the parent's does not count
class GPTQLinearMethod(AutoGPTQLinearMethod):  # type: ignore[misc]
    """vLLM's, whose layers go to whichever kernel takes them, without asking for Marlin."""

    def __init__(self, quant_config: AutoGPTQConfig) -> None:
        self.quant_config = quant_config  # as the parent's, whose __init__ refuses what Marlin refuses
        self.quant_type = quant_config.quant_type
        self.input_dtype = None


class GPTQConfig(AutoGPTQConfig):  # type: ignore[misc]
    """vLLM's configuration of GPTQ for checkpoints with layers of 8 bits, on a CPU."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """NAME for a checkpoint that this is for, whatever name of GPTQ the user gave; None leaves it to vLLM."""
        if user_quant == NAME:
            user_quant = None
        if super().override_quantization_method(hf_quant_cfg, user_quant, hf_config) is None:
            return None
        rules = (hf_quant_cfg.get("dynamic") or {}).values()
        widths = {hf_quant_cfg.get("bits"), *(rule.get("bits") for rule in rules)}
        return NAME if current_platform.is_cpu() and 8 in widths else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What computes a layer: experts as vLLM does, or refuses to."""
        if isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        return get_linear_quant_method(self, layer, prefix, GPTQLinearMethod)

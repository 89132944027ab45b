"""Stands in for vLLM's packed experts where this CPU has no kernel for them (vLLM 0.32 wants AMX).

vLLM itself reads the configuration, names and loads every expert's tensors and computes; only between loading and
computing the experts are expanded to dense ones here. Imported by vllm_run.py in vLLM's environment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as packed_experts,
)

__all__ = ["use_expanded_experts"]


def use_expanded_experts() -> None:
    """From now on compressed-tensors' packed experts become dense once they are loaded."""
    packed_experts.select_wna16_moe_backend = lambda **_: (WNA16MoEBackend.CPU, None)
    packed_experts.CompressedTensorsWNA16MoEMethod.process_weights_after_loading = expand


def expand(method: Any, layer: Any) -> None:
    """Replace a layer's packed experts ``(E, N, K * bits / 32)`` by ``(E, N, K)`` and its method by the dense one."""
    dense = UnquantizedFusedMoEMethod(layer.moe_config)
    for name in ("w13", "w2"):
        tensors = [getattr(layer, f"{name}_weight_{part}", None) for part in ("packed", "scale", "zero_point")]
        weight = dequantized(*tensors, method.num_bits).to(layer.moe_config.in_dtype)
        layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
    layer._replace_quant_method(dense)
    dense.process_weights_after_loading(layer)


def dequantized(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """words ``(E, N, K * bits / 32)``, scales ``(E, N, G)``, zeros ``(E, N * bits / 32, G)`` -> ``(E, N, K)`` fp32."""
    codes = unpacked(words, bits).float()
    zero = torch.tensor(float(2 ** (bits - 1)))
    if zeros is not None:
        zero = unpacked(zeros.transpose(1, 2).contiguous(), bits).transpose(1, 2).float().unsqueeze(-1)
    grouped = codes.view(*scales.shape, -1)
    return ((grouped - zero) * scales.float().unsqueeze(-1)).flatten(2)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """``(..., W)`` int32 -> ``(..., W * 32 / bits)``, the least significant code first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)

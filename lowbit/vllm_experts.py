"""Packed experts in vLLM by lowbit's grouped matmul; importable where vLLM is, see vllm_plugin.py.

vLLM has no interface for kernels of experts as it has for linears, but one for configurations of quantization, and asks
registered ones before its own which of them wants a checkpoint. The one registered here is vLLM's own of
compressed-tensors, for models with experts packed by ``pack-quantized``, on a CPU: everything in it is vLLM's but for
experts that vLLM's backends refuse, which are all where there is no AMX. On a GPU, where vLLM has kernels for most and
this was never run, its own configuration is left alone.

vLLM creates and fills the parameters, ``w13`` (gate above up) and ``w2`` (down), in the orientation of the checkpoint,
which is ops.py's "disk": words (E, N, K*bits/32), scales (E, N, G), zeros (E, N*bits/32, G).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import current_platform

from . import ops
from .grouped import grouped_packed_linear
from .spec import GROUP_SIZES, PACKED_BITS
from .vllm_kernel import prepare

__all__ = ["NAME", "ExpertsConfig", "LowbitExpertsMethod"]

NAME = "lowbit-compressed-tensors"
"""What vLLM calls it, in its log too."""

PARTS = ("packed", "scale", "zero_point")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
"""vLLM's names of what is done to the gate before up is multiplied by it."""


class ExpertsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """vLLM's configuration of compressed-tensors for models with packed experts."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """NAME for a checkpoint that this is for; None leaves it to vLLM."""
        groups = (hf_quant_cfg.get("config_groups") or {}).values()
        formats = {hf_quant_cfg.get("format"), *(group.get("format") for group in groups)}
        wanted = (
            hf_quant_cfg.get("quant_method") == "compressed-tensors"
            and user_quant in (None, "compressed-tensors", NAME)
            and "pack-quantized" in formats
            and _has_experts(hf_config)
            and current_platform.is_cpu()
        )
        return NAME if wanted else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What computes a layer: vLLM's choice, and lowbit's kernels for packed experts that no backend of it takes."""
        try:
            return super().get_quant_method(layer, prefix)
        except NotImplementedError as error:
            if not isinstance(layer, RoutedExperts):
                raise
            scheme = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_gate_proj_name}")
            if reason := _why_not(scheme, layer):
                raise NotImplementedError(f"{error} Nor does lowbit: {reason}.") from error
            return LowbitExpertsMethod(scheme["weights"], layer.moe_config)


class LowbitExpertsMethod(CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """Experts by ``lowbit::grouped_packed_linear``; their parameters are created as vLLM creates them."""

    def __init__(self, weights: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # not the parent's, which asks for a backend
        self.weight_quant, self.input_quant = weights, None
        self.num_bits, self.symmetric, self.strategy = weights.num_bits, weights.symmetric, weights.strategy
        self.packed_factor = Fraction(32, weights.num_bits)
        self.group_size = _group_size(weights)
        self.layouts: dict[str, str] = {}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the loaded parameters by those of the layout that the op reads."""
        for name in ("w13", "w2"):
            words, scales, zeros = self._packed(layer, name)
            n, k = scales.shape[1], words.shape[2] * 32 // self.num_bits
            how: dict[str, Any] = {"bits": self.num_bits, "symmetric": zeros is None, "dtype": scales.dtype}
            layout = self.layouts[name] = ops.best_layout(n, k, **how, device=words.device)
            experts = [
                ops.from_disk(
                    words[e], scales[e], None if zeros is None else zeros[e], bits=self.num_bits, k=k, layout=layout
                )
                for e in range(len(words))
            ]
            for part, tensors in zip(PARTS, zip(*experts, strict=True), strict=True):
                if tensors[0] is not None:
                    stack = nn.Parameter(torch.stack(tensors), requires_grad=False)
                    replace_parameter(layer, f"{name}_weight_{part}", stack)
        prepare(words.device)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """``x (T, H)``, ``topk_weights`` and ``topk_ids (T, k)`` -> ``(T, H)``; shared experts are the caller's.

        Experts of another rank add nothing: in ``expert_map`` they are -1, and the op gives zeros for rows past the
        last expert.
        """
        count = len(layer.w13_weight_packed)
        chosen = topk_ids.long() if layer.expert_map is None else layer.expert_map[topk_ids.long()].long()
        chosen = torch.where(chosen < 0, count, chosen).flatten()
        experts, order = torch.sort(chosen, stable=True)
        ends = torch.searchsorted(experts, torch.arange(count, device=x.device), right=True, out_int32=True)
        weights = topk_weights.flatten()[order, None].to(x.dtype)
        rows = x[order // topk_ids.shape[1]]
        if layer.apply_router_weight_on_input:
            rows = rows * weights
        gate, up = self._product(layer, "w13", rows, ends).chunk(2, -1)
        out = self._product(layer, "w2", ACTIVATIONS[layer.activation.value](gate) * up, ends)
        if not layer.apply_router_weight_on_input:
            out = out * weights
        sums = torch.empty_like(out).index_copy_(0, order, out)
        return sums.view(*topk_ids.shape, x.shape[1]).sum(1)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: what vLLM's own kernels ask for."""

    def _product(self, layer: nn.Module, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        how: dict[str, Any] = {"bits": self.num_bits, "group_size": self.group_size, "layout": self.layouts[name]}
        return grouped_packed_linear(
            rows, ends, *self._packed(layer, name), getattr(layer, f"{name}_bias", None), **how
        )

    def _packed(self, layer: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        words, scales, zeros = (getattr(layer, f"{name}_weight_{part}", None) for part in PARTS)
        return words, scales, zeros  # type: ignore[return-value]


def _why_not(scheme: Mapping[str, Any] | None, layer: Any) -> str | None:
    """The first thing about experts that the op or :meth:`LowbitExpertsMethod.apply` does not do, in words."""
    weights, inputs = (None, None) if scheme is None else (scheme.get("weights"), scheme.get("input_activations"))
    if weights is None or inputs is not None or scheme is None or scheme.get("format") != "pack-quantized":
        return "its experts are packed ones with activations as they are"
    if weights.type != "int" or weights.num_bits not in PACKED_BITS or _group_size(weights) not in GROUP_SIZES:
        return f"its weights are integers of {PACKED_BITS} bits in groups of {GROUP_SIZES}, not {weights}"
    if weights.actorder not in (None, "static", "weight"):
        return "it has no activation ordering"
    if layer.moe_config.in_dtype not in (torch.float16, torch.bfloat16):
        return f"its activations are float16 or bfloat16, not {layer.moe_config.in_dtype}"
    limits = [getattr(layer, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta")]
    if layer.activation.value not in ACTIVATIONS or any(limit is not None for limit in limits):
        return f"its activations are {', '.join(ACTIVATIONS)} without limits, not {layer.activation.value}"
    return None


def _group_size(weights: Any) -> int:
    """-1 for one group per row, as ops.py has it."""
    return -1 if weights.group_size is None else int(weights.group_size)


def _has_experts(hf_config: Any) -> bool:
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 0 for name in names)

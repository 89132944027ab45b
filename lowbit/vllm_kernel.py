"""lowbit's packed matmul behind vLLM's linear-kernel interface; importable where vLLM is, see vllm_plugin.py.

vLLM loads a packed weight in the orientation of its checkpoint format and asks a kernel to bring it into its own:

| tensor | compressed-tensors | AWQ, as vLLM converts it | GPTQ                       | ops.py's "disk"        |
|--------|--------------------|--------------------------|----------------------------|------------------------|
| weight | (N, K*bits/32)     | (K*bits/32, N)           | (K*bits/32, N)             | (N, K*bits/32)         |
| scales | (N, G)             | (G, N)                   | (G, N)                     | (N, G)                 |
| zeros  | (N*bits/32, G)     | (N*bits/32, G)           | (G, N*bits/32), not needed | (N*bits/32, G) or none |

The codes are in the same order everywhere (along K, least significant first), so it is a transposition at most; then
``ops.from_disk`` makes the layout that the device multiplies fastest with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import current_platform

from . import ops
from .spec import GROUP_SIZES, PACKED_BITS

__all__ = ["LowbitLinearKernel", "prepare"]


class LowbitLinearKernel(MPLinearKernel):
    """``x @ W.T + bias`` with W at 2, 4 or 8 bits, symmetric or not, by ``lowbit::packed_linear``."""

    @classmethod
    def get_min_capability(cls) -> int:
        """75, as vLLM counts: Turing; bfloat16 needs 80, which ``can_implement`` looks after."""
        return 75

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the op takes such a layer on this platform, and if not, why."""
        reason = _why_not(c)
        return reason is None, reason

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the loaded parameters by those of the layout that the op reads."""
        c = self.config
        k, bits = c.partition_weight_shape[0], c.weight_type.size_bits
        weight, scales, zeros = (_rows_first(layer, name) for name in (self.w_q_name, self.w_s_name, self.w_zp_name))
        if not c.zero_points:  # GPTQ stores them for symmetric weights too
            zeros = None
            if self.w_zp_name and hasattr(layer, self.w_zp_name):
                setattr(layer, self.w_zp_name, None)
        n, device = scales.shape[0], weight.device
        how: dict[str, Any] = {"bits": bits, "symmetric": zeros is None, "dtype": c.act_type, "device": device}
        self.layout = ops.best_layout(n, k, **how)
        packed = ops.from_disk(weight, scales, zeros, bits=bits, k=k, layout=self.layout)
        for name, tensor in zip((self.w_q_name, self.w_s_name, self.w_zp_name), packed, strict=True):
            if tensor is not None:
                replace_parameter(layer, name, nn.Parameter(tensor, requires_grad=False))
        prepare(device)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(..., K) -> (..., N)`` in x's dtype."""
        weight, scales, zeros = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        return ops.packed_linear(
            x, weight, scales, zeros, bias, bits=bits, group_size=_group_size(self.config), layout=self.layout
        )


def prepare(device: torch.device) -> None:
    """What is done once weights are on their device: the kernels' own memory, and vLLM's wish for equal batches."""
    ops.prepare(device, reset=True)  # sleep mode gives memory away, and weights are loaded again behind it
    if device.type == "cuda" and envs.VLLM_BATCH_INVARIANT:
        ops.set_batch_invariant(True)


def _why_not(c: MPLinearLayerConfig) -> str | None:
    """The first thing in ``c`` that the op does not do on this platform, in words."""
    (k, n), bits = c.partition_weight_shape, c.weight_type.size_bits
    size = _group_size(c)
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return "lowbit's kernels run on CUDA and CPU"
    if bits not in PACKED_BITS or not c.weight_type.is_integer() or c.weight_type.is_signed():
        return f"lowbit's weights are unsigned integers of {PACKED_BITS} bits, not {c.weight_type}"
    if c.weight_type.bias != (0 if c.zero_points else 2 ** (bits - 1)):
        return f"zero points {c.zero_points} with {c.weight_type}: lowbit's symmetric weights have the middle as zero"
    if size not in GROUP_SIZES or (size != -1 and k % size):
        return f"lowbit's groups are {GROUP_SIZES} columns and divide the {k} columns of the layer, not {c.group_size}"
    if c.act_type not in (torch.float16, torch.bfloat16) or c.out_type not in (None, c.act_type):
        return f"lowbit's activations are float16 or bfloat16 and of the result's dtype, not {c.act_type}"
    if current_platform.is_cuda():
        how: dict[str, Any] = {"bits": bits, "symmetric": not c.zero_points, "dtype": c.act_type}
        if ops.best_layout(n, k, **how, device=torch.device("cuda")) != ops.CUDA_TILES:
            return f"this GPU cannot multiply {c.act_type} with lowbit's kernels, or triton cannot be imported"
    return None


def _group_size(c: MPLinearLayerConfig) -> int:
    """-1 for one group per row, as ops.py has it, also where vLLM gives the number of columns."""
    return -1 if c.group_size == c.partition_weight_shape[0] else c.group_size


def _rows_first(layer: nn.Module, name: str | None) -> Any:
    """The parameter's data with the output dimension first, or None where the layer has none of that name."""
    parameter = getattr(layer, name or "", None)
    if parameter is None:
        return None
    data: Tensor = parameter.data
    return (data if parameter.output_dim == 0 else data.t()).contiguous()

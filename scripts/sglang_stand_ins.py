"""A plugin of SGLang (entry point group sglang.srt.plugins) for scripts/check_sglang, in each of its processes.

SGLang's kernels for quantized weights are CUDA's. Without a GPU the plugin stands in for those kernels and for nothing
else: SGLang itself reads the configuration, chooses the scheme, names, creates and fills the parameters, and rearranges
scales and zero points for Marlin. What is stood in for is in STAND_INS, with the reason; a result got with them says
how SGLang loads a checkpoint and what its layers then mean, and nothing about its kernels. The stand-ins know Marlin's
layout of scales and zero points (they undo it) and nothing of lowbit.

LOWBIT_CHECK_LOADED names a file: what the parameters hold after loading, before they are rearranged, is written there.
LOWBIT_CHECK_STAND_INS=0 leaves the kernels alone, so that SGLang says itself what it lacks.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CAPABILITY = (9, 0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STAND_INS = {
    "the GPU's capability": "SGLang is told 9.0 (Hopper) where it asks whether Marlin runs",
    "gptq_marlin_repack, awq_marlin_repack": "Marlin's tiles: codes stay in the order of rows",
    "gptq_marlin_gemm, fused_marlin_moe": "torch: weights dequantized in float32, rounded to the dtype, multiplied",
    "int8_scaled_mm, per_token_quant_int8": "torch: the same integers, the product exact",
    "marlin_make_workspace": "no workspace is needed",
}
UNFILLED_INT, UNFILLED_INT8 = 0x5A5AA5A5, 0x5A


def register() -> None:
    """Called by SGLang before it starts."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    DefaultModelLoader.load_weights_only = staticmethod(recorded(DefaultModelLoader.load_weights_only))
    if os.environ.get("LOWBIT_CHECK_STAND_INS") != "0":
        stand_in()


# --- what is loaded -------------------------------------------------------------------------------------------------


def recorded(load: Any) -> Any:
    """SGLang's loading of tensors into parameters, with a record of what came and what parameters held after."""

    def load_weights_only(model: Any, weights: Any, target_device: Any) -> None:
        folder = os.environ.get("LOWBIT_CHECK_LOADED")
        if folder is None:
            load(model, weights, target_device)
            return
        given: list[str] = []
        for _, parameter in model.named_parameters():
            parameter.data.fill_(unfilled(parameter.dtype))

        def seen() -> Any:
            for name, tensor in weights:
                given.append(name)
                yield name, tensor

        load(model, seen(), target_device)
        from safetensors.torch import save_file

        chosen = Counter(scheme_of(module) for module in model.modules() if hasattr(module, "quant_method"))
        kept = {name: parameter.data.clone().contiguous() for name, parameter in model.named_parameters()}
        save_file(kept, str(Path(folder) / "parameters.safetensors"))
        about = {"given": given, "schemes": {name: count for name, count in chosen.items() if name}}
        about["model"] = type(model).__name__
        (Path(folder) / "loaded.json").write_text(json.dumps(about), encoding="utf-8")

    return load_weights_only


def unfilled(dtype: torch.dtype) -> float | int:
    """What no checkpoint holds, to tell what was left alone."""
    if dtype.is_floating_point:
        return float("nan")
    return UNFILLED_INT8 if dtype.itemsize == 1 else UNFILLED_INT


def scheme_of(module: Any) -> str:
    method = module.quant_method
    return type(getattr(module, "scheme", None) or method).__name__ if method is not None else ""


# --- in place of kernels ----------------------------------------------------------------------------------------------


def stand_in() -> None:
    """Put everything of STAND_INS in its place."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe as experts
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_int8 as int8,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as packed,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16_moe as packed_experts,
    )
    from sglang.srt.model_loader import loader

    for module in (marlin_utils, loader):
        module.get_device_capability = lambda *_: CAPABILITY
    CompressedTensorsConfig._check_scheme_supported = capable
    awq._is_cuda = True  # asked only whether Marlin may be used
    for module in (marlin_utils, packed, packed_experts, gptq_kernels, awq_kernels):
        module.marlin_make_workspace = lambda device, *_, **__: torch.zeros(1, dtype=torch.int32, device=device)
    for module in (packed, gptq_kernels):
        module.gptq_marlin_repack = repack
    awq_kernels.awq_marlin_repack = repack_awq
    awq_kernels.awq_marlin_moe_repack = repack_awq_experts
    marlin_utils.gptq_marlin_gemm = gemm
    experts.fused_marlin_moe = run_experts
    int8.per_token_quant_int8, int8.int8_scaled_mm = quantized_rows, scaled_mm


def capable(_: Any, min_capability: int, error: bool = True) -> bool:
    """Instead of CompressedTensorsConfig._check_scheme_supported, which asks CUDA."""
    supported = min_capability <= 10 * CAPABILITY[0] + CAPABILITY[1]
    if error and not supported:
        raise RuntimeError(f"the scheme needs capability {min_capability}")
    return supported


def unpacked(words: Tensor, bits: int) -> Tensor:
    """``(..., W)`` int32 -> ``(..., W * 32 / bits)``, the least significant code first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def repack(words: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """``(K * bits / 32, N)`` int32 in Marlin's shape ``(K / 16, N * bits / 2)``, the words where they were."""
    if perm.numel():
        raise NotImplementedError("act-order is not stood in for")
    if tuple(words.shape) != (size_k * num_bits // 32, size_n):
        raise ValueError(f"packed words of {tuple(words.shape)} for K {size_k}, N {size_n} and {num_bits} bits")
    return words.reshape(size_k // 16, size_n * num_bits // 2)


def repack_awq(words: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """AWQ's ``(K, N / 8)`` int32 -> what ``repack`` gives for the same codes."""
    codes = unpacked(words, num_bits)[
        :, torch.arange(size_n).view(-1, 8)[:, torch.tensor(AWQ_ORDER).argsort()].flatten()
    ]
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32).view(1, -1, 1)
    # Distinct bits, so that the sum is their union; int64 keeps the sign bit out of it.
    together = (codes.view(-1, 32 // num_bits, size_n).long() << shifts).sum(1)
    return repack(together.to(torch.int32), torch.empty(0), size_k, size_n, num_bits)


def repack_awq_experts(words: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    return torch.stack([repack_awq(of_one, size_k, size_n, num_bits) for of_one in words])


def dense(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, size_k: int, size_n: int) -> Tensor:
    """What a Marlin kernel makes of repacked words ``(K / 16, N * bits / 2)``, scales ``(G, N)`` and zeros, both in
    Marlin's order: the weight ``(K, N)`` in the scales' dtype."""
    from sglang.srt.layers.quantization.marlin_utils import get_scale_perms

    codes = unpacked(words.reshape(size_k * bits // 32, size_n).t().contiguous(), bits).t().float()
    groups = scales.shape[0]
    many, single = get_scale_perms()
    order = torch.arange(groups * size_n)
    per_group = torch.empty(groups * size_n)
    one_row = many if groups > 1 else single
    per_group[order.view(-1, len(one_row))[:, one_row].flatten()] = scales.float().flatten()
    zero = torch.full((groups * size_n,), float(2 ** (bits - 1)))
    if zeros is not None and zeros.numel():
        if bits != 4:
            raise NotImplementedError(f"stand-in: Marlin has no kernel for asymmetric {bits} bits (marlin_utils.py:93)")
        interleaved = order.view(-1, len(many))[:, many].reshape(-1, 8)[:, list(AWQ_ORDER)].flatten()
        zero[interleaved] = unpacked(zeros, bits).float().flatten()
    grouped = codes.view(groups, -1, size_n)
    weight = (grouped - zero.view(groups, 1, size_n)) * per_group.view(groups, 1, size_n)
    return weight.view(size_k, size_n).to(scales.dtype)


def gemm(
    a: Tensor,
    c: Any,
    words: Tensor,
    scales: Tensor,
    global_scale: Any,
    zeros: Tensor,
    g_idx: Tensor,
    perm: Tensor,
    workspace: Tensor,
    wtype: Any,
    size_m: int,
    size_n: int,
    size_k: int,
    **_: Any,
) -> Tensor:
    """Instead of gptq_marlin_gemm: ``(M, K)`` -> ``(M, N)``."""
    if g_idx.numel() or perm.numel():
        raise NotImplementedError("act-order is not stood in for")
    return a @ dense(words, scales, zeros, wtype.size_bits, size_k, size_n).to(a.dtype)


def run_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    gating_output: Any,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *_: Any,
    w1_zeros: Tensor | None = None,
    w2_zeros: Tensor | None = None,
    num_bits: int = 8,
    **__: Any,
) -> Tensor:
    """Instead of fused_marlin_moe: gate and up in one matrix, gate first, as SGLang has it."""
    x, size = hidden_states, hidden_states.shape[1]
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        first, last = [None if zeros is None else zeros[expert] for zeros in (w1_zeros, w2_zeros)]
        merged = dense(w1[expert], w1_scale[expert], first, num_bits, size, w1_scale.shape[2]).to(x.dtype)
        down = dense(w2[expert], w2_scale[expert], last, num_bits, w1_scale.shape[2] // 2, size).to(x.dtype)
        gate, up = (x[rows] @ merged).chunk(2, dim=-1)
        product = (torch.nn.functional.silu(gate) * up) @ down
        out.index_add_(0, rows, product.float() * topk_weights[rows, slots, None].float())
    return out.to(x.dtype)


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Instead of per_token_quant_int8: rows ``(M, K)`` -> int8, and scales ``(M, 1)``; halves away from zero."""
    absmax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scaled = x.float() * (127 / absmax)
    return (scaled.abs() + 0.5).floor().copysign(scaled).to(torch.int8), absmax / 127


def scaled_mm(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out_dtype: torch.dtype, bias: Any = None
) -> Tensor:
    """Instead of int8_scaled_mm: ``(M, K)`` and ``(K, N)`` int8 -> ``(M, N)``; float64 holds the sums exactly."""
    product = (x.double() @ w.double()).float() * x_scale.float() * w_scale.float().view(1, -1)
    return (product if bias is None else product + bias.float()).to(out_dtype)

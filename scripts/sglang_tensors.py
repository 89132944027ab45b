"""What SGLang's parameters hold after loading, against the tensors of the checkpoint: all of them, bit for bit.

SGLang merges q, k, v and gate, up into one parameter each and the experts of a layer into two (``w13``: gate and up,
``w2``: down). From the checkpoint alone it is said here what each parameter must hold, and it is compared with what
the plugin found there between loading and rearranging for the kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = (
    {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)},
    {"w13": ("w1", "w3"), "w2": ("w2",)},  # Mixtral
)
BY_INPUT = ("qweight", "qzeros", "scales")
"""GPTQ's and AWQ's tensors have the outputs last."""
SINGLE = ("g_idx", "weight_shape", "input_scale", "input_zero_point")
"""Not a part per output: SGLang keeps what one of the merged layers says."""
UNUSED = re.compile(r"\.w(13|2)_(weight_)?g_idx(_sort_indices)?$")
"""Made for act-order and empty without it; only GPTQ's checkpoints have tensors for them."""

__all__ = ["compare"]


def compare(checkpoint: Path, loaded: Path) -> dict[str, Any]:
    """How SGLang's parameters and the checkpoint's tensors correspond.

    Returns:
        ``schemes`` (SGLang's class -> layers), ``parameters`` and ``tensors`` (how many were compared), and lists that
        are empty when all is well: ``different`` (parameters holding something else), ``unfilled`` (parameters that no
        tensor is for), ``skipped`` (tensors in no parameter), ``not_given`` (tensors that SGLang never read).
    """
    about = json.loads((loaded / "loaded.json").read_text(encoding="utf-8"))
    found = load_file(loaded / "parameters.safetensors")
    tensors = {
        name: tensor for file in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    used: set[str] = set()
    different, unfilled, compared = [], [], 0
    for name, parameter in found.items():
        choices = expected(name, tensors, used)
        if not choices:
            if not UNUSED.search(name):
                unfilled.append(name)
        elif not any(same(parameter, choice) for choice in choices):
            different.append(f"{name} {tuple(parameter.shape)}, expected {tuple(choices[0].shape)}")
        compared += bool(choices)
    return {
        "model": about["model"],
        "schemes": about["schemes"],
        "parameters": compared,
        "tensors": len(used),
        "different": different,
        "unfilled": unfilled,
        "skipped": sorted(tensors.keys() - used),
        "not_given": sorted(tensors.keys() - set(about["given"])),
    }


def expected(name: str, tensors: Mapping[str, Tensor], used: set[str]) -> list[Tensor]:
    """What the parameter must hold, one of several where SGLang keeps one of several; empty if nothing is for it."""
    layer, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"w(13|2)_(.+)", kind):
        return of_experts(layer, f"w{match[1]}", match[2], tensors, used)
    parent, _, last = layer.rpartition(".")
    sources = [name]
    if name not in tensors and last in MERGED:  # Phi-3's are merged in the checkpoint
        sources = [f"{parent}.{part}.{kind}" for part in MERGED[last]]
    if any(source not in tensors for source in sources):
        return []
    used.update(sources)
    parts = [tensors[source] for source in sources]
    if kind in SINGLE:
        return parts
    return [torch.cat(parts, 1 if kind in BY_INPUT else 0) if parts[0].ndim else parts[0]]


def of_experts(layer: str, matrix: str, kind: str, tensors: Mapping[str, Tensor], used: set[str]) -> list[Tensor]:
    """``(E, ...)`` for ``w13`` or ``w2``; packed experts are stored with the outputs last."""
    experts = []
    names = next((names for names in EXPERTS if f"{layer}.0.{names['w2'][0]}.{kind}" in tensors), None)
    while names is not None and f"{layer}.{len(experts)}.{names['w2'][0]}.{kind}" in tensors:
        sources = [f"{layer}.{len(experts)}.{part}.{kind}" for part in names[matrix]]
        used.update(sources)
        experts.append([tensors[source] for source in sources])
    if not experts:
        return []
    if kind in SINGLE:
        return [torch.stack([parts[i] for parts in experts]) for i in range(len(experts[0]))]
    by_input = kind in BY_INPUT
    merged = torch.stack([torch.cat(parts, 1 if by_input else 0) for parts in experts])
    return [merged if kind == "weight" or by_input else merged.transpose(1, 2)]


def same(parameter: Tensor, tensor: Tensor) -> bool:
    """Bit for bit in the parameter's dtype; a vocabulary may be followed by SGLang's padding."""
    if parameter.numel() == tensor.numel() == 1:
        tensor = tensor.reshape(parameter.shape)
    if parameter.shape[1:] != tensor.shape[1:] or parameter.ndim != tensor.ndim:
        return False
    return torch.equal(parameter[: len(tensor)], tensor.to(parameter.dtype)) and (
        len(parameter) == len(tensor) or not parameter[len(tensor) :].any()
    )

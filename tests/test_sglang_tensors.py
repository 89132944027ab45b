"""scripts/check_sglang's comparison of SGLang's parameters with a checkpoint: right ones pass, every fault is found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

SPEC = importlib.util.spec_from_file_location(
    "sglang_tensors", Path(__file__).parent.parent / "scripts" / "sglang_tensors.py"
)
assert SPEC is not None and SPEC.loader is not None
sglang_tensors = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang_tensors)

FAULTS = ("different", "unfilled", "skipped", "not_given")
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
LATENT, MERGED = "model.layers.1.self_attn", ("q_a_proj", "kv_a_proj_with_mqa")


def checkpoint() -> dict[str, Tensor]:
    """One layer of a packed MoE as lowbit writes it: grouped-query attention, two experts, a norm, and in another layer
    the dense projections of latent attention."""
    draw = torch.Generator().manual_seed(0)
    sizes = {f"{ATTENTION}.{name}": n for name, n in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64))}
    sizes |= {f"{EXPERTS}.{i}.{name}": 64 for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")}
    tensors = {"model.norm.weight": torch.randn(64, generator=draw).bfloat16()}
    tensors |= {f"{LATENT}.{part}.weight": torch.randn(32, 64, generator=draw).bfloat16() for part in MERGED}
    for name, n in sizes.items():
        tensors[f"{name}.weight_packed"] = torch.randint(-(2**31), 2**31, (n, 8), generator=draw, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.rand(n, 2, generator=draw).bfloat16()
        tensors[f"{name}.weight_shape"] = torch.tensor([n, 64])
    return tensors


def parameters(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """What SGLang makes of it: q, k, v one below the other; experts stacked, gate before up, inputs first."""
    filled = {"model.norm.weight": of["model.norm.weight"].half()}
    filled[f"{LATENT}.fused_qkv_a_proj_with_mqa.weight"] = torch.cat([of[f"{LATENT}.{part}.weight"] for part in MERGED])
    for kind in ("weight_packed", "weight_scale", "weight_shape"):
        q, k, v = (of[f"{ATTENTION}.{part}_proj.{kind}"] for part in "qkv")
        filled[f"{ATTENTION}.qkv_proj.{kind}"] = v if kind == "weight_shape" else torch.cat([q, k, v])
        filled[f"{ATTENTION}.o_proj.{kind}"] = of[f"{ATTENTION}.o_proj.{kind}"]
        gate, up, down = (
            torch.stack([of[f"{EXPERTS}.{i}.{part}_proj.{kind}"] for i in (0, 1)]) for part in ("gate", "up", "down")
        )
        shapes = kind == "weight_shape"
        filled[f"{EXPERTS}.w13_{kind}"] = up.float() if shapes else torch.cat([gate, up], 1).transpose(1, 2)
        filled[f"{EXPERTS}.w2_{kind}"] = down.float() if shapes else down.transpose(1, 2)
    filled[f"{EXPERTS}.w2_weight_g_idx"] = torch.zeros(2, 64, dtype=torch.int32)
    return {name: tensor.half() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in filled.items()}


def compared(folder: Path, tensors: dict[str, Tensor], filled: dict[str, Tensor], given: list[str]) -> dict[str, Any]:
    (folder / "loaded").mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    kept = {name: tensor.contiguous() for name, tensor in filled.items()}
    save_file(kept, folder / "loaded" / "parameters.safetensors")
    about = {"given": given, "schemes": {"CompressedTensorsWNA16": 2}, "model": "Qwen3MoeForCausalLM"}
    (folder / "loaded" / "loaded.json").write_text(json.dumps(about), encoding="utf-8")
    return sglang_tensors.compare(folder, folder / "loaded")


def test_merged_parameters_that_hold_the_checkpoint(tmp_path: Path) -> None:
    tensors = checkpoint()
    found = compared(tmp_path, tensors, parameters(tensors), list(tensors))
    assert {fault: found[fault] for fault in FAULTS} == {fault: [] for fault in FAULTS}
    assert (found["tensors"], found["parameters"]) == (len(tensors), 14) == (33, 14)


@pytest.mark.parametrize("name", [f"{ATTENTION}.qkv_proj.weight_packed", f"{EXPERTS}.w13_weight_scale"])
def test_one_wrong_number_is_found(name: str, tmp_path: Path) -> None:
    tensors = checkpoint()
    filled = {key: tensor.contiguous().clone() for key, tensor in parameters(tensors).items()}
    filled[name].view(-1)[-1] += 1
    assert [line.split()[0] for line in compared(tmp_path, tensors, filled, list(tensors))["different"]] == [name]


def test_gate_and_up_exchanged_are_found(tmp_path: Path) -> None:
    tensors = checkpoint()
    filled = parameters(tensors)
    name = f"{EXPERTS}.w13_weight_packed"
    filled[name] = filled[name].roll(64, dims=2)
    assert [line.split()[0] for line in compared(tmp_path, tensors, filled, list(tensors))["different"]] == [name]


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    """A layer that SGLang takes for dense: its parameter is filled by nothing, our tensors go nowhere."""
    tensors = checkpoint()
    filled = {name: tensor for name, tensor in parameters(tensors).items() if ".o_proj." not in name}
    filled[f"{ATTENTION}.o_proj.weight"] = torch.full((64, 64), torch.nan)
    unread = "model.norm.weight"
    found = compared(tmp_path, tensors, filled, [name for name in tensors if name != unread])
    assert found["unfilled"] == [f"{ATTENTION}.o_proj.weight"] and found["not_given"] == [unread]
    assert found["skipped"] == [f"{ATTENTION}.o_proj.weight_{kind}" for kind in ("packed", "scale", "shape")]
    assert found["different"] == []

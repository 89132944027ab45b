"""What chooses the experts of a mixture is never quantized, wherever an architecture puts it; what is beside it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lowbit import QuantSpec, quantize
from lowbit.checkpoint import read_checkpoint
from lowbit.facts import of_latent_attention
from lowbit.linearize import plan_linearized
from lowbit.plan import Plan, make_plan
from merged_experts import Merged
from tiny_models import BOOKS_4M

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

W4 = QuantSpec(4, -1)
REASON = "router of a mixture of experts, kept in the model's dtype"
_TOKENS: dict[str, Any] = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _zaya() -> Any:
    if not hasattr(transformers, "ZayaConfig"):
        pytest.skip("this transformers has no Zaya")
    return transformers.ZayaConfig(**_COMMON, num_experts=4)


ROUTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "afmoe": (lambda: transformers.AfmoeConfig(**_COMMON, **_FOUR, num_dense_layers=1), r"\.mlp\.router\.gate$"),
    "hunyuan": (
        lambda: transformers.HunYuanMoEV1Config(**_COMMON, num_experts=4, moe_topk=2),
        r"\.mlp\.gate\.wg$",
    ),
    "longcat": (  # experts that stay merged, and two that are no weights: six outputs
        lambda: transformers.LongcatFlashConfig(
            **{**_COMMON, **_LATENT, "num_key_value_heads": 4}, num_layers=2, expert_ffn_hidden_size=64,
            ffn_hidden_size=128, moe_topk=2, n_routed_experts=4, zero_expert_num=2,
        ),
        r"\.mlp\.router\.classifier$",
    ),
    "jetmoe": (  # experts in the attention too
        lambda: transformers.JetMoeConfig(
            **{k: v for k, v in _COMMON.items() if k != "head_dim"}, num_local_experts=4, num_experts_per_tok=2,
            kv_channels=16,
        ),
        r"\.(mlp|self_attention\.experts)\.router\.layer$",
    ),
    "qwen2_moe": (  # and what weighs the shared expert
        lambda: transformers.Qwen2MoeConfig(**_COMMON, **_FOUR, shared_expert_intermediate_size=64),
        r"\.mlp\.shared_expert_gate$",
    ),
    # a router of several layers, which has one output more than there are experts
    "zaya": (_zaya, r"\.mlp\.gate\.(down_proj|router_mlp\.(fc1|fc2|out_proj))$"),
}  # fmt: skip


def routers_of(plan: Plan) -> set[str]:
    return {weight.name.removesuffix(".weight") for weight in plan.skipped if weight.reason == REASON}


@pytest.mark.parametrize("name", ROUTERS)
def test_linears_of_a_router_are_left_with_the_reason(name: str) -> None:
    config, pattern = ROUTERS[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    routers = {n for n in linears if re.search(pattern, n)}
    plan = plan_linearized(model, W4, (), in_blocks=True, allow_partial=True)
    assert routers and routers_of(plan) == routers
    latent = {n for n in linears if of_latent_attention(n, linears, True)}
    assert linears - routers - latent <= set(plan.targets), "shared experts and attention are quantized"


def test_the_folder_holds_the_router_as_it_was(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(ROUTERS["afmoe"][0]())
    model.save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / file, tmp_path / "dense" / file)
    report = quantize(
        tmp_path / "dense", tmp_path / "out", 4, group_size=32, method="rtn", allow_partial=True, verbose=False
    )
    router = "model.layers.1.mlp.router.gate"
    assert f"{router}.weight" in report.summary() and REASON in report.summary()
    checkpoint = read_checkpoint(tmp_path / "out")
    assert router not in checkpoint.linears
    assert torch.equal(checkpoint.tensor(f"{router}.weight"), model.get_parameter(f"{router}.weight"))
    assert router in checkpoint.config["quantization_config"]["ignore"], "as engines must know"


# --- by what a router is known


class Choice(nn.Module):
    """A router of a name nobody knows."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.logits = nn.Linear(64, outputs)


def block(**children: nn.Module) -> nn.Module:
    inner = nn.Module()
    for name, child in children.items():
        inner.add_module(name, child)
    return nn.Sequential(inner)


def routers_among(**children: nn.Module) -> set[str]:
    return routers_of(plan_linearized(block(**children), W4, (), in_blocks=False, allow_partial=True))


def single_experts(count: int) -> nn.ModuleList:
    """As models' own code often has them: nothing is merged."""
    return nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in range(count))


@pytest.mark.parametrize("experts", [Merged, lambda: single_experts(5)], ids=["merged", "list"])
def test_it_gives_one_number_per_expert(experts: Callable[[], nn.Module]) -> None:
    assert routers_among(experts=experts(), choice=Choice(5)) == {"0.choice.logits"}
    assert routers_among(experts=experts(), choice=Choice(6)) == set()
    assert routers_among(others=nn.ModuleList([nn.Linear(64, 64)] * 5), choice=Choice(5)) == set(), "no experts here"


@pytest.mark.parametrize("name", ["gate", "router", "image_router"])
def test_or_is_called_one(name: str) -> None:
    assert routers_among(experts=single_experts(5), **{name: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 6))}) == {
        f"0.{name}.0", f"0.{name}.1",
    }  # fmt: skip
    assert routers_among(mlp=single_experts(5), **{name: nn.Linear(64, 64)}) == set(), "a gate of something else"


def test_a_linear_among_others_is_none_by_its_size() -> None:
    """Gemma 4 has attention and experts side by side: a projection may have as many rows as there are experts."""
    attention = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(64, 64))
    assert routers_among(experts=Merged(), attention=attention) == set()


def test_experts_are_no_routers_of_each_other() -> None:
    """Neither their own projections, called gates or not, nor shared ones, nor what a model called Experts holds."""

    class SomeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 64)
            self.choice = nn.Linear(64, 5)

    plan = make_plan(SomeExperts(), None, W4)
    assert set(plan.targets) == {"gate", "choice"}
    shared = nn.ModuleDict({"gate_proj": nn.Linear(64, 96), "down_proj": nn.Linear(96, 64)})
    assert routers_among(experts=single_experts(5), shared_experts=shared) == set()
    gated = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(64, 96), "up": nn.Linear(64, 96)}) for _ in range(5))
    assert routers_among(experts=gated) == set()

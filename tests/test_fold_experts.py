"""Folds into mixtures of experts: who takes part in them, and that they change no output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from architectures import logits, tiny, tokens
from lowbit.fold import apply_fold, exact_folds
from lowbit.linearize import linearize
from lowbit.mappings import Fold, reasons_without_fold, resolve
from lowbit.mixture import find_mixture
from lowbit.walk import capture_block_inputs, find_blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

EXPERTS = tuple(f"mlp.experts.{e}.{part}" for e in range(4) for part in ("gate_proj", "up_proj"))


def shared(name: str) -> tuple[str, ...]:
    return tuple(f"mlp.{name}.{part}" for part in ("gate_proj", "up_proj"))


READERS = {
    "mixtral": (EXPERTS, ("mlp.gate",)),
    "qwen3_moe": (EXPERTS, ("mlp.gate",)),
    "olmoe": (EXPERTS, ("mlp.gate",)),
    "deepseek_v3": ((*EXPERTS, *shared("shared_experts")), ("mlp.gate",)),
    "qwen2_moe": ((*EXPERTS, *shared("shared_expert")), ("mlp.gate", "mlp.shared_expert_gate")),
    "phimoe": (EXPERTS, ("mlp.router",)),
    "gpt_oss": (EXPERTS, ("mlp.router",)),
}
PROPORTIONAL = [name for name in READERS if name != "gpt_oss"]


def model_of(name: str) -> Any:
    """Of single experts, in float64, with norms and biases that are random too."""
    model = tiny(name).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    linearize(model)
    return model


def blocks_of(model: Any) -> list[nn.Module]:
    return [block.module for block in find_blocks(model)]


def folds_of(block: nn.Module) -> list[Fold]:
    """Those of its experts."""
    return [fold for fold in resolve(block) if fold.others or "mlp" in fold.smooth]


def random_scales(block: nn.Module, fold: Fold, seed: int) -> torch.Tensor:
    """Between 1/3 and 3."""
    k = block.get_submodule(fold.balance[0]).in_features
    return 3 ** (2 * torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1)


@pytest.mark.parametrize("name", READERS)
def test_the_norm_scales_every_expert_and_the_router(name: str) -> None:
    block = blocks_of(model_of(name))[-1]
    (into,) = [fold for fold in resolve(block) if fold.others]
    assert into.smooth == "post_attention_layernorm"
    assert (into.balance, into.others) == READERS[name]


@pytest.mark.parametrize("name", READERS)
def test_every_up_projection_scales_its_own_down_projection_where_it_may(name: str) -> None:
    block = blocks_of(model_of(name))[-1]
    pairs = [(fold.smooth, fold.balance) for fold in folds_of(block) if not fold.others]
    if name in PROPORTIONAL:
        ups = [reader for reader in READERS[name][0] if reader.endswith("up_proj")]
        assert pairs == [(up, (up.replace("up_proj", "down_proj"),)) for up in ups]
    else:
        assert pairs == []
        reasons = reasons_without_fold(block)
        for e in range(4):
            assert "not proportional to the up projection" in reasons[f"mlp.experts.{e}.down_proj"]


@pytest.mark.parametrize("name", READERS)
def test_folding_every_expert_leaves_the_models_logits_unchanged(name: str) -> None:
    """In float64; norms, softmaxes and routers compute in float32 whatever the model's dtype: eps32 per operation."""
    model, ids = model_of(name), tokens()
    before = logits(model, ids).double()
    count = 0
    for block in blocks_of(model):
        for seed, fold in enumerate(folds_of(block)):
            apply_fold(block, fold, random_scales(block, fold, seed))
            count += 1
    assert count >= (6 if name in PROPORTIONAL else 2)
    change = (logits(model, ids).double() - before).norm() / before.norm()
    assert change < 32 * torch.finfo(torch.float32).eps


@pytest.fixture
def call() -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """A mixture's block in float64, and the arguments of a real call."""
    model = model_of("qwen2_moe")
    blocks = find_blocks(model)
    caught = capture_block_inputs(model, blocks, [tokens()])
    args, kwargs = caught.arguments[0][0]
    yield blocks[0].module, ((caught.hidden[0], *args), kwargs)


def test_forgetting_a_reader_is_found_and_costs_only_its_own_fold(call: Any) -> None:
    block, (args, kwargs) = call
    folds = resolve(block)
    into = next(fold for fold in folds if fold.others)
    wrong = [
        replace(into, others=into.others[:1]),  # not the gate of the shared expert
        replace(into, others=into.others[1:]),  # not the router
        replace(into, balance=into.balance[:-2]),  # not the shared expert
        Fold("mlp.experts.1.gate_proj", ("mlp.experts.1.down_proj",), rows=tuple(range(64))),  # through the activation
    ]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    mixed = [*wrong[:2], *folds, *wrong[2:]]
    good, bad = exact_folds(block, mixed, args, kwargs)
    assert (good, bad) == (folds, wrong)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


class Doubled(nn.Module):
    """Reads the experts' input and is no router: two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 4)


def test_an_unknown_part_beside_the_experts_takes_their_fold_away() -> None:
    block = blocks_of(model_of("qwen3_moe"))[0]
    block.mlp.novelty = Doubled()
    assert not [fold for fold in resolve(block) if fold.others]
    assert reasons_without_fold(block)["mlp.experts.0.up_proj"] == "unknown parts ['novelty'] beside the experts"
    assert [fold.smooth for fold in folds_of(block)] == [f"mlp.experts.{e}.up_proj" for e in range(4)]


def test_experts_that_are_still_merged_are_no_mixture() -> None:
    block = blocks_of(tiny("mixtral"))[0]
    assert find_mixture(block) is None
    assert not folds_of(block)

"""The plan names every weight matrix, gives a reason for each that stays, and refuses what cannot work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.plan import MIN_COVERAGE, make_plan
from lowbit.spec import QuantSpec
from lowbit.walk import find_blocks
from tiny_models import ALL_LINEARS, FAMILIES, tiny_model

W4 = QuantSpec(4, 32)
families = pytest.mark.parametrize("family", FAMILIES)


class Experts(nn.Module):
    """Merged experts, as in mixtures of experts: one 3-D parameter."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, size, 32))


class Conv1D(nn.Module):
    """GPT-2's linear: its weight lies transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))


class Scaled(nn.Linear):
    """A linear with a forward of its own that computes the same."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Router(nn.Linear):
    """A linear only by name: it returns the chosen experts as well."""

    def forward(self, x):
        return super().forward(x).topk(2)


def reasons(plan):
    return {weight.name: weight.reason for weight in plan.skipped}


def matrices(model):
    """Every name of a parameter of two or more dimensions, tied ones under each of theirs."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}


# --- every weight is either a target or skipped with a reason


@families
@pytest.mark.parametrize("as_blocks", [True, False])
def test_every_matrix_is_a_target_or_has_a_reason(family, as_blocks):
    model = tiny_model(family)
    plan = make_plan(model, find_blocks(model) if as_blocks else None, W4)
    targets = [f"{name}.weight" for name in plan.targets]
    assert sorted(targets + list(reasons(plan))) == sorted(matrices(model))
    assert len(targets) == 2 * ALL_LINEARS[family] and plan.coverage == 1.0
    assert all(type(model.get_submodule(name)) is nn.Linear for name in plan.targets)
    assert all(weight.reason and weight.shape == model.get_parameter(weight.name).shape for weight in plan.skipped)


@pytest.mark.parametrize("as_blocks", [True, False])
def test_embeddings_and_the_output_head_stay_and_say_why(as_blocks):
    untied, tied = tiny_model("llama"), tiny_model("gemma3")
    plan = make_plan(untied, find_blocks(untied) if as_blocks else None, W4)
    assert reasons(plan) == {
        "model.embed_tokens.weight": "embedding, kept in the model's dtype",
        "lm_head.weight": "outside the decoder blocks, kept in the model's dtype",
    }
    plan = make_plan(tied, find_blocks(tied) if as_blocks else None, W4)
    assert reasons(plan)["lm_head.weight"] == "the same weight as model.embed_tokens.weight"


def test_targets_come_in_model_order():
    model = tiny_model("llama")
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert list(make_plan(model, find_blocks(model), W4).targets) == order


def test_vectors_are_not_weights_to_account_for():
    plan = make_plan(nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8)), None, W4)
    assert (plan.targets, plan.skipped) == (("0",), ())


# --- coverage


def test_coverage_is_the_share_of_the_decoders_elements():
    """Embeddings count on neither side; 64 * 32 of (64 + 4 * 2) * 32 is 8/9."""
    model = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 64), Experts(2))
    plan = make_plan(model, None, W4, allow_partial=True)
    assert plan.coverage == pytest.approx(8 / 9, abs=1e-12)
    assert plan.targets == ("1",)
    assert reasons(plan)["2.weight"] == "3-D parameter of Experts: only nn.Linear weights are quantized"


def test_coverage_below_the_limit_is_refused_with_what_is_not_covered():
    model = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 64), Experts(2))
    with pytest.raises(ValueError) as caught:
        make_plan(model, None, W4)
    message = str(caught.value)
    assert message.startswith("only 88.9% of the decoder's weights would be quantized, at least 90% is expected")
    assert "2.weight [4, 2, 32] (3-D parameter of Experts" in message and "--allow-partial" in message
    assert "Embedding" not in message and "embedding" not in message, "what is not counted is not to blame"


def test_coverage_at_the_limit_is_enough():
    model = nn.Sequential(nn.Linear(32, 36), Experts(1))
    assert make_plan(model, None, W4).coverage == MIN_COVERAGE == 0.9


def test_a_weight_of_another_layout_is_never_taken_for_a_linear():
    model = nn.Sequential(Conv1D(), nn.Linear(32, 64))
    plan = make_plan(model, None, W4, allow_partial=True)
    assert plan.targets == ("1",) and plan.coverage == 0.5
    assert reasons(plan) == {"0.weight": "2-D parameter of Conv1D: only nn.Linear weights are quantized"}


def test_nothing_to_quantize_is_refused_even_where_partial_coverage_is_allowed():
    with pytest.raises(ValueError, match=r"Sequential has no linear weight to quantize; left out: 0.weight \[32, 64\]"):
        make_plan(nn.Sequential(Conv1D()), None, W4, allow_partial=True)
    with pytest.raises(ValueError, match=r"Sequential has no linear weight .* it has no weight matrices"):
        make_plan(nn.Sequential(), None, W4)


# --- linears that cannot be replaced


def test_a_shared_weight_stays_because_one_of_its_places_would_be_missed():
    shared, tied = nn.Linear(32, 32), nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.Linear(32, 32), shared, tied, nn.Linear(32, 32))
    model[4].weight = tied.weight
    plan = make_plan(model, None, W4, allow_partial=True)
    assert plan.targets == ("1",) and plan.coverage == pytest.approx(1 / 3)
    assert reasons(plan) == {
        "0.weight": "shared with 2.weight",
        "2.weight": "the same weight as 0.weight",
        "3.weight": "shared with 4.weight",
        "4.weight": "the same weight as 3.weight",
    }


def test_the_weights_that_torchs_attention_reads_itself_stay():
    model = nn.Sequential(nn.TransformerDecoderLayer(32, 4, 64), nn.Linear(32, 512))
    plan = make_plan(model, None, W4, allow_partial=True)
    assert plan.targets == ("0.linear1", "0.linear2", "1")
    assert reasons(plan)["0.self_attn.out_proj.weight"].startswith("MultiheadAttention reads this weight itself")


def test_a_model_that_is_a_linear_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match=r"the model itself is an nn.Linear"):
        make_plan(nn.Linear(32, 32), None, W4)


def test_subclasses_of_linear_are_judged_by_what_they_compute():
    plan = make_plan(nn.Sequential(Scaled(32, 512), Router(32, 4)), None, W4)
    assert plan.targets == ("0",)
    assert reasons(plan) == {"1.weight": "Router computes something else than an nn.Linear"}


# --- ignore


def test_ignore_is_searched_for_in_module_names():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    plan = make_plan(model, blocks, W4, [r"k_proj", r"^model\.layers\.1\.mlp\.down_proj$"], allow_partial=True)
    left = {name.removesuffix(".weight"): reason for name, reason in reasons(plan).items() if "ignore" in reason}
    assert left == {
        "model.layers.0.self_attn.k_proj": "matches ignore 'k_proj'",
        "model.layers.1.self_attn.k_proj": "matches ignore 'k_proj'",
        "model.layers.1.mlp.down_proj": r"matches ignore '^model\\.layers\\.1\\.mlp\\.down_proj$'",
    }
    assert not set(left) & set(plan.targets)
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert plan.coverage == pytest.approx(1 - (2 * 32 * 64 + 64 * 128) / (2 * block))


def test_ignore_reaches_the_coverage_limit():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"only 33.3% .* \(matches ignore 'mlp'\)"):
        make_plan(model, find_blocks(model), W4, ["mlp"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_output_head_may_be_named_in_ignore_whether_tied_or_not(family):
    model = tiny_model(family)
    plan = make_plan(model, find_blocks(model), W4, ["lm_head"])
    assert plan.coverage == 1.0 and "lm_head.weight" in reasons(plan)


def test_an_ignore_that_matches_nothing_is_refused_with_an_example():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"'kproj' matches no weight .* like 'model.layers.0.self_attn.q_proj'"):
        make_plan(model, find_blocks(model), W4, ["lm_head", "kproj"])


def test_an_ignore_that_is_no_regular_expression_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"ignore '\(q_proj' is not a regular expression: missing \)"):
        make_plan(model, find_blocks(model), W4, ["(q_proj"])


# --- group sizes and values


def test_a_group_size_that_does_not_divide_names_each_layer_its_k_and_what_would_work():
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 128), nn.Linear(128, 40), nn.Linear(40, 8))
    with pytest.raises(ValueError) as caught:
        make_plan(model, None, QuantSpec(4, 64))
    assert str(caught.value).splitlines() == [
        "0: group_size 64 does not divide K = 96; group sizes that would work: [32, -1]",
        "  3: group_size 64 does not divide K = 40; group sizes that would work: [-1]",
        "  choose another group size, or leave these layers out with ignore",
    ]
    assert make_plan(model, None, QuantSpec(4, -1)).coverage == 1.0
    assert make_plan(model, None, QuantSpec(4, 64), ["0", "3"], allow_partial=True).targets == ("1", "2")


def test_more_than_five_such_layers_are_counted():
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(8)))
    with pytest.raises(ValueError, match=r"4: group_size 128 does not divide K = 96.*\n  and 3 more\n"):
        make_plan(model, None, QuantSpec(4, 128))


def test_layers_outside_the_blocks_may_have_any_k():
    model = tiny_model("llama")
    model.lm_head = nn.Linear(63, 128)
    assert make_plan(model, find_blocks(model), W4).coverage == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_is_refused_wherever_it_is(name, value):
    model = tiny_model("llama")
    model.get_parameter(name).data.view(-1)[7] = value
    with pytest.raises(ValueError, match=rf"^{name} contains NaN or infinite values"):
        make_plan(model, find_blocks(model), W4)


def test_planning_changes_nothing():
    model = tiny_model("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plan(model, find_blocks(model), W4, ["fc1"], allow_partial=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

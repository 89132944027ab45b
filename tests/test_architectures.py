"""Every architecture lowbit promises: quantized, written, loaded packed, compared, saved again, generating."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from architectures import ARCHITECTURES, exercise, logits, tiny, tokens
from lowbit import QuantSpec, quantize_
from lowbit.experts import Experts, separate
from lowbit.linearize import linearize, settle

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

ROOT = Path(__file__).parent.parent

# fp32 products summed in another order: 2**-24 per operation, over K of at most 256 and a few layers
CLOSE = 2e-5


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_survives_the_whole_way(name, method, tmp_path):
    outcome = exercise(name, method, tmp_path)
    assert outcome.error < CLOSE
    assert outcome.resaved
    assert outcome.generated == (4 if ARCHITECTURES[name].generates else 0)
    latent = [left for left in outcome.left if "latent attention" in left]
    assert len(latent) == (2 * 3 if name in ("deepseek_v3", "glm4_moe_lite") else 0)
    assert outcome.coverage >= (0.9 if latent else 0.99)
    for left in set(outcome.left) - set(latent):
        assert "router" in left.lower() or "embedding" in left, "only routers and tables stay dense inside the blocks"


NAMES_ON_DISK = {
    "gpt2": ("transformer.h.1.attn.c_attn.weight_packed", (192, 8)),  # (N, K / 8): as of an nn.Linear
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.w1.weight_packed", (128, 8)),
    "phimoe": ("model.layers.1.block_sparse_moe.experts.3.w2.weight_packed", (64, 16)),
    "qwen3_moe": ("model.layers.1.mlp.experts.3.gate_proj.weight_packed", (64, 8)),
    "deepseek_v3": ("model.layers.1.mlp.experts.3.down_proj.weight_packed", (64, 32)),
    "gpt_oss": ("model.layers.1.mlp.experts.3.up_proj.weight_packed", (128, 8)),
}


@pytest.mark.parametrize("name", NAMES_ON_DISK)
def test_names_and_shapes_in_the_file(name, tmp_path):
    exercise(name, "rtn", tmp_path)
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="pt") as file:
        key, shape = NAMES_ON_DISK[name]
        keys = list(file.keys())
        assert key in keys
        assert tuple(file.get_slice(key).get_shape()) == shape
        assert not any(k.endswith(("gate_up_proj", "experts.down_proj")) for k in keys)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.experts or n == "gpt2"])
def test_separating_changes_nothing_and_can_be_undone(name):
    model = tiny(name)
    before, names = logits(model, tokens()), set(model.state_dict())
    replaced = linearize(model)
    assert replaced
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-5, atol=1e-5)
    settle(model, replaced, ())
    assert set(model.state_dict()) == names
    assert torch.equal(logits(model, tokens()), before)


def test_a_refused_plan_leaves_the_model_as_it_was():
    model = tiny("mixtral")
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="matches no weight"):
        quantize_(model, QuantSpec(4, 32), ignore=["nothing_like_it"])
    assert set(model.state_dict()) == names


def test_ignored_experts_stay_merged():
    model = tiny("mixtral")
    report = quantize_(model, QuantSpec(4, 32), ignore=[r"layers\.0\.mlp\.experts", "lm_head"], allow_partial=True)
    assert not isinstance(model.model.layers[0].mlp.experts, Experts)
    assert isinstance(model.model.layers[1].mlp.experts, Experts)
    assert report.coverage < 0.9


def test_starved_experts_are_named_with_their_fallback():
    model = tiny("qwen3_moe")
    ids = tokens(1, 8)
    report = quantize_(model, QuantSpec(4, 32), "gptq", calibration=ids, allow_partial=True)
    for layer in report.layers:
        if ".experts." in layer.name:
            if layer.name.endswith("down_proj"):
                assert layer.method == "rtn" and any(note.endswith("rounded to nearest") for note in layer.notes)
            else:
                note = next(n for n in layer.notes if n.startswith("starved expert: "))
                assert note.endswith("the Hessian of all the layer's tokens makes up for the rest")


def test_a_fed_expert_is_calibrated_with_its_own_tokens():
    model = tiny("mixtral")
    report = quantize_(model, QuantSpec(4, 32), "gptq", calibration=tokens(40, 64), allow_partial=True)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 24
    fed = [layer for layer in experts if not any("starved" in note for note in layer.notes)]
    assert len(fed) >= 20
    assert all(layer.method == "gptq" and layer.loss <= layer.rtn_loss for layer in fed)


def test_an_unknown_mixture_is_left_dense_by_name():
    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.ones(2, 64, 64))
            self.proj = torch.nn.Linear(64, 64)

    report = quantize_(model := torch.nn.Sequential(Strange()), QuantSpec(4, 32), allow_partial=True)
    assert [s.name for s in report.skipped] == ["0.experts"]
    with pytest.raises(ValueError, match="Strange cannot be taken apart: it does not describe its experts"):
        separate(model[0])


def test_the_readme_has_the_table_that_was_printed():
    printed = (ROOT / "eval" / "results" / "architectures.md").read_text(encoding="utf-8").split("\n\n", 1)[1].strip()
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")
    assert printed.count("\n") == 1 + len(ARCHITECTURES)

"""Linears that vLLM and SGLang have in the model's dtype, whatever a checkpoint says, stay dense."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lowbit import QuantSpec, load, quantize
from lowbit.checkpoint import read_checkpoint
from lowbit.doctor import diagnose
from lowbit.facts import HELD_DENSE, check_up
from lowbit.limits import engine_limits
from lowbit.linearize import plan_linearized
from packed_folder import edit_config, random_layer, write_tiny
from test_odd_architectures import _DSA
from tiny_models import BOOKS_4M

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

REASON = "vLLM and SGLang have it in the model's dtype, whatever the checkpoint says"
FEW = {"num_hidden_layers": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "vocab_size": 4096, "pad_token_id": 0}
INDEXER = r"\.indexer\.(wk|weights_proj)$"
MODELS = {  # all but the depth and the experts as transformers has them
    "deepseek_v32": (lambda: transformers.DeepseekV32Config(**FEW), INDEXER),
    "glm_moe_dsa": (lambda: transformers.GlmMoeDsaConfig(**FEW), INDEXER),
    "hy_v4": (lambda: transformers.HYV4Config(**FEW), INDEXER),
    "dots3_note": (lambda: transformers.Dots3NoteConfig(**FEW), INDEXER),
    "deepseek_v4": (
        lambda: transformers.DeepseekV4Config(**FEW),
        r"\.compressor\.((indexer\.)?(kv|gate)_proj|indexer\.scorer\.weights_proj)$",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_they_stay_dense_with_the_reason_and_all_others_are_packed(name: str) -> None:
    config, pattern = MODELS[name]
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    held = {n for n in linears if re.search(pattern, n)}
    plan = plan_linearized(model, QuantSpec(4, 32), (), in_blocks=True, allow_partial=True)
    skipped = {weight.name.removesuffix(".weight") for weight in plan.skipped if weight.reason == REASON}
    assert held and skipped == held
    assert {n for n in linears - held if "indexer" in n} <= set(plan.targets), "the indexer's queries are quantized"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dsa") / "source"
    torch.manual_seed(0)
    config = transformers.GlmMoeDsaConfig(**{**_DSA, "vocab_size": 4096})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / file, folder / file)
    return folder


def test_the_folder_holds_them_as_they_were_and_lists_them(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", 4, group_size=32, method="rtn", allow_partial=True, verbose=False)
    assert REASON in report.summary()
    before, after = read_checkpoint(tmp_path / "out"), transformers.AutoModelForCausalLM.from_pretrained(source)
    held = [name for name, _ in after.named_modules() if HELD_DENSE.search(name)]
    assert len(held) == 2 * 2, "two in each layer"
    for name in held:
        assert name not in before.linears and name in before.config["quantization_config"]["ignore"]
        assert torch.equal(before.tensor(f"{name}.weight"), after.get_parameter(f"{name}.weight"))
    assert check_up(tmp_path / "out").packed_held_dense == ()


def test_int8_runs_where_a_block_casts_to_the_weights_dtype(source: Path, tmp_path: Path) -> None:
    """GLM's indexer casts its input to the dtype of weights_proj: integers, were that packed."""
    quantize(source, tmp_path / "out", 8, activations="int8", method="rtn", allow_partial=True, verbose=False)
    model, _ = load(tmp_path / "out", device="cpu")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, expected = model(tokens).logits.float(), dense(tokens).logits.float()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_folder_that_packs_them_is_known(tmp_path: Path) -> None:
    """As other tools write it, and lowbit did."""
    layer = random_layer(128, 128, QuantSpec(4, 32, True))
    names = ["model.layers.0.self_attn.indexer.weights_proj", "model.layers.0.self_attn.o_proj"]
    folder = write_tiny(tmp_path / "dsa", dict.fromkeys(names, layer))
    edit_config(folder, lambda config: config.update(model_type="glm_moe_dsa"))
    assert check_up(folder).packed_held_dense == (names[0],)
    found = {answer.engine: answer for answer in diagnose(folder).answers if answer.device == "sm_90"}
    assert (found["vllm"].verdict, found["sglang"].verdict) == ("refused", "wrong")
    assert found["vllm"].fixes[0].startswith("lowbit quantize ORIGINAL OUT"), "converting would keep them packed"


@pytest.mark.parametrize(
    ("model_type", "engine"),
    [("jamba", "vLLM"), ("falcon_mamba", "vLLM"), ("glm5_next", "vLLM"), ("olmo", "SGLang"), ("stablelm", "SGLang")],
)
def test_architectures_that_an_engine_never_opens_packed_are_announced(model_type: str, engine: str) -> None:
    (note,) = engine_limits(model_type, experts=False)
    assert note.startswith(f"not for {engine}") and "do not open it" in note


@pytest.mark.parametrize(
    "name", ["q_proj", "indexer.wq_b", "self_attn.kv_proj", "mlp.gate_proj", "indexer.wk_norm", "w.indexer", "wk"]
)
def test_other_names_are_packed(name: str) -> None:
    assert not HELD_DENSE.search(f"model.layers.0.{name}")

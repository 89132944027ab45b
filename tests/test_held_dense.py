"""Linears that vLLM and SGLang have in the model's dtype, whatever a checkpoint says, stay dense."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lowbit import QuantSpec, convert, load, quantize
from lowbit.checkpoint import read_checkpoint
from lowbit.doctor import diagnose
from lowbit.facts import HELD_DENSE, check_up, of_latent_attention
from lowbit.limits import engine_limits
from lowbit.linearize import plan_linearized
from lowbit.pack_config import quantization_config
from packed_folder import edit_config, edit_tensors, random_layer, write_tiny
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
    [
        ("jamba", "vLLM"),
        ("falcon_mamba", "vLLM"),
        ("glm5_next", "vLLM"),
        ("olmo", "SGLang"),
        ("stablelm", "SGLang"),
        ("seed_oss", "SGLang"),
    ],
)
def test_architectures_that_an_engine_never_opens_packed_are_announced(model_type: str, engine: str) -> None:
    (note,) = engine_limits(model_type, experts=False)
    assert note.startswith(f"not for {engine}") and "do not open it" in note


@pytest.mark.parametrize(
    "name", ["q_proj", "indexer.wq_b", "self_attn.kv_proj", "mlp.gate_proj", "indexer.wk_norm", "w.indexer", "wk"]
)
def test_other_names_are_packed(name: str) -> None:
    assert not HELD_DENSE.search(f"model.layers.0.{name}")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("qwen3_5_text", r"\.linear_attn\.in_proj_[ab]$"),
        ("qwen3_next", r"\.linear_attn\.in_proj_ba$"),
        ("olmo_hybrid", r"\.linear_attn\.[ab]_proj$"),
    ],
)
def test_gates_of_linear_attention_stay_dense(name: str, pattern: str) -> None:
    """They have an output per head, and SGLang's kernel wants 64 of them."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = transformers.CONFIG_MAPPING[name](num_hidden_layers=4, vocab_size=4096, pad_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    gates = {n for n in linears if re.search(pattern, n)}
    plan = plan_linearized(model, QuantSpec(4, 128), (), in_blocks=True, allow_partial=False)
    left = {w.name.removesuffix(".weight") for w in plan.skipped if w.reason.startswith("gate of linear attention")}
    assert gates and left == gates
    assert {n for n in linears if "linear_attn" in n} - gates <= set(plan.targets)
    assert all(linears[n].out_features % 64 == 0 for n in set(plan.targets) & linears.keys())


# --- latent attention -------------------------------------------------------------------------------------------------

FUSED = "fused_qkv_a_proj_with_mqa"
TO_LATENT = {"q_a_proj", "kv_a_proj_with_mqa"}


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("DeepseekV3Config", {}, {*TO_LATENT, "kv_b_proj"}),
        ("Glm4MoeLiteConfig", {}, {*TO_LATENT, "kv_b_proj"}),
        (
            "DeepseekV2Config",
            {"q_lora_rank": None, "moe_intermediate_size": 1408},
            {"kv_b_proj"},
        ),  # V2-Lite: nothing to merge kv_a_proj with
        ("MiniCPM3Config", {}, {"kv_b_proj"}),  # no mixture
    ],
)
def test_of_latent_attention_stays_dense_what_sglang_opens_no_other_way(name, fields, expected) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)(**{**FEW, "n_routed_experts": 64, **fields})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = plan_linearized(model, QuantSpec(4, 32), (), in_blocks=True, allow_partial=False)
    skipped = [weight.name.split(".")[-2] for weight in plan.skipped if weight.reason.startswith("latent attention")]
    assert sorted(skipped) == sorted([*expected] * FEW["num_hidden_layers"])
    packed = {target.rpartition(".")[2] for target in plan.targets}
    assert packed >= {"o_proj", *TO_LATENT & {n.rpartition(".")[2] for n, _ in model.named_modules()} - expected}


def latent_folder(folder: Path, dense: set[str], expert: bool = True) -> Path:
    """One attention and an expert; q_a, kv_a and kv_b are packed but those of ``dense``."""
    layer = random_layer(128, 128, QuantSpec(4, 32, True))
    attention = {f"model.layers.0.self_attn.{name}" for name in {*TO_LATENT, "kv_b_proj", "o_proj"} - dense}
    experts = {"model.layers.0.mlp.experts.0.up_proj"} if expert else set()
    write_tiny(folder, dict.fromkeys(sorted(attention | experts), layer))
    matrices = {f"model.layers.0.self_attn.{name}.weight": torch.ones(128, 128) for name in dense}
    edit_tensors(folder, lambda tensors: tensors.update(matrices))
    names = [name.removesuffix(".weight") for name in matrices]
    edit_config(folder, lambda config: config["quantization_config"]["ignore"].extend(names))
    return folder


@pytest.mark.parametrize("dense", [set(), TO_LATENT, {"kv_b_proj"}], ids=["all packed", "kv_b packed", "a packed"])
def test_a_folder_that_packs_it_is_known(tmp_path: Path, dense: set[str]) -> None:
    """As lowbit wrote it; SGLang asks kv_b_proj for its weight, and cannot merge two weight_shape."""
    folder = latent_folder(tmp_path / "in", dense)
    assert {name.rpartition(".")[2] for name in check_up(folder).packed_latent} == {*TO_LATENT, "kv_b_proj"} - dense
    found = {answer.engine: answer for answer in diagnose(folder).answers if answer.device == "sm_90"}
    assert (found["sglang"].verdict, found["sglang"].rows) == ("refused", ("sglang-latent",))
    assert found["sglang"].fixes[0].endswith("--to awq"), "SGLang unpacks those of AWQ"
    assert found["vllm"].verdict == "packed"


def test_dense_models_may_pack_what_is_not_merged_there(tmp_path: Path) -> None:
    assert check_up(latent_folder(tmp_path / "in", {"kv_b_proj"}, expert=False)).packed_latent == ()


def test_the_list_of_dense_linears_has_what_sglang_merges_them_into(tmp_path: Path) -> None:
    """In glm4_moe_lite.py it looks for that name alone. Everything that writes such a list."""
    folder, merged = tmp_path / "in", f"model.layers.0.self_attn.{FUSED}"
    latent_folder(folder, {*TO_LATENT, "kv_b_proj"})
    assert check_up(folder).packed_latent == ()
    for to in ("compressed-tensors", "gptq", "awq"):
        convert(folder, tmp_path / to, to, dtype="float16", verbose=False)
    configs = {
        to: read_checkpoint(tmp_path / to).config["quantization_config"] for to in ("compressed-tensors", "gptq", "awq")
    }
    assert merged in configs["compressed-tensors"]["ignore"] and merged in configs["awq"]["modules_to_not_convert"]
    assert f"-:^{re.escape(merged)}$" in configs["gptq"]["dynamic"]

    apart = ["b.q_a_proj", "c.kv_a_proj_with_mqa", "lm_head"]
    assert quantization_config({"a": QuantSpec(4, 32)}, apart)["ignore"] == apart


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("a.kv_b_proj", {"a.kv_b_proj"}),  # of something else: latent attention has a projection into the latents
        ("a.q_a_proj", {"a.q_a_proj", "a.kv_proj"}),  # DeepSeek-V4
        ("a.q_b_proj", {"a.q_a_proj", "a.q_b_proj", "a.kv_a_proj_with_mqa", "a.kv_b_proj"}),
        ("a.kv_b_projection", {"a.kv_b_projection", "a.kv_a_proj_with_mqa", "a.kv_b_proj"}),
    ],
)
def test_what_is_no_latent_attention(name: str, others: set[str]) -> None:
    assert not of_latent_attention(name, others, True)

"""Models that do other things with a linear or its input than calling it: quantized and loaded, or refused in time."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import architectures
from architectures import ARCHITECTURES, Architecture, exercise, logits, tiny, tokens
from helpers import random_quantized
from lowbit import QuantLinear, QuantSpec, load, quantize, quantize_
from lowbit.checkpoint import CheckpointWriter
from lowbit.evaluate import context_length
from lowbit.linear import Int8Linear
from lowbit.quantize import _write as write_folder
from lowbit.reads import check_readers
from lowbit.spec import ActivationSpec
from lowbit.stand_in import NoDenseWeightError

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

CLOSE = 2e-5  # as in test_architectures.py
SPEC = QuantSpec(4, 32)

_COMMON, _GATED = architectures._COMMON, architectures._GATED
_STATE_SPACE = {**architectures._TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_DSA = {
    **_GATED, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_group": 1, "topk_group": 1, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16,
}  # fmt: skip
_LONGCAT = {
    **_GATED, "num_key_value_heads": 4, "num_layers": 2, "expert_ffn_hidden_size": 64, "ffn_hidden_size": 128,
    "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "q_lora_rank": 32, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 16,
}  # fmt: skip


def _made(config, *, auto="AutoModelForCausalLM", generates=False, **fields):
    return Architecture(config, lambda: architectures._config(config, **fields), auto, generates)


ODD = {
    "initializes the weight of a packed linear": _made("mamba2:Mamba2Config", **_STATE_SPACE, num_heads=8, head_dim=16,
                                                       n_groups=1),
    "asks the router's weight for its dtype": _made("hunyuan_v1_moe:HunYuanMoEV1Config", **_GATED, head_dim=16,
                                                    num_experts=4, moe_topk=2),
    "casts to the weight's dtype": _made("glm_moe_dsa:GlmMoeDsaConfig", **_DSA),
    "asks a tensor it no longer reads for its shape": _made("doge:DogeConfig", **_GATED, generates=True),
    "multiplies by the weight itself": _made("mamba:MambaConfig", **_STATE_SPACE, time_step_rank=32),
    "changes its weights while it runs": _made("rwkv:RwkvConfig", **architectures._TOKENS, hidden_size=64,
                                               num_hidden_layers=2, context_length=128, attention_hidden_size=64),
    "has experts without weights": _made("longcat_flash:LongcatFlashConfig", **_LONGCAT),
}  # fmt: skip
RUN = [name for name in ODD if not name.startswith(("multiplies", "changes", "has"))]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    for name, architecture in ODD.items():
        monkeypatch.setitem(ARCHITECTURES, name, architecture)


def _written(model, report, folder):
    with CheckpointWriter(folder) as writer:
        write_folder(writer, model, report)
    return load(folder, device="cpu")[0]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", RUN)
def test_it_survives_the_whole_way(name, method, tmp_path):
    outcome = exercise(name, method, tmp_path)
    assert outcome.error < CLOSE
    assert outcome.resaved


# --- weights that a model uses itself


def test_a_block_that_multiplies_by_a_weight_itself_is_refused_before_any_weight_is_quantized():
    model = tiny("multiplies by the weight itself")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"backbone.layers.0: mixer.dt_proj cannot be packed.* leave it out by ignore"):
        quantize_(model, SPEC, "gptq", calibration=tokens())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_with_that_weight_ignored_it_runs(tmp_path):
    model = tiny("multiplies by the weight itself")
    report = quantize_(model, SPEC, "gptq", calibration=tokens(), ignore=["dt_proj"], allow_partial=True)
    loaded = _written(model, report, tmp_path / "packed")
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()))


def test_a_weight_rounded_without_data_raises_when_the_model_multiplies_by_it():
    model = tiny("multiplies by the weight itself")
    quantize_(model, SPEC, "rtn")
    with pytest.raises(NoDenseWeightError, match=r"matmul.*the weight \(128, 32\) of a linear itself.*--ignore"):
        logits(model, tokens())


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "multiplies by the weight itself",
            r"Mamba.*layers.0.mixer.dt_proj, .*cannot be packed",
        ),
        ("changes its weights while it runs", "4 in all.*rescale_every 0"),
    ],
)
def test_a_folder_is_refused_without_data_too_and_nothing_is_left(name, said, tmp_path):
    tiny(name).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=said):
        quantize(tmp_path / "model", tmp_path / "out", 4, group_size=32, method="rtn", verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_does_not_run_on_tokens_alone_gets_a_note(monkeypatch):
    model = tiny("casts to the weight's dtype").train()
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    assert check_readers(model, [name]) == []
    monkeypatch.setattr(model, "forward", lambda **_: model.get_input_embeddings()(None))
    (note,) = check_readers(model, [name])
    assert re.search(r"could not be run on 8 tokens.*TypeError: embedding\(\)", note)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_model_that_changes_its_weights_while_it_runs_is_refused_with_the_setting():
    model = tiny("changes its weights while it runs")
    with pytest.raises(ValueError, match=r"rwkv.blocks.0.attention.output.* 4 in all.*rescale_every 0"):
        quantize_(model, SPEC, "gptq", calibration=tokens())


def test_without_that_setting_it_survives_the_whole_way(monkeypatch, tmp_path):
    name = "changes its weights while it runs"
    config = ODD[name].config()
    config.rescale_every = 0
    monkeypatch.setitem(ARCHITECTURES, name, Architecture(name, lambda: copy.deepcopy(config), generates=False))
    assert exercise(name, "gptq", tmp_path).error < CLOSE


def test_experts_beyond_the_configured_number_need_no_weights(tmp_path):
    """LongCat-Flash routes to experts that do nothing; transformers writes half of their weights."""
    model = tiny("has experts without weights")
    report = quantize_(model, SPEC, "gptq", calibration=tokens(), ignore=["router"], allow_partial=True)
    loaded = _written(model, report, tmp_path / "packed")
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()))


def test_a_configured_expert_that_is_missing_is_still_named(tmp_path):
    model = tiny("has experts without weights")
    report = quantize_(model, SPEC, "rtn", ignore=["router"], allow_partial=True)
    _written(model, report, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "packed" / "lowbit.json").unlink()  # has the file's hash
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts must hold experts 0 to 3, but down_proj of \[3\]"):
        load(tmp_path / "packed", device="cpu")


# --- what a packed linear shows of its weight


def _packed(dtype=torch.float16):
    return QuantLinear(64, 16, SPEC, bias=False, dtype=dtype)


def test_the_weight_has_the_shape_dtype_and_device_of_a_dense_one():
    linear = _packed()
    assert (linear.weight.shape, linear.weight.ndim) == ((16, 64), 2)
    assert (linear.weight.dtype, linear.weight.device) == (torch.float16, torch.device("cpu"))
    linear.to("meta").bfloat16()
    assert (linear.weight.dtype, linear.weight.device) == (torch.bfloat16, torch.device("meta"))


def test_the_weight_is_neither_a_tensor_nor_saved():
    linear = _packed()
    assert not isinstance(linear.weight, torch.Tensor)
    assert "weight" not in linear.state_dict() and "weight" not in dict(linear.named_parameters())
    assert copy.deepcopy(linear).weight.shape == (16, 64)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: nn.functional.linear(torch.ones(1, 64), w),
        lambda w: w @ torch.ones(64),
        lambda w: torch.ones(16) @ w,
        lambda w: torch.empty_like(w),
        lambda w: w.data,
        lambda w: w.div_(2),
    ],
)
def test_the_numbers_of_the_weight_are_an_error_and_never_a_result(use):
    with pytest.raises(NoDenseWeightError, match=r"the weight \(16, 64\) of a linear"):
        use(_packed(torch.float32).weight)


def test_a_model_that_asks_for_the_dtype_compiles_without_a_graph_break():
    linear = QuantLinear.from_quantized(random_quantized(16, 64, SPEC))

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x.to(self.linear.weight.dtype))

    x = torch.randn(3, 64)
    compiled = torch.compile(Casting(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double()), linear(x))


def test_the_weight_of_an_int8_linear_is_its_own():
    linear = Int8Linear(64, 16, QuantSpec(8, -1, activations=ActivationSpec()), bias=False, dtype=torch.float32)
    assert isinstance(linear.weight, nn.Parameter) and linear.weight.dtype == torch.int8


# --- how long a text may be


_LED = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "attention_window": 16,
    "max_encoder_position_embeddings": 96, "max_decoder_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "auto", "fields", "length"),
    [
        ("roberta:RobertaConfig", "AutoModelForMaskedLM", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("xlm_roberta:XLMRobertaConfig", "AutoModelForMaskedLM", {"max_position_embeddings": 66}, 63),
        ("bert:BertConfig", "AutoModelForMaskedLM", {"max_position_embeddings": 66}, 66),
        ("opt:OPTConfig", "AutoModelForCausalLM", {"max_position_embeddings": 66}, 66),
        ("led:LEDConfig", "AutoModelForSeq2SeqLM", _LED, 64),
    ],
)
def test_a_context_is_what_the_model_can_read(config, auto, fields, length, monkeypatch):
    small = {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 1, "bos_token_id": 0}
    monkeypatch.setitem(ARCHITECTURES, "this", _made(config, auto=auto, **{**small, **fields}))
    model = tiny("this")
    assert context_length(model) == length
    logits(model, torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, torch.full((1, length + 1), 5))

"""Tiny random-weight models of the architectures lowbit promises to quantize, and what each one is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import models as hf_models

from lowbit import QuantLinear, QuantSpec, load, quantize_
from lowbit.checkpoint import CheckpointWriter
from lowbit.linearize import linearize
from lowbit.quantize import _write as write_folder
from lowbit.walk import find_blocks

VOCAB = 128

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
_SLIDING: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


@dataclass(frozen=True)
class Architecture:
    """One line of the table.

    Attributes:
        config: makes the tiny configuration.
        auto: the class of transformers that builds the model.
        generates: whether ``generate`` is asked for.
        experts: whether most of the weights are merged experts.
    """

    title: str
    config: Callable[[], Any]
    auto: str = "AutoModelForCausalLM"
    generates: bool = True
    experts: bool = False


def _config(name: str, **fields: Any) -> Any:
    module, _, cls = name.partition(":")
    return getattr(getattr(hf_models, module), cls)(**fields)


def _gated(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: _config(name, **{**_GATED, **fields})


def _common(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: _config(name, **{**_COMMON, **fields})


def _latent(name: str, **fields: Any) -> Callable[[], Any]:
    """DeepSeek's attention, with what SGLang asks of the configurations on the hub besides what transformers does."""
    heads = {"num_key_value_heads": 4, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
    scaling |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return lambda: _config(
        name,
        **{**_GATED, **heads, **experts, **fields},
        moe_intermediate_size=2 * _GATED["intermediate_size"],
        q_lora_rank=_COMMON["hidden_size"] // 2,
        kv_lora_rank=_COMMON["hidden_size"] // 2,
        rope_parameters=scaling,
        moe_layer_freq=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )


def _llava() -> Any:
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return hf_models.llava.LlavaConfig(
        vision_config=hf_models.clip.CLIPVisionConfig(**vision),
        text_config=_config("llama:LlamaConfig", **_GATED),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama", _gated("llama:LlamaConfig")),
    "llama-tied": Architecture("Llama, tied embeddings", _gated("llama:LlamaConfig", tie_word_embeddings=True)),
    "mistral": Architecture("Mistral", _gated("mistral:MistralConfig", sliding_window=8)),
    "qwen2": Architecture("Qwen2", _gated("qwen2:Qwen2Config")),
    "qwen3": Architecture("Qwen3", _gated("qwen3:Qwen3Config", head_dim=16)),
    "gemma2": Architecture("Gemma 2", _gated("gemma2:Gemma2Config", head_dim=16, **_SLIDING)),
    "gemma3": Architecture("Gemma 3", _gated("gemma3:Gemma3TextConfig", head_dim=16, **_SLIDING)),
    "phi3": Architecture("Phi-3", _gated("phi3:Phi3Config")),
    "gpt2": Architecture("GPT-2", lambda: _config("gpt2:GPT2Config", **_GPT2)),
    "gpt_neox": Architecture("GPT-NeoX", _common("gpt_neox:GPTNeoXConfig", intermediate_size=128)),
    "gptj": Architecture("GPT-J", lambda: _config("gptj:GPTJConfig", **_GPT2, rotary_dim=8)),
    "opt": Architecture("OPT", _common("opt:OPTConfig", ffn_dim=128, word_embed_proj_dim=64)),
    "bloom": Architecture(
        "BLOOM", lambda: _config("bloom:BloomConfig", **_TOKENS, hidden_size=64, n_layer=2, n_head=4)
    ),
    "falcon": Architecture("Falcon", _common("falcon:FalconConfig", new_decoder_architecture=False)),
    "mpt": Architecture(
        "MPT", lambda: _config("mpt:MptConfig", **_TOKENS, d_model=64, n_layers=2, n_heads=4, max_seq_len=128)
    ),
    "starcoder2": Architecture("StarCoder2", _gated("starcoder2:Starcoder2Config")),
    "olmo2": Architecture("OLMo 2", _gated("olmo2:Olmo2Config")),
    "granite": Architecture("Granite", _gated("granite:GraniteConfig")),
    "cohere2": Architecture("Cohere2", _gated("cohere2:Cohere2Config", **_SLIDING)),
    "stablelm": Architecture("StableLM", _gated("stablelm:StableLmConfig")),
    "smollm3": Architecture("SmolLM3", _gated("smollm3:SmolLM3Config")),
    "mixtral": Architecture(
        "Mixtral", _gated("mixtral:MixtralConfig", num_local_experts=4, num_experts_per_tok=2), experts=True
    ),
    "qwen2_moe": Architecture(
        "Qwen2-MoE",
        _gated(
            "qwen2_moe:Qwen2MoeConfig",
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        experts=True,
    ),
    "qwen3_moe": Architecture(
        "Qwen3-MoE",
        _gated("qwen3_moe:Qwen3MoeConfig", head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
        experts=True,
    ),
    "olmoe": Architecture("OLMoE", _gated("olmoe:OlmoeConfig", num_experts=4, num_experts_per_tok=2), experts=True),
    "deepseek_v3": Architecture(
        "DeepSeek-V3", _latent("deepseek_v3:DeepseekV3Config", n_group=2, topk_group=1), experts=True
    ),
    "glm4_moe_lite": Architecture(
        "GLM-4.7-Flash", _latent("glm4_moe_lite:Glm4MoeLiteConfig", n_group=1, topk_group=1), experts=True
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        _gated("gpt_oss:GptOssConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_SLIDING),
        experts=True,
    ),
    "phimoe": Architecture(
        "Phi-MoE", _gated("phimoe:PhimoeConfig", num_local_experts=4, num_experts_per_tok=2), experts=True
    ),
    "t5": Architecture(
        "T5 (encoder-decoder)",
        lambda: _config(
            "t5:T5Config",
            vocab_size=VOCAB,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            pad_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=2,
        ),
        auto="AutoModelForSeq2SeqLM",
    ),
    "bert": Architecture(
        "BERT (encoder)",
        _common("bert:BertConfig", intermediate_size=128),
        auto="AutoModelForMaskedLM",
        generates=False,
    ),
    "llava": Architecture("LLaVA (text tower)", _llava, auto="AutoModelForImageTextToText"),
}


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The architecture's model with random weights, large enough that quantization shows."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.auto).from_config(architecture.config(), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def tokens(windows: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones and without an image token."""
    return torch.randint(3, VOCAB - 1, (windows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one forward pass over ``ids``; a decoder behind an encoder reads the same tokens."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **extra).logits.float()


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        coverage: quantized share of the decoder's weight matrices, routers and tables of positions among the rest.
        weights: quantized matrices.
        left: ``name: reason`` of each matrix of the blocks left dense.
        starved: of the quantized matrices, those whose report names a fallback for starved experts.
        error: largest difference of the loaded model's logits from those of a dense model that holds the dequantized
            weights, relative to the largest logit.
        resaved: whether a second save of the loaded model has the same bytes per tensor as the first.
        generated: new tokens ``generate`` made, 0 where it is not asked for.
    """

    coverage: float
    weights: int
    left: tuple[str, ...]
    starved: int
    error: float
    resaved: bool
    generated: int


def exercise(name: str, method: str, folder: Path) -> Outcome:
    """Quantize, write, load, compare, save again and generate."""
    model = tiny(name)
    ids = tokens()
    report = quantize_(model, QuantSpec(4, 32), method, calibration=ids, allow_partial=True)
    with CheckpointWriter(folder / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = load(folder / "packed", device="cpu")
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert set(packed) == {layer.name for layer in report.layers}, "what was quantized is what came back packed"
    found, wanted = logits(loaded, ids), logits(_twin(name, packed), ids)
    loaded.save_pretrained(folder / "again")
    generated = 0
    if ARCHITECTURES[name].generates:
        out = loaded.generate(ids[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        generated = out.shape[1] - (1 if loaded.config.is_encoder_decoder else 8)
    blocks = tuple({b.name for b in find_blocks(loaded)})
    return Outcome(
        report.coverage,
        len(report.layers),
        tuple(f"{s.name}: {s.reason}" for s in report.skipped if s.name.startswith(blocks)),
        sum(any("starved" in note for note in layer.notes) for layer in report.layers),
        float((found - wanted).abs().max() / wanted.abs().max()),
        _tensors(folder / "packed") == _tensors(folder / "again"),
        generated,
    )


def _twin(name: str, packed: dict[str, QuantLinear]) -> Any:
    """The architecture's dense model with the packed model's weights, dequantized."""
    twin = tiny(name)
    linearize(twin)
    with torch.no_grad():
        for layer, module in packed.items():
            linear = twin.get_submodule(layer)
            linear.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
    return twin


def _tensors(folder: Path) -> dict[str, bytes]:
    tensors: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: t.contiguous().view(torch.uint8).numpy().tobytes() if t.ndim else t.numpy().tobytes()
                    for name, t in load_file(file).items()}  # fmt: skip
    return tensors

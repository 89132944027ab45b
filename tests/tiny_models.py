"""Random-weight causal LMs of many families, small enough to quantize in a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import models as hf_models

VOCAB = 128


def _config(name: str, **fields: Any) -> Any:
    module, _, cls = name.partition(":")
    return getattr(getattr(hf_models, module), cls)(**fields)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("llama:LlamaConfig", **_GATED),
    "qwen3": lambda: _config("qwen3:Qwen3Config", **_GATED, head_dim=16),
    "mistral": lambda: _config("mistral:MistralConfig", **_GATED, sliding_window=8),
    # layers alternate between sliding and full attention, so masks and rotary tables differ from block to block
    "gemma3": lambda: _config(
        "gemma3:Gemma3TextConfig",
        **_GATED,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: _config("phi3:Phi3Config", **_GATED),
    "gpt_neox": lambda: _config("gpt_neox:GPTNeoXConfig", **_COMMON, intermediate_size=128),
    "opt": lambda: _config("opt:OPTConfig", **_COMMON, ffn_dim=128, word_embed_proj_dim=64),
}

ALL_LINEARS = {"llama": 7, "qwen3": 7, "mistral": 7, "gemma3": 7, "phi3": 4, "gpt_neox": 4, "opt": 6}
"""``nn.Linear`` modules of one decoder block."""


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the family with random weights, large enough that quantization shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def random_tokens(windows: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


BOOKS_4M = Path(__file__).parent.parent / "eval" / "data" / "books-4m"


def tiny_folder(
    path: Path, *, hidden: int = 64, vocab: int = 4096, damage: Callable[[Any], object] | None = None
) -> Path:
    """A model folder of a tiny Llama with the tokenizer of books-4m, which has 4096 tokens.

    Args:
        damage: called with the model before it is saved.
    """
    torch.manual_seed(0)
    fields = {**_GATED, "hidden_size": hidden, "vocab_size": vocab, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(_config("llama:LlamaConfig", **fields), dtype=torch.float32)
    if damage is not None:
        with torch.no_grad():
            damage(model)
    path.mkdir()
    model.config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / name, path / name)
    return path

"""What scripts/check_vllm loads into vLLM: a checkpoint of each format lowbit writes, and lowbit's own answer to it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "eval" / "data" / "books-calib.txt"
BASE, MOE = "base", "moe-base"
STOCK, PLUGIN, EXPANDED = "vLLM", "vLLM + lowbit's plugin", "vLLM, experts expanded"

__all__ = [
    "CASES",
    "EXPANDED",
    "PLUGIN",
    "STOCK",
    "Case",
    "greedy",
    "make",
    "make_moe",
    "next_logits",
    "reference_model",
]


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        name: its folder, and what ``--only`` takes.
        label: the table's first column.
        source: the folder it is made from.
        options: keyword arguments of ``lowbit.quantize``, or
        to: the format that ``lowbit.convert`` writes.
        weight_only: whether the 0.07 of the issue is asked of it; activations in 8 bits are another computation.
        runs: how vLLM runs it, one row each: ``STOCK``; ``PLUGIN``, where vLLM's own CPU kernel is switched off so that
            lowbit's takes the layers; ``EXPANDED``, see vllm_experts.py.
    """

    name: str
    label: str
    source: str = BASE
    options: dict[str, Any] | None = None
    to: str | None = None
    weight_only: bool = True
    runs: tuple[str, ...] = (STOCK,)


def _quantized(name: str, label: str, method: str = "rtn", **options: Any) -> Case:
    settings = {key: options.pop(key) for key in ("source", "weight_only", "runs") if key in options}
    calibrated = {"calibration": str(CALIBRATION), "samples": 32, "seq_len": 256}
    needs_text = method != "rtn" or options.get("activations") == "int8-static"
    return Case(name, label, options={"method": method, **options, **(calibrated if needs_text else {})}, **settings)


CASES = (
    Case("dense", "not quantized", weight_only=True),
    _quantized("w4", "W4 symmetric, groups of 128", "gptq", runs=(STOCK, PLUGIN)),
    _quantized("w4-asym", "W4 asymmetric, groups of 64", "gptq", symmetric=False, group_size=64, runs=(STOCK, PLUGIN)),
    _quantized("w4-row", "W4 symmetric, whole rows", group_size=-1),
    Case("gptq-v1", "GPTQ v1, W4 symmetric", source="w4", to="gptq", runs=(STOCK, PLUGIN)),
    Case("gptq-v2", "GPTQ v2, W4 symmetric", source="w4", to="gptq-v2"),
    Case("awq", "AWQ, W4 asymmetric", source="w4-asym", to="awq", runs=(STOCK, PLUGIN)),
    _quantized("w8", "W8 symmetric, groups of 128", bits=8, runs=(STOCK, PLUGIN)),
    _quantized("w8-asym", "W8 asymmetric, whole rows", bits=8, symmetric=False, group_size=-1, runs=(STOCK, PLUGIN)),
    Case("gptq-w8", "GPTQ v1, W8 symmetric", source="w8", to="gptq"),  # refused before a kernel is looked for
    _quantized("w2", "W2 asymmetric, groups of 64", "gptq", bits=2, group_size=64, runs=(STOCK, PLUGIN)),
    _quantized("w8a8", "W8A8 int, scale per token", bits=8, activations="int8", weight_only=False),
    _quantized("w8a8-static", "W8A8 int, static scale", bits=8, activations="int8-static", weight_only=False),
    Case("moe-dense", "MoE, not quantized", source=MOE),
    _quantized("moe-attention", "MoE, W4 attention, experts dense", source=MOE, group_size=64, ignore=["experts"],
               allow_partial=True, runs=(STOCK, PLUGIN)),
    _quantized("moe-w4", "MoE, W4 symmetric", source=MOE, group_size=64, runs=(STOCK, EXPANDED)),
    _quantized("moe-w4-asym", "MoE, W4 asymmetric", source=MOE, group_size=64, symmetric=False, runs=(STOCK, EXPANDED)),
    _quantized("moe-w8a8", "MoE, W8A8 int", source=MOE, bits=8, activations="int8", weight_only=False),
)  # fmt: skip


def make(case: Case, work: Path) -> Path:
    """Write the checkpoint under ``work`` unless it is there, its sources first; its folder."""
    folder = work / case.name
    if case.options is None and case.to is None:
        return work / case.source
    if folder.exists():  # lowbit's folders appear only when they are complete
        return folder
    if case.to is not None:
        parent = make(next(other for other in CASES if other.name == case.source), work)
        lowbit.convert(parent, folder, to=case.to, verbose=False)
    else:
        lowbit.quantize(work / case.source, folder, verbose=False, **case.options or {})
    return folder


def reference_model(case: Case, folder: Path, dtype: str) -> Any:
    """lowbit's own computation: dequantized dense weights through transformers; for W8A8 its own integer layers."""
    if case.weight_only and (case.options is not None or case.to is not None):
        dense = folder.with_name(f"{case.name}-as-dense")
        if not dense.exists():
            lowbit.convert(folder, dense, to="dense", dtype=dtype, verbose=False)
        folder = dense
    return lowbit.load(folder, device="cpu", dtype=dtype)[0]


def make_moe(work: Path, tokenizer_of: Path) -> Path:
    """A Qwen3-MoE of random weights in ``work / MOE``, its routers made as decided as trained ones.

    A router that is undecided between two experts sends a token to either, for the last bit of a rounding.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from transformers.utils import logging

    folder = work / MOE
    if (folder / "tokenizer.json").exists():
        return folder
    vocabulary = lowbit.load(tokenizer_of)[0].config.vocab_size
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=4,  # of 8: what the last one adds is next to nothing
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.mul_(4)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(tokenizer_of / name, folder / name)
    return folder


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """prompts ``(P, T)`` -> ``(P, new_tokens)``, without a cache: what the model says and nothing else."""
    tokens = prompts
    for _ in range(new_tokens):
        best = model(input_ids=tokens).logits[:, -1].float().argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens[:, prompts.shape[1] :]


@torch.inference_mode()
def next_logits(model: Any, tokens: Sequence[Sequence[int]]) -> Tensor:
    """tokens ``(P, T)`` -> the logits of every next token ``(P, T - 1, V)``, numbers of the model's dtype in fp32."""
    logits: Tensor = model(input_ids=torch.tensor(tokens)).logits
    return logits[:, :-1].float()

"""What scripts/check_vllm loads into vLLM: a checkpoint of each format lowbit writes, and lowbit's own answer to it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.windows import first_windows

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "eval" / "data" / "books-calib.txt"
BOOKS = ROOT / "eval" / "data" / "books-4m"
BASE, MOE = "base", "moe-books"
SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Of a Llama's configuration what a Qwen3-MoE has as well."""
STOCK, PLUGIN, EXPANDED = "vLLM", "vLLM + lowbit's plugin", "vLLM, experts expanded"
LINEARS = "LowbitLinearKernel"
ALL = (LINEARS, "LowbitExpertsMethod")

__all__ = [
    "CASES",
    "EXPANDED",
    "PLUGIN",
    "STOCK",
    "Case",
    "make",
    "make_moe",
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
        taken: what of lowbit's must have been chosen by ``PLUGIN``.
    """

    name: str
    label: str
    source: str = BASE
    options: dict[str, Any] | None = None
    to: str | None = None
    weight_only: bool = True
    runs: tuple[str, ...] = (STOCK,)
    taken: tuple[str, ...] = (LINEARS,)


def _quantized(name: str, label: str, method: str = "rtn", **options: Any) -> Case:
    settings = {key: options.pop(key) for key in ("source", "weight_only", "runs", "taken") if key in options}
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
    Case("gptq-w8", "GPTQ v1, W8 symmetric", source="w8", to="gptq", runs=(STOCK, PLUGIN)),
    _quantized("w2", "W2 asymmetric, groups of 64", "gptq", bits=2, group_size=64, runs=(STOCK, PLUGIN)),
    _quantized("w8a8", "W8A8 int, scale per token", bits=8, activations="int8", weight_only=False),
    _quantized("w8a8-static", "W8A8 int, static scale", bits=8, activations="int8-static", weight_only=False),
    Case("moe-dense", "MoE, not quantized", source=MOE),
    _quantized("moe-attention", "MoE, W4 attention, experts dense", source=MOE, group_size=64, ignore=["experts"],
               allow_partial=True, runs=(STOCK, PLUGIN)),
    _quantized("moe-w4", "MoE, W4 symmetric", source=MOE, group_size=64, runs=(STOCK, EXPANDED, PLUGIN), taken=ALL),
    _quantized("moe-w4-asym", "MoE, W4 asymmetric", source=MOE, group_size=64, symmetric=False,
               runs=(STOCK, EXPANDED, PLUGIN), taken=ALL),
    _quantized("moe-w8", "MoE, W8 symmetric", source=MOE, bits=8, runs=(STOCK, PLUGIN), taken=ALL),
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


def reference_model(case: Case, folder: Path, dtype: str) -> tuple[Any, Any]:
    """lowbit's own computation: dequantized dense weights through transformers; for W8A8 its own integer layers.

    Returns:
        The model and its tokenizer.
    """
    if case.weight_only and (case.options is not None or case.to is not None):
        dense = folder.with_name(f"{case.name}-as-dense")
        if not dense.exists():
            lowbit.convert(folder, dense, to="dense", dtype=dtype, verbose=False)
        folder = dense
    return lowbit.load(folder, device="cpu", dtype=dtype)


def make_moe(work: Path) -> Path:
    """A Qwen3-MoE made of books-4m in ``work / MOE``: a language model's experts, without training one.

    Every expert has a third of the columns of the layer's MLP, drawn at random, and its down projection times three: on
    average the MLP (upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055, with parts instead of copies). Its logits are
    about as decided as books-4m's, where random weights' are next to never. Qwen3 divides q and k by their
    root mean squares: the mean of those is what it multiplies by. Routers are random; one undecided between two
    experts sends a token to either, for the last bit of a rounding, so the last that is chosen weighs next to nothing.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from transformers.utils import logging

    folder = work / MOE
    if (folder / "tokenizer.json").exists():
        return folder
    dense, tokenizer = lowbit.load(BOOKS, device="cpu", dtype="float32")
    config = Qwen3MoeConfig(
        **{name: getattr(dense.config, name) for name in SHARED},
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=7,  # of 8: what the last one adds is next to nothing
        norm_topk_prob=True,
        tie_word_embeddings=False,  # as published ones; SGLang 0.5.23 leaves a tied lm_head unfilled
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
        sizes = _head_sizes(dense, first_windows(tokenizer, CALIBRATION.read_text(encoding="utf-8"), 256, 4))
        for block, source in zip(model.model.layers, dense.model.layers, strict=True):
            block.self_attn.q_norm.weight.fill_(sizes[source.self_attn.q_proj])
            block.self_attn.k_norm.weight.fill_(sizes[source.self_attn.k_proj])
            block.mlp.gate.weight.normal_(0, 0.25)
            _fill_experts(block.mlp.experts, source.mlp)
    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(folder)
    logging.enable_progress_bar()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(BOOKS / name, folder / name)
    return folder


@torch.no_grad()
def _head_sizes(model: Any, tokens: Tensor) -> dict[Any, float]:
    """Per q and k projection the mean, over heads and tokens ``(P, T)``, of the root mean square of a head's values."""
    sizes, hooks, width = {}, [], model.config.head_dim

    def measure(module: Any, _: Any, out: Tensor) -> None:
        sizes[module] = out.unflatten(-1, (-1, width)).square().mean(-1).sqrt().mean().item()

    for block in model.model.layers:
        hooks += [part.register_forward_hook(measure) for part in (block.self_attn.q_proj, block.self_attn.k_proj)]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return sizes


def _fill_experts(experts: Any, mlp: Any) -> None:
    """Experts ``gate_up_proj (E, 2 I, H)``, ``down_proj (E, H, I)`` from an MLP of more columns."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    of_all, of_one = down.shape[1], experts.down_proj.shape[2]
    for i in range(len(experts.down_proj)):
        columns = torch.randperm(of_all)[:of_one]
        experts.gate_up_proj[i] = torch.cat([gate[columns], up[columns]])
        experts.down_proj[i] = down[:, columns] * (of_all / of_one)

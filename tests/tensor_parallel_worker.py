"""One rank of tests/test_tensor_parallel.py: loads every folder by two ranks and writes down what it computes.

torchrun --nproc-per-node 2 tests/tensor_parallel_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lowbit
from helpers import message
from lowbit.hf.sharded import ShardedLinear

PACKED = ("symmetric", "asymmetric", "whole rows", "biases", "int8")
"""Folders that two ranks can load."""

REFUSED = ("small", "experts")
"""Folders that they cannot."""


def token_ids() -> Tensor:
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of two sequences, and what the first is greedily continued with."""
    ids = token_ids()
    logits = model(ids, use_cache=False).logits.float()
    return logits, model.generate(ids[:1], max_new_tokens=16, do_sample=False, pad_token_id=0)


def packed_bytes(model: nn.Module, *names: str) -> int:
    """Bytes of the tensors of these names that the packed layers hold."""
    parts = [m.part if isinstance(m, ShardedLinear) else m for m in model.modules()]
    layers = [part for part in parts if isinstance(part, (lowbit.QuantLinear, lowbit.Int8Linear))]
    tensors = [t for layer in layers for name, t in layer.state_dict().items() if name in names]
    return sum(t.numel() * t.element_size() for t in tensors)


def run(folder: Path) -> dict[str, Any]:
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    seen: dict[str, Any] = {}
    lowbit.install()
    for name in PACKED:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, distributed_config=plan)
        sizes = {key: packed_bytes(model, key) for key in ("weight_packed", "weight", "weight_scale")}
        seen[name] = {"outputs": outputs(model), "bytes": sizes, "modules": str(model)}
        if name == "asymmetric":
            model.save_pretrained(folder / "saved")
    lowbit.uninstall()
    model, tokenizer = lowbit.load(folder / "asymmetric", dtype="float32", distributed_config=plan)
    seen["load"] = {"outputs": outputs(model), "tokenizer": tokenizer is not None}
    for name in REFUSED:
        seen[name] = message(lambda name=name: lowbit.load(folder / name, distributed_config=plan))
    seen["style"] = message(
        lambda: lowbit.load(
            folder / "symmetric",
            distributed_config=DistributedConfig(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"}),
        )
    )
    on_the_fly = {"quantization_config": lowbit.LowbitConfig(group_size=32), "distributed_config": plan}
    seen["on the fly"] = message(lambda: AutoModelForCausalLM.from_pretrained(folder / "llama", **on_the_fly))
    seen["device"] = message(lambda: lowbit.load(folder / "symmetric", device="cpu", distributed_config=plan))
    return seen


if __name__ == "__main__":
    where = Path(sys.argv[1])
    found = run(where)
    torch.save(found, where / f"seen-{os.environ['RANK']}.pt")
    dist.destroy_process_group()

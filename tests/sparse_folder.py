"""A packed model of any apparent size whose shards are a header and a hole."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

__all__ = ["write_sparse"]


def write_sparse(folder: Path, layers: int, shards: int, hidden: int, inner: int) -> int:
    """A packed Llama whose shards are holes behind a header; returns the bytes that are not holes."""
    folder.mkdir()
    square, narrow, wide = (hidden, hidden), (hidden // 8, hidden), (inner, hidden)
    sizes = {"q_proj": square, "k_proj": narrow, "v_proj": narrow, "o_proj": square,
             "gate_proj": wide, "up_proj": wide, "down_proj": (hidden, inner)}  # fmt: skip
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for i, (name, (n, k)) in itertools.product(range(layers), sizes.items()):
        prefix = f"model.layers.{i}.{'mlp' if 'gate' in name or 'up' in name or 'down' in name else 'self_attn'}.{name}"
        tensors[f"{prefix}.weight_packed"] = ("I32", [n, k // 8], n * k // 2)
        tensors[f"{prefix}.weight_scale"] = ("BF16", [n, k // 128], n * k // 64)
        tensors[f"{prefix}.weight_shape"] = ("I64", [2], 16)
    tensors["lm_head.weight"] = ("BF16", [128256, hidden], 2 * 128256 * hidden)
    weight_map, total = {}, 0
    for shard in range(shards):
        header, place = {}, 0
        filename = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        for name in list(tensors)[shard::shards]:
            dtype, shape, size = tensors[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
            weight_map[name], place = filename, place + size
        text = json.dumps(header).encode()
        with (folder / filename).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + place)
        total += 8 + len(text)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "quantization_config": section,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total + sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))

"""Packed folders for tests, made with round-to-nearest on the min-max grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.affine import QuantizedWeight, minmax_grid, quantize_to_grid, round_scales
from lowbit.checkpoint import CheckpointWriter, linear_tensors, quantization_config
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.spec import QuantSpec

BOOKS_4M = Path(__file__).parent.parent / "eval" / "data" / "books-4m"


def rtn(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """Round ``weight`` (N, K) to the grid that covers each group's range."""
    scales, zeros = minmax_grid(weight.float(), spec)
    return quantize_to_grid(weight.float(), round_scales(scales, scale_dtype), zeros, spec)


def random_layer(n: int, k: int, spec: QuantSpec, seed: int = 0) -> QuantizedWeight:
    return rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), spec)


TINY_LAYERS = {
    "layers.0.up": random_layer(5, 64, QuantSpec(4, 32, True), 0),
    # padding bits in weights (13 * 8 bits) and zero points (7 * 8 bits)
    "layers.0.down": random_layer(7, 13, QuantSpec(8, -1, False), 1),
    "layers.1.up": random_layer(17, 64, QuantSpec(2, 32, False), 2),
}


def names_in(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def write_tiny(out: Path, layers: Mapping[str, QuantizedWeight], **options: Any) -> Path:
    """A folder with just packed layers, one dense tensor and a config.json; no model can be built from it."""
    with CheckpointWriter(out, **options) as writer:
        for name, qw in layers.items():
            for key, tensor in linear_tensors(name, qw).items():
                writer.add(key, tensor)
        writer.add("norm.weight", torch.ones(7))
        config = quantization_config({name: qw.spec for name, qw in layers.items()}, ["lm_head"])
        writer.add_json("config.json", {"model_type": "tiny", "quantization_config": config})
        return writer.finish({"model": "tiny", "method": "rtn"})


def pack_folder(source: Path, out: Path, spec_for: Callable[[str], QuantSpec | None], **options: Any) -> Path:
    """Pack the linears of a model folder for which ``spec_for(module name)`` is not None, as quantize() does."""
    from lowbit import hf

    model, tokenizer = hf.load_dense(source)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    specs = {name: spec for name in linears if (spec := spec_for(name)) is not None}
    stored = hf.checkpoint_names(model, linears)
    with CheckpointWriter(out, **options) as writer:
        for name, spec in specs.items():
            qw = rtn(linears[name].weight.detach(), spec, linears[name].weight.dtype)
            for key, tensor in linear_tensors(stored[name], qw).items():
                writer.add(key, tensor)
        for name, tensor in hf.dense_tensors(model, specs):
            writer.add(name, tensor)
        dense = hf.ignore_names(model, (name for name in linears if name not in specs))
        config = quantization_config({stored[name]: spec for name, spec in specs.items()}, dense)
        writer.add_json("config.json", {**hf.config_dict(model), "quantization_config": config})
        hf.companion_files(source, model, tokenizer, writer.path)
        return writer.finish({"model": source.name, "method": "rtn"})


def decoder_only(spec: QuantSpec) -> Callable[[str], QuantSpec | None]:
    """For :func:`pack_folder`: everything but the output head, which is what quantize() packs."""
    return lambda name: None if name == "lm_head" else spec


def packed_modules(model: torch.nn.Module) -> dict[str, QuantLinear | Int8Linear]:
    """The packed linears of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, Int8Linear))}


def dequantized_by_compressed_tensors(folder: Path) -> torch.nn.Module:
    """books-4m in float32 with the weights of its packed ``folder``, decompressed by that package, not by lowbit."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from lowbit import hf

    config = json.loads((folder / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    model, _ = hf.load_dense(BOOKS_4M, dtype="float32")
    stored = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if f"{name}.weight_packed" in stored:
            parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.weight")}
            parts["weight_scale"] = parts["weight_scale"].float()
            module.weight.data = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return model


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite model.safetensors after ``change`` edited the dict of its tensors, and forget the hashes."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "lowbit.json").unlink(missing_ok=True)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite config.json after ``change`` edited it, and forget the hashes."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "lowbit.json").unlink(missing_ok=True)

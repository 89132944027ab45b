"""lowbit.convert on whole models of architectures whose files are not one matrix per linear."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, logits, tiny, tokens, write_folder
from lowbit import QuantSpec, hf, quantize_
from lowbit.checkpoint import CheckpointWriter, read_checkpoint
from lowbit.convert import convert

# Conv1D; merged experts on disk, transposed and row by row; experts merged while loading; fused; several stacks
UNUSUAL = ("gpt2", "gpt_oss", "mixtral", "deepseek_v3", "phi3", "t5", "bert", "llava")


def packed_folder(name: str, folder: Path) -> Path:
    model = tiny(name)
    report = quantize_(model, QuantSpec(4, 32), "rtn", allow_partial=True)
    with CheckpointWriter(folder) as writer:
        write_folder(writer, model, report)
    return folder


@pytest.mark.parametrize("name", UNUSUAL)
def test_plain_transformers_opens_the_dense_folder(name: str, tmp_path: Path) -> None:
    """Under the names and in the shapes of the architecture's own files, which is what it opens."""
    packed = packed_folder(name, tmp_path / "packed")
    report = convert(packed, tmp_path / "dense", "dense", verbose=False)
    auto = getattr(transformers, ARCHITECTURES[name].auto)
    model, info = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tiny(name).save_pretrained(tmp_path / "original")
    original, ours = (load_file(tmp_path / kind / "model.safetensors") for kind in ("original", "dense"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in original.items()}
    loaded, _ = hf.load(packed, device="cpu", dtype="float32")
    assert report.layers == len(read_checkpoint(packed).linears)
    ids = tokens()
    found, expected = logits(model.eval(), ids), logits(loaded, ids)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "t5"])
def test_another_packed_format_computes_the_same(name: str, tmp_path: Path) -> None:
    packed = packed_folder(name, tmp_path / "packed")
    convert(packed, tmp_path / "v2", "gptq-v2", dtype="float32", verbose=False)
    models = [hf.load(folder, device="cpu", dtype="float32")[0] for folder in (packed, tmp_path / "v2")]
    assert torch.equal(*(logits(model, tokens()) for model in models))


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_a_missing_expert_is_named(name: str, tmp_path: Path) -> None:
    """Not one expert fewer, not random weights: one message, and no folder."""
    packed = packed_folder(name, tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    gone = [key for key in tensors if re.search(r"layers\.1\..*experts\.3\.", key)]
    assert gone
    save_file({key: t for key, t in tensors.items() if key not in gone}, packed / "model.safetensors", {"format": "pt"})
    (packed / "lowbit.json").unlink()
    for to in ("dense", "gptq-v2"):
        with pytest.raises(ValueError, match=r"layers\.1\..*expert"):
            convert(packed, tmp_path / "out", to, verbose=False)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"layers\.1\..*expert"):
        hf.load(packed, device="cpu")

"""Tensor parallel loading of packed folders: two gloo processes against this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.starcoder2 import Starcoder2Config

import architectures
import lowbit
from helpers import assert_close
from tensor_parallel_worker import PACKED, outputs, packed_bytes
from tiny_models import BOOKS_4M, tiny_folder

ROOT = Path(__file__).parent.parent
SOURCES = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
ENV = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"}
WORKER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORKER += [str(ROOT / "tests" / "tensor_parallel_worker.py")]


def starcoder(path: Path) -> Path:
    """The one architecture with a plan whose row-wise layers have a bias, and column-wise ones too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Starcoder2Config(**sizes, **heads, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")

    def packed(name: str, source: Path, **options: Any) -> None:
        lowbit.quantize(source, path / name, method="rtn", verbose=False, **options)

    packed("symmetric", BOOKS_4M, group_size=32)
    packed("asymmetric", BOOKS_4M, group_size=64, symmetric=False)
    packed("whole rows", BOOKS_4M, bits=8, group_size=-1, symmetric=False)
    packed("int8", BOOKS_4M, bits=8, activations="int8")
    packed("biases", starcoder(path / "starcoder"), group_size=32, symmetric=False)
    packed("small", tiny_folder(path / "llama"), group_size=64)
    architectures.tiny("mixtral").save_pretrained(path / "mixtral")
    packed("experts", path / "mixtral", group_size=32)
    return path


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks computed."""
    done = subprocess.run([*WORKER, str(folder)], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=True) for rank in (0, 1)]


def alone(folder: Path) -> Any:
    """The model by this one process."""
    return lowbit.load(folder, device="cpu", dtype="float32")[0]


def assert_same_sums(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits in float32 whose sums were added in another order.

    The K products of a row-wise layer are summed in two parts, which moves the sum by at most about sqrt(K) u of its
    size, 1.7e-6 for K = 768 and u = 2**-24. Eight such layers add to 5e-6 in squares, and the blocks after the first
    amplify what enters them by a small factor: 4 is allowed for.
    """
    assert_close(actual, expected, rms=2e-5, peak=1e-4)


@pytest.mark.parametrize("name", [name for name in PACKED if name != "int8"])
def test_two_ranks_compute_what_one_process_computes(folder, seen, name):
    logits, tokens = outputs(alone(folder / name))
    for rank in seen:
        assert_same_sums(rank[name]["outputs"][0], logits)
        assert torch.equal(rank[name]["outputs"][1], tokens)
    assert "sharing out rows" in seen[0][name]["modules"] and "sharing out columns" in seen[0][name]["modules"]


def test_int8_rounds_each_ranks_columns_on_a_scale_of_their_own(folder, seen):
    """A token's scale is its largest input: over a part of the columns never larger, so no rounding gets coarser.

    The codes of the inputs differ then; what two ranks compute is as far from one process as both are from the dense
    model, not nearer.
    """
    logits, _ = outputs(alone(folder / "int8"))
    dense, _ = outputs(alone(BOOKS_4M))
    two = seen[0]["int8"]["outputs"][0]
    noise = (logits - dense).norm()
    assert (two - dense).norm() < 1.1 * noise and (two - logits).norm() < noise
    assert torch.equal(two, seen[1]["int8"]["outputs"][0])


@pytest.mark.parametrize("name", PACKED)
def test_each_rank_holds_half(folder, seen, name):
    model = alone(folder / name)
    key = "weight" if name == "int8" else "weight_packed"
    for rank in seen:
        assert 2 * rank[name]["bytes"][key] == packed_bytes(model, key) > 0
        scales = rank[name]["bytes"]["weight_scale"] / packed_bytes(model, "weight_scale")
        assert scales == 0.5 if name not in ("whole rows", "int8") else 0.5 < scales < 0.75, (
            "a row's only scale is kept"
        )


def test_load_takes_the_same_keyword(folder, seen):
    for rank in seen:
        assert torch.equal(rank["load"]["outputs"][0], rank["asymmetric"]["outputs"][0]) and rank["load"]["tokenizer"]


def test_saving_gathers_the_whole_layers(folder, seen):
    saved, original = (load_file(folder / name / "model.safetensors") for name in ("saved", "asymmetric"))
    packed = [name for name in original if ".weight_" in name]
    assert len(packed) == 28 * 4 and all(torch.equal(saved[name], original[name]) for name in packed)
    sections = [json.loads((folder / name / "config.json").read_text()) for name in ("saved", "asymmetric")]
    assert sections[0]["quantization_config"] == sections[1]["quantization_config"]


def test_a_cut_through_a_group_names_the_layer_and_what_would_work(seen):
    for rank in seen:
        assert rank["small"] == (
            "ValueError: model.layers.0.self_attn.o_proj: its 64 columns cannot be shared out over tp_size 2, because "
            "w4g64sym can be cut at multiples of 64 only; for this layer tp_size may be [1]"
        )


def test_what_cannot_be_shared_out_is_refused(seen):
    for rank in seen:
        assert rank["experts"].startswith("ValueError: model.layers.0.mlp.experts.0.gate_proj is a packed expert")
        assert rank["style"].startswith(
            "ValueError: model.layers.0.mlp.up_proj is packed, and the tensor parallel style"
        )
        assert rank["on the fly"].startswith("ValueError: tp_size 2: LowbitConfig quantizes whole weights")
        assert rank["device"] == (
            "ValueError: with a distributed_config, which gives each rank its device, device must be auto: cpu"
        )

"""Whole mixtures of experts in common calls: quantized, loaded, saved again, spread over devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from architectures import ARCHITECTURES, logits, tiny, tokens
from helpers import assert_close, tolerance
from lowbit import QuantSpec, load, quantize_
from lowbit.checkpoint import CheckpointWriter
from lowbit.experts import Experts
from lowbit.hf.experts import CONVERTS_FIRST
from lowbit.linear import QuantLinear
from lowbit.quantize import _write as write_folder
from lowbit.spec import ActivationSpec
from packed_folder import rtn

MOE = [name for name, architecture in ARCHITECTURES.items() if architecture.experts]


@pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small
@pytest.mark.parametrize("name", MOE)
def test_models_run_in_common_calls_once_quantized_or_loaded(name: str, tmp_path: Path) -> None:
    """tests/test_architectures.py has the rest of the way: names in the files, the dequantized twin, saving again."""
    model = tiny(name)
    report = quantize_(model, QuantSpec(4, 32, symmetric=name != "gpt_oss"), allow_partial=True)
    together = logits(model, tokens())
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    for ready in (model, loaded):
        of_blocks = [module for module in ready.modules() if isinstance(module, Experts)]
        assert of_blocks and all(module.stacked and len(module._stacks) == 2 for module in of_blocks)
        assert_close(logits(ready, tokens()), together, **tolerance(torch.float32, 64, 128))
        for module in of_blocks:
            module.take_apart()
        assert_close(logits(ready, tokens()), together, **tolerance(torch.float32, 64, 128))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("activations", [ActivationSpec(), ActivationSpec(dynamic=False)], ids=["dynamic", "static"])
def test_w8a8_models_have_the_same_bits_in_common_calls(activations: ActivationSpec, name: str, tmp_path: Path) -> None:
    model, ids = tiny(name), tokens()
    calibration = None if activations.dynamic else torch.cat([ids, ids.flip(1)])
    spec = QuantSpec(8, -1, True, activations)
    report = quantize_(model, spec, calibration=calibration, method="rtn", allow_partial=True)
    together = logits(model, ids)
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    for ready in (model, loaded):
        of_blocks = [module for module in ready.modules() if isinstance(module, Experts)]
        assert of_blocks and all(module._stacks == ("gate_up", "down") for module in of_blocks)
        assert torch.equal(logits(ready, ids), together)
        for module in of_blocks:
            module.take_apart()
        assert torch.equal(logits(ready, ids), together)


def wider(model: nn.Module, pattern: str) -> None:
    """The packed experts that the pattern finds in 8 bits, of the same weights."""
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        experts.take_apart()
        for name, linear in list(experts.named_modules()):
            if isinstance(linear, QuantLinear) and re.search(pattern, name):
                parent, _, child = name.rpartition(".")
                packed = QuantLinear.from_quantized(
                    rtn(linear.dequantize(), QuantSpec(8, -1), torch.float32), linear.bias
                )
                setattr(experts.get_submodule(parent), child, packed.repack())
        experts.repack()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_with_experts_of_several_kinds_has_a_call_for_each(tmp_path: Path) -> None:
    """As config groups of other tools say it: expert 2 and one more projection in 8 bits, expert 0 left dense."""
    model = tiny("qwen3_moe")
    report = quantize_(model, QuantSpec(4, 32), ignore=[r"experts\.0\."], allow_partial=True)
    wider(model, r"^2\.|^3\.down_proj")
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    together = logits(loaded, tokens())
    assert_close(together, logits(model, tokens()), **tolerance(torch.float32, 64, 128))
    of_blocks = [module for module in loaded.modules() if isinstance(module, Experts)]
    for module in of_blocks:
        assert module._stacks == ("gate_up", "gate_up_1", "down", "down_1")
        assert {unit.alone for unit in module._units.values()} == {(0,)} and isinstance(module[0].up_proj, nn.Linear)
        module.take_apart()
    assert of_blocks
    assert_close(logits(loaded, tokens()), together, **tolerance(torch.float32, 64, 128))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, -1, True, ActivationSpec())], ids=QuantSpec.label)
def test_a_device_map_keeps_common_calls_where_experts_stay_on_a_device(spec: QuantSpec, tmp_path: Path) -> None:
    """accelerate hooks every linear of a layer that stays on a device, which is no reason to call it alone; those that
    it fetches for each forward run one by one, so that only those are read that tokens are routed to."""
    model = tiny("mixtral")
    report = quantize_(model, spec, allow_partial=True)
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread, _ = load(tmp_path / "packed", device_map=split, offload_folder=tmp_path / "offload")
    here, away = (layer.mlp.experts for layer in spread.model.layers)
    assert here.stacked and hasattr(here, "_hf_hook")
    assert away.why_not_stackable() == "gate_proj: weights on meta" and not away.stacked
    assert_close(logits(spread, tokens()), logits(model, tokens()), **tolerance(torch.float32, 64, 128))
    here.take_apart()
    assert_close(logits(spread, tokens()), logits(model, tokens()), **tolerance(torch.float32, 64, 128))
    out = spread.generate(tokens()[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(out, model.generate(tokens()[:1], max_new_tokens=4, do_sample=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, of_layer_0",
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),  # merged in its own files too
    ],
)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, -1, True, ActivationSpec())], ids=QuantSpec.label)
def test_dense_experts_of_another_layer_keep_the_names_of_the_original(
    name: str, of_layer_0: str, spec: QuantSpec, tmp_path: Path
) -> None:
    """W8A8 tensors are called ``weight`` as dense ones are; only layer 0's may be merged in loading."""
    model = tiny(name)
    report = quantize_(model, spec, ignore=[r"layers\.0\.mlp\.experts", "lm_head"], allow_partial=True)
    expected = logits(model, tokens())
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(loaded, tokens()), expected)
    assert [isinstance(layer.mlp.experts, Experts) for layer in loaded.model.layers] == [False, True]
    if not CONVERTS_FIRST and name == "mixtral":  # transformers before 5.21 would write wrong names
        with pytest.raises(ValueError, match=r"dense beside packed ones need transformers 5\.21"):
            loaded.save_pretrained(tmp_path / "again")
        assert of_layer_0 in load_file(tmp_path / "packed" / "model.safetensors")
        return
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again")]
    assert of_layer_0 in files[0] and set(files[0]) == set(files[1])
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())

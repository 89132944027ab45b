"""quantize_ on a transformers model: what it leaves is what loading a packed folder gives, to the last file written."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lowbit
from lowbit.activations import build_spec
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.run import ModuleStore
from lowbit.spec import QuantSpec

BOOKS = Path(__file__).parent.parent / "eval" / "data" / "books-4m"


@pytest.fixture
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BOOKS)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(48).view(2, 24) * 7 % 4096).logits


@pytest.mark.parametrize(
    "spec, method",
    [
        (QuantSpec(bits=8), "rtn"),
        (QuantSpec(bits=4, symmetric=False), "gptq"),
        (build_spec(8, None, None, "int8"), "rtn"),
    ],
    ids=str,
)
def test_save_pretrained_writes_what_loads_again(
    model: PreTrainedModel, tmp_path: Path, spec: QuantSpec, method: str
) -> None:
    tokens = None if method == "rtn" else torch.arange(256).view(4, 64) * 11 % 4096
    lowbit.quantize_(model, spec, method=method, calibration=tokens)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    again, _ = lowbit.load(tmp_path / "out")
    assert sum(isinstance(module, (QuantLinear, Int8Linear)) for module in again.modules()) == 28
    assert torch.equal(logits(again), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


def test_two_passes_with_other_widths_are_one_folder(model: PreTrainedModel, tmp_path: Path) -> None:
    lowbit.quantize_(model, QuantSpec(bits=8), method="rtn", ignore=["self_attn"], allow_partial=True)
    lowbit.quantize_(model, QuantSpec(bits=4), method="rtn", allow_partial=True)
    model.save_pretrained(tmp_path / "out")
    again, _ = lowbit.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    layer = again.model.layers[0]
    assert (layer.self_attn.q_proj.spec.bits, layer.mlp.up_proj.spec.bits) == (4, 8)


def test_a_call_that_was_interrupted_leaves_nothing_that_saves_wrongly(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the linears are packed then: the folder says which."""
    flush, flushed = ModuleStore.flush, []

    def interrupted(self: ModuleStore, device: torch.device) -> None:
        if len(flushed) == 2:
            raise KeyboardInterrupt
        flushed.append(device)
        flush(self, device)

    monkeypatch.setattr(ModuleStore, "flush", interrupted)
    tokens = torch.arange(256).view(4, 64) * 11 % 4096
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize_(model, QuantSpec(bits=8), method="gptq", calibration=tokens)
    model.save_pretrained(tmp_path / "out")
    again, _ = lowbit.load(tmp_path / "out")
    assert 0 < sum(isinstance(module, QuantLinear) for module in again.modules()) < 28
    assert torch.equal(logits(again), logits(model))


def test_dense_results_stay_dense(model: PreTrainedModel, tmp_path: Path) -> None:
    lowbit.quantize_(model, QuantSpec(bits=3), method="rtn", packed=False)
    model.save_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(BOOKS).save_pretrained(tmp_path / "out")
    again, _ = lowbit.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(again.config, "quantization_config")


def test_ignore_is_not_a_string_of_letters(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"sequence of regular expressions, got 'lm_head'; give \['lm_head'\]"):
        lowbit.quantize_(model, QuantSpec(bits=8), method="rtn", ignore="lm_head")
    with pytest.raises(ValueError, match="got 'lm_head'"):
        lowbit.quantize(BOOKS, "never-written", bits=4, method="rtn", ignore="lm_head")

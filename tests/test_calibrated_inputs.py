"""quantize_ fits each weight to the inputs it will read in the quantized model, and says with what error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit import quantize_
from quantized_families import TOKENS, W4, dense_twin, distance, logits, original, packed, quantized
from tiny_models import tiny_model


def spied(monkeypatch, name):
    """Arguments of every call of a function of blockwise.py."""
    import lowbit.blockwise as blockwise

    calls, real = [], getattr(blockwise, name)

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(blockwise, name, spy)
    return calls


@pytest.fixture(params=[False, True], ids=["float32 products", "bfloat16 products"])
def exact_to(request, monkeypatch):
    """How near a Hessian comes to the second moment, multiplied in float32 and in bfloat16."""
    import lowbit.blockwise as blockwise

    monkeypatch.setattr(blockwise, "has_fast_bfloat16_products", lambda: request.param)
    monkeypatch.setattr(blockwise, "_FEWEST_ROUNDED", 1)
    return 2**-8 if request.param else 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_linears_that_read_one_input_share_one_factorization(monkeypatch, family):
    factorized = spied(monkeypatch, "factorize")
    solved = spied(monkeypatch, "gptq_quantize")
    quantize_(tiny_model(family), W4, "gptq", calibration=TOKENS)
    assert len(factorized) == 2 * 4, "attention input, attention output, MLP input, MLP output of two blocks"
    assert len({id(kwargs["factor"]) for _, kwargs in solved}) == 2 * 4
    assert sum(len(args[0]) for args, _ in solved) == sum(
        m.out_features for n, m in original(family).named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )


QKV = {"q_proj", "k_proj", "v_proj"}
READ_BEFORE_ANYTHING_IS_QUANTIZED = {
    "llama": QKV,
    "gemma3": QKV,
    "opt": QKV,
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},  # attention and MLP side by side
}
"""Linears of the first block whose inputs come straight from the embeddings."""


@pytest.mark.parametrize("family", READ_BEFORE_ANYTHING_IS_QUANTIZED)
def test_every_hessian_is_of_the_inputs_in_the_quantized_model(monkeypatch, exact_to, family):
    """True-sequential, within a block and from block to block: each weight was fitted to what it will read."""
    solved = spied(monkeypatch, "gptq_quantize")
    model = tiny_model(family)
    report = quantize_(model, W4, "gptq", calibration=TOKENS)
    final, first = _second_moments(dense_twin(model)), _second_moments(tiny_model(family))
    layers, hessians = iter(report.layers), {}
    for (weight, hessian, *_), _ in solved:  # linears of one input are solved together, stacked
        rows = 0
        while rows < len(weight):
            layer = next(layers)
            rows, hessians[layer.name] = rows + layer.shape[0], hessian
        assert rows == len(weight)
    assert hessians.keys() == final.keys()
    assert all(distance(hessian, final[name]) < exact_to for name, hessian in hessians.items())
    same = {name.rpartition(".")[2] for name in hessians if distance(final[name], first[name]) < 1e-3}
    assert same == READ_BEFORE_ANYTHING_IS_QUANTIZED[family]
    changed = (name for name in hessians if name.rpartition(".")[2] not in same)
    assert all(distance(hessians[name], first[name]) > exact_to for name in changed)


def _second_moments(model):
    """``E[x x^T]`` of every decoder linear's input, in float64."""
    found = {}

    def hook(name):
        def record(_, args):
            x = args[0].flatten(0, -2).double()
            found[name] = x.T @ x / len(x)

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    logits(model)
    return found


def test_the_reported_loss_is_the_error_of_the_outputs(exact_to):
    """Recomputed in float64 from the first weights of the model, whose inputs are the original ones."""
    model = tiny_model("llama")
    report = quantize_(model, W4, "rtn", calibration=TOKENS)
    name = "model.layers.0.self_attn.q_proj"
    moment = _second_moments(tiny_model("llama"))[name]
    weight = original("llama").get_submodule(name).weight.detach().double()
    error = packed(model)[name].dequantize(torch.float64) - weight
    expected = float((error @ moment * error).sum() / (weight @ moment * weight).sum())
    record = next(layer for layer in report.layers if layer.name == name)
    assert record.loss == pytest.approx(expected, rel=10 * exact_to)
    assert record.loss == record.rtn_loss


def test_without_correction_gptq_aims_at_the_original_weights(monkeypatch):
    solved = spied(monkeypatch, "gptq_quantize")
    quantize_(tiny_model("llama"), W4, "gptq", calibration=TOKENS, correct=False)
    assert all(kwargs["target"] is None or torch.equal(kwargs["target"], args[0]) for args, kwargs in solved)
    solved.clear()
    quantize_(tiny_model("llama"), W4, "gptq", calibration=TOKENS)
    assert not torch.equal(solved[-1][1]["target"], solved[-1][0][0])


def test_two_runs_give_the_same_bits():
    for method in ("gptq", "awq"):
        again = tiny_model("llama")
        quantize_(again, W4, method, calibration=TOKENS)
        before = quantized("llama", method)[0].state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_bfloat16_model_stays_one():
    for method in ("gptq", "awq"):
        model = tiny_model("llama").bfloat16()
        report = quantize_(model, W4, method, calibration=TOKENS)
        assert {p.dtype for p in model.state_dict().values()} == {torch.bfloat16, torch.int32, torch.int64}
        assert all(layer.loss < 0.02 for layer in report.layers)
        reference = logits(original("llama"))
        assert distance(logits(model).float(), reference) < 0.35

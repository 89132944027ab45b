"""A mistyped word is named before a data set is fetched for it: by default the text is wikitext2, from the hub."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import lowbit
from lowbit.cli import main
from refusals import ENV
from tiny_models import BOOKS_4M

MODEL = str(BOOKS_4M)


@pytest.fixture
def no_text(monkeypatch):
    """Fails the test when a text is asked for, by whichever module."""
    for name in ("lowbit.data", "lowbit.quantize", "lowbit.evaluate"):
        importlib.import_module(name)
        module = sys.modules[name]  # the package's attributes of these names are its functions
        monkeypatch.setattr(module, "load_text", lambda *_, **__: pytest.fail("the text was fetched first"))


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["quantize", "no/such/model", "OUT"], "no/such/model"),
        (["quantize", MODEL, "OUT", "--dtype", "float23"], "float23"),
        (["quantize", MODEL, "OUT", "--device", "tpu"], "tpu"),
        (["eval", "no/such/model"], "no/such/model"),
        (["eval", MODEL, "--base", "no/such/base"], "no/such/base"),
        (["eval", MODEL, "--dtype", "float23"], "float23"),
        (["eval", MODEL, "--device", "tpu"], "tpu"),
        (["eval", MODEL, "--seq-len", "1"], "seq_len must be an integer of at least 2 tokens, got 1"),
        (["eval", MODEL, "--max-windows", "0"], "max_windows must be a positive integer or None, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_word_is_named_and_no_text_is_fetched(no_text, tmp_path, monkeypatch, capsys, command, word):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": "no/such/base"}, FileNotFoundError, "no/such/base"),
        ({"seq_len": 1}, ValueError, "seq_len must be"),
        ({"max_windows": 0}, ValueError, "max_windows must be"),
    ],
    ids=["base", "seq_len", "max_windows"],
)
def test_evaluate_refuses_before_it_fetches_the_text(no_text, options, error, message):
    model, tokenizer = lowbit.load(MODEL, device="cpu")
    with pytest.raises(error, match=message):
        lowbit.evaluate(model, tokenizer, **options)


@pytest.mark.parametrize(
    "command",
    [["eval", "MODEL", "--data", "missing.txt"], ["quantize", "MODEL", "OUT", "--calibration", "missing.txt"]],
    ids=lambda command: command[0],
)
def test_of_a_missing_model_and_a_missing_text_the_model_is_named(refused, tmp_path, command):
    missing = str(tmp_path / "nothing")
    assert missing in refused([missing if word == "MODEL" else word for word in command])


def test_a_mistyped_folder_that_could_be_a_hub_id_is_looked_for_first(tmp_path):
    """``w5`` for ``w4``: the hub is asked for a model of that name (here it cannot be), and for nothing else."""
    command = [sys.executable, "-m", "lowbit", "eval", "w5"]
    environment = {**ENV, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("lowbit: error: no folder w5 here, and no model of that id could be fetched")
    assert "wikitext" not in done.stderr

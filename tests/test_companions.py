"""What quantize takes over beside the weights: a tokenizer that opens, its code, and a word on what was rounded."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lowbit
from packed_folder import edit_tensors, names_in
from tiny_models import BOOKS_4M, tiny_folder

MODULE: Any = importlib.import_module("lowbit.quantize")  # ``lowbit.quantize`` itself is the function
TEXT = "a truth universally acknowledged"

OWN_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "{vocabulary}"}}

    def __init__(self, vocab_file, **kwargs):
        self.tokens = (Path(vocab_file).parent / "{read}").read_text().split()
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {{token: i for i, token in enumerate(self.tokens)}}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.tokens.index(token) if token in self.tokens else 0

    def _convert_id_to_token(self, index):
        return self.tokens[index]
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps the code of models here, not in the home folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def with_own_tokenizer(path: Path, vocabulary: str, read: str | None = None) -> Path:
    """A model folder whose tokenizer comes with code, as Kimi's: it names the file ``vocabulary``, reads ``read``."""
    folder = tiny_folder(path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER.format(vocabulary=vocabulary, read=read or vocabulary))
    fields = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    for name in {vocabulary, read or vocabulary}:
        (folder / name).write_text("\n".join("?etaoinshrdlucmfwypvbgkjqxz"))
    return folder


def with_phobert_tokenizer(path: Path) -> Path:
    """A model folder with a tokenizer of transformers' own that reads vocab.txt and bpe.codes."""
    folder = tiny_folder(path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))
    (folder / "vocab.txt").write_text("".join(f"{token} 1\n" for token in ["tr@@", "uth", "a", "t@@", "r@@", "h"]))
    (folder / "bpe.codes").write_text("t r 9\nh </w> 3\n")
    return folder


def quantize(source: Any, out: Path, **options: Any) -> Any:
    return lowbit.quantize(source, out, group_size=32, method="rtn", verbose=False, **options)


# --- the tokenizer opens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", ["tiktoken.model", "words.bin"])
def test_a_vocabulary_travels_whatever_the_tokenizer_calls_it(vocabulary: str, tmp_path: Path) -> None:
    source = with_own_tokenizer(tmp_path / "own", vocabulary)
    quantize(source, tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out" / vocabulary).read_bytes() == (source / vocabulary).read_bytes()
    lowbit.convert(tmp_path / "out", tmp_path / "dense", "dense", verbose=False)
    expected = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    for folder in (tmp_path / "out", tmp_path / "dense"):
        _, tokenizer = lowbit.load(folder, device="cpu", trust_remote_code=True)
        assert tokenizer(TEXT)["input_ids"] == expected(TEXT)["input_ids"]


def test_all_files_of_a_tokenizer_travel(tmp_path: Path) -> None:
    source = with_phobert_tokenizer(tmp_path / "phobert")
    quantize(source, tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == expected


def test_code_of_the_tokenizer_alone_travels(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    (source / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "out", trust_remote_code=True)
    _, tokenizer = lowbit.load(tmp_path / "out", device="cpu", trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"


def test_code_nobody_names_stays(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    (source / "train.py").touch()
    (source / "vocab.spm").touch()
    quantize(source, tmp_path / "out")
    assert {"train.py", "vocab.spm"} & set(names_in(tmp_path / "out")) == {"vocab.spm"}


def test_a_tokenizer_that_would_not_open_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_own_tokenizer(tmp_path / "own", "tiktoken.model", read="words.bin")  # which nothing tells of
    monkeypatch.setattr(MODULE, "run", lambda *args: pytest.fail("the work began"))
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer cannot be opened .*'tiktoken.model', .*Unable to load vocabulary"):
        quantize(source, tmp_path / "out", trust_remote_code=True)
    assert set(names_in(tmp_path)) <= {*before, "modules"}


# --- the source is asked for once ------------------------------------------------------------------------------------


def test_tokenizer_and_weights_are_of_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = [tiny_folder(tmp_path / "first"), tiny_folder(tmp_path / "second")]
    (revisions[1] / "tokenizer_config.json").write_text("{}")
    left = iter(revisions)
    monkeypatch.setattr("lowbit.hf.source.snapshot_download", lambda name, **_: str(next(left)))
    quantize("somebody/model", tmp_path / "out")
    assert next(left) is revisions[1]
    written = (tmp_path / "out" / "tokenizer_config.json").read_bytes()
    assert written == (revisions[0] / "tokenizer_config.json").read_bytes()


def test_a_source_that_goes_away_during_the_work_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, work = tiny_folder(tmp_path / "source"), MODULE.run

    def run(*args: Any) -> None:
        source.rename(tmp_path / "elsewhere")
        work(*args)

    monkeypatch.setattr(MODULE, "run", run)
    quantize(source, tmp_path / "out")
    assert lowbit.load(tmp_path / "out", device="cpu")[1](TEXT)["input_ids"]


# --- a repository with code on the hub -------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a packed repository with a tokenizer's code; of it a fetch brings what the client's patterns let by."""
    packed = tmp_path / "packed"
    quantize(with_own_tokenizer(tmp_path / "own", "tiktoken.model"), packed, trust_remote_code=True)

    def snapshot_download(name: str, **patterns: Any) -> str:
        snapshot = Path(tempfile.mkdtemp(dir=tmp_path))
        for file in filter_repo_objects(names_in(packed), **patterns):
            shutil.copyfile(packed / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr("lowbit.hf.source.snapshot_download", snapshot_download)
    return "somebody/packed"


def test_looking_and_converting_run_no_code_and_need_no_trust(hub: str, tmp_path: Path) -> None:
    assert lowbit.inspect(hub).hashes_verified
    lowbit.convert(hub, tmp_path / "gptq", "gptq", dtype="float16", verbose=False)
    assert {"tokenization_own.py", "tiktoken.model"} <= set(names_in(tmp_path / "gptq"))


def test_loading_without_trust_says_what_is_needed(hub: str) -> None:
    with pytest.raises(ValueError, match=r"Python files .*'tokenization_own.py'.*--trust-remote-code"):
        lowbit.load(hub, device="cpu")
    assert lowbit.load(hub, device="cpu", trust_remote_code=True)[1](TEXT)["input_ids"]


# --- what loading rounded --------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """books-4m, which is bfloat16, with float32 norms."""

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items() if name.endswith("layernorm.weight")})

    folder = Path(shutil.copytree(BOOKS_4M, tmp_path / "mixed"))
    edit_tensors(folder, widen)
    return folder


def test_finer_tensors_than_the_models_dtype_are_counted_and_named(mixed: Path, tmp_path: Path) -> None:
    report = quantize(mixed, tmp_path / "out")
    source = load_file(mixed / "model.safetensors")
    wide = sorted(name for name, tensor in source.items() if tensor.dtype == torch.float32)
    counted = f"{len(wide)} of {len(source)} tensors are float32 in the source's files and were rounded to bfloat16"
    (note,) = (note for note in report.notes if "rounded" in note)
    assert note.startswith(counted) and wide[0] in note
    assert note in lowbit.inspect(tmp_path / "out").record["notes"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {written[name].dtype for name in wide} == {torch.bfloat16}


def test_rounding_is_noted_where_it_was_not_asked_for(mixed: Path, tmp_path: Path) -> None:
    reports = {dtype: quantize(mixed, tmp_path / dtype, dtype=dtype) for dtype in ("auto", "float32", "bfloat16")}
    noted = {dtype for dtype, report in reports.items() if any("rounded" in note for note in report.notes)}
    assert noted == {"auto"}
    assert not any("rounded" in note for note in quantize(BOOKS_4M, tmp_path / "plain").notes)

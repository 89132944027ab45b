"""Where text comes from, and how it becomes token windows."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from lowbit.data import WIKITEXT2, TextSource, check_vocabulary, load_text, token_windows


def byte_tokenizer(text: str, verbose: bool = True) -> SimpleNamespace:
    """One token per byte after a BOS (256), counting its calls."""
    byte_tokenizer.calls += 1
    return SimpleNamespace(input_ids=[256, *text.encode()])


byte_tokenizer.calls = 0


# --- text files


def test_a_txt_file_is_one_text_with_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("“Never,” he said.\r\nÉnd".encode())
    source = load_text(str(path), "test")
    assert source == TextSource(str(path), "“Never,” he said.\r\nÉnd", hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_text(path, "train") == source, "a path object reads the same, and a file has no splits"


def test_jsonl_rows_are_joined_by_a_blank_line_empty_rows_included(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ["", " = Title = ", "", "one line separator inside"]
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_text(str(path), "test").text == "\n\n".join(rows)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_text(str(tmp_path / "nowhere.txt"), "test")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.* is empty"):
        load_text(str(tmp_path / name), "test")


def test_rows_that_are_all_empty_are_an_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(ValueError, match="is empty"):
        load_text(str(tmp_path / "a.jsonl"), "test")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"txt": "a"}', "line 2: .*'text'"),
        ("[1]", "line 2"),
        ('{"text": 3}', "line 2"),
    ],
)
def test_a_damaged_jsonl_row_is_named_by_its_line(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        load_text(str(tmp_path / "a.jsonl"), "test")


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt.* not UTF-8: byte 3"):
        load_text(str(tmp_path / "latin.txt"), "test")


@pytest.mark.parametrize("kind", ["folder", "a.csv", "two words", ""])
def test_anything_else_is_refused_with_what_is_allowed(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"wikitext2, a file \*\.txt or \*\.jsonl, a hub data set"):
        load_text(kind, "test")


def test_the_split_is_train_or_test():
    with pytest.raises(ValueError, match="validation"):
        load_text("wikitext2", "validation")


# --- the hub: `datasets` itself, its download replaced by a local file


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set of three rows; records what was asked for."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ("first row", "", "third row")))
    load = datasets.load_dataset
    asked = []

    def load_dataset(repo, config, *, split, streaming):
        asked.append((repo, config, split, streaming))
        return load("json", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext2_is_the_raw_data_set_and_the_asked_split(hub):
    source = load_text("wikitext2", "test")
    assert source.text == "first row\n\n\n\nthird row"
    assert source.name == f"{WIKITEXT2} (test)"
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)]


def test_a_hub_id_may_name_a_config(hub):
    load_text("allenai/c4:en", "train")
    load_text("some/books", "train")
    assert hub == [("allenai/c4", "en", "train", False), ("some/books", None, "train", False)]


def test_a_limited_read_streams_and_stops_at_the_row_that_reaches_it(hub):
    assert load_text("some/books", "train", max_chars=5).text == "first row"
    assert load_text("some/books", "train", max_chars=12).text == "first row\n\n"
    assert load_text("some/books", "train", max_chars=10_000).text == "first row\n\n\n\nthird row"
    assert all(streaming for *_, streaming in hub)


def test_an_unreachable_hub_is_one_error_that_says_what_needs_no_network(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"Salesforce/wikitext.*Couldn't reach.*local \*\.txt"):
        load_text("wikitext2", "test")


def test_a_data_set_without_text_names_its_columns(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"story": ["a"], "title": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(ValueError, match=r"no column 'text'.*story.*title"):
        load_text("some/stories", "test")


# --- windows


def test_windows_come_from_one_tokenizer_call_and_the_tail_is_dropped():
    before = byte_tokenizer.calls
    windows = token_windows(byte_tokenizer, "abcdefghij", 4)
    assert byte_tokenizer.calls == before + 1
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[256, *b"abc"], [*b"defg"]], "a BOS once, at the start; `hij` does not fill a window"


def test_max_windows_keeps_the_first():
    assert token_windows(byte_tokenizer, "abcdefghij", 4, max_windows=1).tolist() == [[256, *b"abc"]]
    assert len(token_windows(byte_tokenizer, "abcdefghij", 4, max_windows=99)) == 2


def test_a_text_that_fills_exactly_one_window_is_enough_and_one_token_less_is_not():
    assert token_windows(byte_tokenizer, "abc", 4).shape == (1, 4)
    with pytest.raises(ValueError, match=r"3 tokens.*shorter than one window of 4"):
        token_windows(byte_tokenizer, "ab", 4)


@pytest.mark.parametrize("seq_len", [1, 0, -8, 2.0, None])
def test_a_window_has_at_least_one_target(seq_len):
    with pytest.raises(ValueError, match=f"seq_len.*{seq_len}"):
        token_windows(byte_tokenizer, "abcdef", seq_len)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_max_windows_is_positive(count):
    with pytest.raises(ValueError, match=f"max_windows.*{count}"):
        token_windows(byte_tokenizer, "abcdef", 2, count)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="no tokenizer"):
        token_windows(None, "abcdef", 2)


def test_token_ids_have_to_be_in_the_vocabulary():
    windows = torch.tensor([[0, 255], [256, 3]])
    check_vocabulary(windows, 257)
    with pytest.raises(ValueError, match=r"0 to 256.*256 entries"):
        check_vocabulary(windows, 256)
    with pytest.raises(ValueError, match="-1"):
        check_vocabulary(windows - 1, 257)


def test_the_repository_s_texts_are_what_their_page_says():
    data = Path(__file__).parent.parent / "eval" / "data"
    calib, test = (load_text(data / name, "test").text for name in ("books-calib.txt", "books-test.txt"))
    assert (round(len(calib.encode()) / 1e3), round(len(test.encode()) / 1e3)) == (501, 249)
    assert calib.startswith("Chapter I.") and test.startswith("It is a truth universally acknowledged")

"""Text for calibration and evaluation: a file or a data set on the hub, as one string, cut into token windows.

The rows of a data set are joined by a blank line and tokenized in one call, as in the GPTQ paper's code, so that the
windows are the same token for token wherever they are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["TextSource", "check_cut", "check_vocabulary", "load_text", "token_windows"]

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
"""What the short name ``wikitext2`` stands for on the hub."""

ROW_SEPARATOR = "\n\n"

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class TextSource:
    """A text, what it is called in reports, the sha256 of its UTF-8 bytes (hex), and whether it came from a file."""

    name: str
    text: str
    sha256: str
    is_file: bool = True


def load_text(source: str | os.PathLike[str], split: str, *, max_chars: int | None = None) -> TextSource:
    """Reads a text.

    Args:
        source: ``wikitext2``; a file ``*.txt`` (UTF-8, one text) or ``*.jsonl`` (a JSON object with a ``text`` string
            per line); or a data set on the Hugging Face hub, ``owner/name`` or ``owner/name:config``, with a ``text``
            column.
        split: ``train`` (calibration) or ``test`` (evaluation). A file has no splits and is read whole.
        max_chars: stop after the first row of a hub data set that reaches this length and stream the rows until then,
            which is how a few windows of a data set too large to download are read. None reads all rows.

    Raises:
        FileNotFoundError: the file is missing.
        OSError: the hub cannot be reached, or has no such data set.
        ValueError: the source is of no known kind, is not UTF-8, a row has no ``text``, or the text is empty.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    source = os.fspath(source)
    path = Path(source)
    hub = _HUB_ID.fullmatch(WIKITEXT2 if source == "wikitext2" else source)
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"text file {source!r} does not exist")
        name = source
        text = _decode(path) if path.suffix == ".txt" else _join_jsonl(path)
    elif hub and not path.exists():
        name = f"{hub[0]} ({split})"
        text = _join_hub(hub["repo"], hub["config"], split, max_chars)
    else:
        raise ValueError(
            f"text source {source!r} is none of: wikitext2, a file *.txt or *.jsonl, a hub data set owner/name[:config]"
        )
    if not text.strip():
        raise ValueError(f"text source {source!r} is empty")
    return TextSource(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), path.suffix in (".txt", ".jsonl"))


def token_windows(tokenizer: Any, text: str, seq_len: int, max_windows: int | None = None) -> torch.Tensor:
    """Tokenizes ``text`` in one call and cuts it into non-overlapping windows; what is left at the end is dropped.

    Args:
        tokenizer: callable, ``tokenizer(text).input_ids`` is a list of ints (any Hugging Face tokenizer). It adds its
            special tokens as it does by default: a BOS once, at the very start.
        seq_len: tokens per window, at least 2.
        max_windows: keep at most this many windows, from the start.

    Returns:
        int64 tensor ``(windows, seq_len)`` on the CPU.

    Raises:
        ValueError: ``seq_len`` or ``max_windows`` is out of range, the tokenizer is None, or the text is shorter than
            one window.
    """
    check_cut(seq_len, max_windows)
    if tokenizer is None:
        raise ValueError(
            "there is no tokenizer: the model's folder has no tokenizer files (tokenizer.json or the like)"
        )
    # verbose=False: a text longer than the model's context is meant here, the tokenizer would warn about it.
    ids = torch.as_tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64, device="cpu")
    count = ids.numel() // seq_len
    if count == 0:
        raise ValueError(f"the text has {ids.numel()} tokens, which is shorter than one window of {seq_len} tokens")
    windows = ids[: count * seq_len].view(count, seq_len)
    return windows if max_windows is None else windows[:max_windows]


def check_cut(seq_len: int, max_windows: int | None = None) -> None:
    """Refuses lengths and numbers of windows that no text can be cut into; callers ask before they fetch one.

    Raises:
        ValueError: ``seq_len`` is not an integer of at least 2, or ``max_windows`` neither None nor a positive one.
    """
    if type(seq_len) is not int or seq_len < 2:
        raise ValueError(f"seq_len must be an integer of at least 2 tokens, got {seq_len!r}")
    if max_windows is not None and (type(max_windows) is not int or max_windows < 1):
        raise ValueError(f"max_windows must be a positive integer or None, got {max_windows!r}")


def check_vocabulary(windows: torch.Tensor, vocab_size: int) -> None:
    """Refuses token ids outside ``[0, vocab_size)``, which a model would read out of bounds.

    Raises:
        ValueError: names the smallest and largest id and the vocabulary's size.
    """
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids run from {low} to {high}, but the model's vocabulary has {vocab_size} entries (0 to "
            f"{vocab_size - 1}): this tokenizer does not belong to this model"
        )


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8: byte {error.start} ({error.reason})") from error


def _join_jsonl(path: Path) -> str:
    content = _decode(path).rstrip()
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n") if content else (), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{str(path)!r}, line {number}: expected a JSON object with a string field 'text'")
        rows.append(row["text"])
    return ROW_SEPARATOR.join(rows)


def _join_hub(repo: str, config: str | None, split: str, max_chars: int | None) -> str:
    import datasets

    label = repo if config is None else f"{repo}:{config}"
    try:
        rows = datasets.load_dataset(repo, config, split=split, streaming=max_chars is not None)
        columns = rows.column_names or []
        if "text" not in columns:
            raise ValueError(f"it has no column 'text'; its columns are {columns}")
        # One column of a table reads in bulk; a stream has to be walked row by row.
        return _join_rows(rows["text"] if max_chars is None else (row["text"] for row in rows), max_chars)
    except Exception as error:  # `datasets` lets anything through, from its own classes to those of its HTTP client
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(
            f"data set {label!r} (split {split!r}) cannot be read from the Hugging Face hub: {error}. "
            "A local *.txt or *.jsonl file needs no network."
        ) from error


def _join_rows(rows: Iterable[str], max_chars: int | None) -> str:
    kept, length = [], 0
    for row in rows:
        kept.append(row)
        length += len(row) + len(ROW_SEPARATOR)
        if max_chars is not None and length >= max_chars:
            break
    return ROW_SEPARATOR.join(kept)

"""The rows of eval/quality_table.py: kept in a CSV, shown as Markdown."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from peer_results import Peers

from lowbit.evaluate import DEFINITION

__all__ = ["COLUMNS", "METHODS", "Row", "Table"]

Row = dict[str, str]

METHODS = ("rtn", "rtn (weighted)", "awq", "gptq", "awq+gptq")
"""In the order of the tables. ``rtn`` is without data; weighted, it searches its grid with E[x^2] of the inputs."""

COLUMNS = (
    "model", "method", "spec", "bits", "ppl", "base_ppl", "kl", "top1", "seconds", "peer_ppl", "peer_kl", "kl_ratio",
    "data", "data_sha256", "windows", "seq_len", "calibration", "calibration_sha256", "samples", "dtype", "hardware",
    "threads", "lowbit", "lowbit_sources", "torch", "transformers", "command",
)  # fmt: skip

_IDENTITY = (
    "model", "method", "spec", "data_sha256", "windows", "seq_len", "calibration_sha256", "samples", "dtype",
)  # fmt: skip
"""What is measured: the table holds one row of each."""

_CODE = ("lowbit_sources", "torch", "transformers")
"""What measured it: a row made by other code is out of date."""


class Table:
    """PREFIX.csv and PREFIX.md, both replaced as a whole by :meth:`write`.

    Args:
        prefix: path without extension; the rows of an existing CSV are kept.
        peers: figures to put beside ours.
        force: treat the rows of an existing CSV as out of date.

    Raises:
        ValueError: the CSV has other columns.
    """

    def __init__(self, prefix: str, peers: Sequence[Peers] = (), *, force: bool = False) -> None:
        self.csv_path, self.markdown_path = Path(f"{prefix}.csv"), Path(f"{prefix}.md")
        self._peers = peers
        self._rows = {_identity(row): row for row in _read(self.csv_path)}
        self._stale = set(self._rows) if force else set()

    def has(self, row: Row) -> bool:
        """Whether a row of this identity, made by the same code, is there."""
        known = self._rows.get(_identity(row))
        return known is not None and _identity(row) not in self._stale and all(known[c] == row[c] for c in _CODE)

    def put(self, row: Row) -> None:
        """Adds a row, or replaces the one of its identity, and writes both files."""
        self._stale.discard(_identity(row))
        self._rows[_identity(row)] = {column: row.get(column, "") for column in COLUMNS}
        self.write()

    def write(self) -> None:
        """Writes both files, the peers' figures filled in."""
        rows = sorted(self._rows.values(), key=_order)
        for row in rows:
            for peers in self._peers:
                _compare(row, peers)
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _replace(self.csv_path, text.getvalue())
        _replace(self.markdown_path, _markdown(rows, self._peers))

    def left_out(self) -> list[str]:
        """Why figures of the peers' files stand beside none of ours, a line per reason."""
        groups = {(row["model"], row["data"], row["windows"]): row for row in self._rows.values()}
        reasons = (_mismatch(row, peers) for peers in self._peers for row in groups.values())
        return sorted({f"other tools' figures are not shown: {reason}" for reason in reasons if reason})


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in _IDENTITY)


def _order(row: Row) -> tuple[object, ...]:
    bits, group = map(int, re.findall(r"\d+", row["spec"] + "0")[:2])  # a whole row's "gch" sorts as group 0
    method = METHODS.index(row["method"])
    return _text_of(row), -bits, group, row["spec"].endswith("asym"), method, row["calibration"], int(row["samples"])


def _text_of(row: Row) -> tuple[str, ...]:
    """What rows of one Markdown table share."""
    return tuple(row[c] for c in ("model", "data", "data_sha256", "windows", "seq_len", "dtype"))


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{str(path)!r} is not a table of this version: its columns are {reader.fieldnames}")
        return list(reader)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _mismatch(row: Row, peers: Peers) -> str | None:
    return peers.mismatch(row["model"], row["data"], int(row["windows"]), float(row["base_ppl"]))


def _compare(row: Row, peers: Peers) -> None:
    theirs = peers.of(row["method"], row["spec"], row["data"])
    if theirs is not None and _mismatch(row, peers) is None:
        row["peer_ppl"], row["peer_kl"] = str(theirs["ppl"]), str(theirs["kl"])
        row["kl_ratio"] = f"{float(row['kl']) / theirs['kl']:.4f}"


def _markdown(rows: Sequence[Row], peers: Sequence[Peers]) -> str:
    parts = ["# Quality of quantized models\n\nWritten by `eval/quality_table.py`; the CSV beside has all digits.\n"]
    parts += [_section(list(group), peers) for _, group in groupby(rows, _text_of)]
    parts.append(
        "## How these figures are made\n\n"
        f"{DEFINITION}\n\n"
        "The decoder's linear weights are quantized in memory (`lowbit.quantize_`, `packed=False`), embeddings and "
        "lm_head stay dense. w8a8 specs also quantize the linears' inputs and run as packed modules, with one input "
        "scale per token, or (static) one per layer of least squared error over the calibration inputs; +smoothA: "
        "SmoothQuant with alpha A first. "
        "bits: stored bits per quantized weight, scales (in the run's dtype) and zeros counted. "
        "rtn uses no data; rtn (weighted) searches its grid with the second moments of calibration inputs. "
        "s: wall time of quantizing.\n"
    )
    parts.append(_list("Versions and hardware", (_versions(row) for row in rows)))
    shown = [p for p in peers if any(_mismatch(row, p) is None for row in rows)]
    if shown:
        parts.append(_list("Other tools", ("; ".join(f"{k}: {v}" for k, v in p.about.items()) for p in shown)))
    parts.append(_list("Commands", (f"`{row['command']}`" for row in rows)))
    return "\n".join(parts)


def _list(title: str, lines: Iterable[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {line}\n" for line in dict.fromkeys(lines))


def _versions(row: Row) -> str:
    return (
        f"lowbit {row['lowbit']}, sources {row['lowbit_sources']}; torch {row['torch']}, transformers "
        f"{row['transformers']}; {row['hardware']}, {row['threads']} threads"
    )


def _section(rows: Sequence[Row], peers: Sequence[Peers]) -> str:
    """The table of one model on one text."""
    first = rows[0]
    calibrations = dict.fromkeys(_calibration(row) for row in rows if row["calibration"])
    beside = any(row["peer_kl"] for row in rows)
    lines = [
        f"## {first['model']} on {first['data']}\n",
        f"First {first['windows']} windows of {first['seq_len']} tokens, {first['dtype']}, text sha256 "
        f"{first['data_sha256'][:12]}; the original's perplexity is {float(first['base_ppl']):.3f}. "
        f"Calibration: {'; '.join(calibrations) or 'none'}.\n",
    ]
    header = ["spec", "method", "bits", "perplexity", "KL", "top-1", "s"]
    if beside:
        header += ["llm-compressor: perplexity", "llm-compressor: KL", "KL, ours / theirs"]
    lines += [_cells(header), _cells(["---", "---", *["---:"] * (len(header) - 2)])]
    for spec, group in groupby(rows, lambda row: row["spec"]):
        same_spec = list(group)
        lines += [_cells(_own_cells(row, beside, len(calibrations) > 1)) for row in same_spec]
        methods = {row["method"] for row in same_spec}
        for peer in peers:
            if _mismatch(first, peer) is None:
                for name, theirs in peer.others(methods, spec, first["data"]):
                    lines.append(_cells([spec, f"*{name}*", "", *_figures(theirs), *[""] * (len(header) - 6)]))
    return "\n".join(lines) + "\n"


def _calibration(row: Row) -> str:
    return f"first {row['samples']} windows of {row['calibration']} (sha256 {row['calibration_sha256'][:12]})"


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _own_cells(row: Row, beside: bool, name_calibration: bool) -> list[str]:
    method = row["method"]
    if name_calibration and row["calibration"]:
        method += f", {row['samples']} x {row['calibration']}"
    seconds = f"{float(row['seconds']):.1f}"
    cells = [row["spec"], method, f"{float(row['bits']):.3f}", *_figures(row), seconds]
    if beside and row["peer_kl"]:
        cells += [f"{float(row['peer_ppl']):.3f}", f"{float(row['peer_kl']):.5f}", f"{float(row['kl_ratio']):.3f}"]
    elif beside:
        cells += [""] * 3
    return cells


def _figures(row: dict[str, str]) -> list[str]:
    return [f"{float(row['ppl']):.3f}", f"{float(row['kl']):.5f}", f"{100 * float(row['top1']):.2f} %"]

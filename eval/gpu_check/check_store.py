"""Results as they come: one line of JSON per finished case, so that a stopped run can be continued.

A record is reused only if it was made from the same sources on the same GPU with the same versions: what is measured
again costs minutes, and what is not measured at all is a lie.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Store", "write_csv"]

IDENTITY = ("gpu", "driver", "torch", "triton", "cuda", "sources")
"""What must agree for a record to be reused."""


class Store:
    """``records.jsonl`` in a folder. Each line: part, case, about (the machine), and the case's result.

    Args:
        folder: made when missing.
        about: the machine and the versions, see check_device.py.
        resume: keep the records that are there; otherwise there must be none.

    Raises:
        FileExistsError: there are records and ``resume`` is false.
        ValueError: a line is not a record.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about = folder, dict(about)
        self._path = folder / "records.jsonl"
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self.stale = 0
        if not self._path.exists():
            return
        if not resume:
            raise FileExistsError(f"{self._path} holds an earlier run; --resume continues it, or name another folder")
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            self._take(line, number)

    def _take(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            key, identity = (record["part"], record["case"]), record["about"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if not line.endswith("}"):  # the process was killed while it wrote its last line
                return
            raise ValueError(f"{self._path}, line {number} is not a record: {error}") from error
        if all(identity.get(name) == self.about.get(name) for name in IDENTITY):
            self._found[key] = record
        else:
            self.stale += 1

    def has(self, part: str, case: str) -> bool:
        """Whether this case was finished."""
        return (part, case) in self._found

    def add(self, part: str, case: str, result: Mapping[str, Any]) -> None:
        """Keep a result, on disk when this returns."""
        record = {"part": part, "case": case, "about": self.about, **result}
        text = json.dumps(record, sort_keys=False, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            if self._path.stat().st_size and not self._ends_with_newline():
                file.write("\n")
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[part, case] = record

    def records(self, part: str | None = None) -> list[dict[str, Any]]:
        """The usable records in order, of one part or of all."""
        return [record for (of, _), record in self._found.items() if part in (None, of)]

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of equal keys; the columns are the union in order of appearance, a missing value is an empty cell."""
    rows = list(rows)
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)

"""Which engine opens a checkpoint, on which device, with which kernel, and what to do where it does not.

Reads config.json, the index and the shards' headers (``facts.py``), never a tensor, and imports no torch. What it knows
is data: ``engines.json``, rows with a source and a version each. For one engine and device the first row counts whose
conditions the facts meet:

    "when": {"format": ["gptq", "gptq-v2"], "symmetric": false, "device": "gpu", "n_multiple_of": 64}

A scalar is compared, a list is searched, a device may be the name of one of the table's ``sets``, and
``n_multiple_of`` asks for divisibility. What to do is looked for in the same table: each of its ``fixes`` is a command
with the facts it can start from and those it changes, and one that leads to a better row is recommended.
"""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from .facts import Checkup, Kind, check_up

__all__ = ["VERDICTS", "Answer", "Diagnosis", "diagnose", "fill", "find_row", "knowledge", "meets"]

VERDICTS = ("packed", "slow", "expanded", "dense", "wrong", "refused")
"""From best to worst: runs packed with a kernel for it; packed, but not with a fast kernel; made dense when loaded or
at the first forward; not quantized; opens and computes something else; does not open."""

MULTIPLE_OF = "_multiple_of"
_NOTES = (
    "Whether an engine knows the architecture {architecture} is not in the table.",
    "Headers have no values: `lowbit inspect` checks scales, zero points, g_idx and hashes.",
)


@dataclass(frozen=True)
class Answer:
    """One engine on one device, all kinds of layers together.

    Attributes:
        engine, device: of the table.
        verdict: the worst of the kinds', one of :data:`VERDICTS`.
        kernels: what multiplies, each once; none where something is refused.
        why: reasons of the worst verdict.
        fixes: commands that lead to a better verdict, at most two; ORIGINAL is the model before quantization.
        rows: ids of the rows that decided.
        verified: run, read (in the engine's source) or known (from elsewhere): the weakest of the rows'.
    """

    engine: str
    device: str
    verdict: str
    kernels: tuple[str, ...]
    why: tuple[str, ...]
    fixes: tuple[str, ...]
    rows: tuple[str, ...]
    verified: str


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        checkup: the folder's facts.
        answers: engine by engine, in the table's order of engines and devices.
        engines: name of each engine with the version that the rows speak of.
        sources: row id -> source, of the rows that decided.
        notes: what the answers do not say.
    """

    checkup: Checkup
    answers: tuple[Answer, ...]
    engines: Mapping[str, str]
    sources: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict with the attributes above; every kind of layers has its label."""
        fields = asdict(self)
        for kind, entry in zip(self.checkup.kinds, fields["checkup"]["kinds"], strict=True):
            entry["spec"] = None if kind.spec is None else kind.spec.to_dict()
            entry["label"] = kind.label()
        return fields

    def __str__(self) -> str:
        return _render(self)


@cache
def knowledge() -> dict[str, Any]:
    """``engines.json``."""
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath("engines.json").read_text("utf-8"))
    return table


def diagnose(path: str | os.PathLike[str]) -> Diagnosis:
    """Say which engines open a model folder. Reads headers only, whatever the size of the files.

    Args:
        path: a folder with config.json and safetensors, packed or dense, or a Hugging Face model id, of which the
            headers alone are fetched.

    Raises:
        FileNotFoundError: no such folder or model, no config.json, no weights, or a shard of the index is missing.
        ValueError: a format lowbit does not read, a damaged header, or a configuration that contradicts the headers.
    """
    table, checkup = knowledge(), _check_up(os.fspath(path))
    places = [(engine, device) for engine in table["engines"] for device in table["devices"]]
    answers = tuple(_answer(table, engine, device, checkup) for engine, device in places)
    used = {row for answer in answers for row in answer.rows}
    return Diagnosis(
        checkup=checkup,
        answers=answers,
        engines={name: f"{engine['title']} {engine['versions'][-1]}" for name, engine in table["engines"].items()},
        sources={row["id"]: row["source"] for row in table["rows"] if row["id"] in used},
        notes=tuple(_notes(table, checkup)),
    )


def _check_up(path: str) -> Checkup:
    folder = Path(path).expanduser()
    if folder.exists():
        return check_up(folder)
    from .hub_headers import hub_headers  # only here: a local folder needs no hub client

    return check_up(*hub_headers(path), name=path)


def find_row(table: Mapping[str, Any], engine: str, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first row of an engine whose conditions the facts meet.

    Raises:
        LookupError: there is none; a test shows that this cannot happen.
    """
    for row in table["rows"]:
        if row["engine"] == engine and meets(row["when"], facts, table["sets"]):
            found: Mapping[str, Any] = row
            return found
    raise LookupError(f"engines.json has no row of {engine} for {dict(facts)}")


def meets(when: Mapping[str, Any], facts: Mapping[str, Any], sets: Mapping[str, Sequence[str]]) -> bool:
    """Whether facts meet every condition of a row."""
    for key, wanted in when.items():
        if key.endswith(MULTIPLE_OF):
            if facts[key.removesuffix(MULTIPLE_OF)] % wanted:
                return False
        elif key == "device" and isinstance(wanted, str) and wanted in sets:
            if facts[key] not in sets[wanted]:
                return False
        elif facts[key] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _answer(table: Mapping[str, Any], engine: str, device: str, checkup: Checkup) -> Answer:
    facts = [checkup.facts(kind, device) for kind in checkup.kinds]
    found = [(find_row(table, engine, each), each) for each in facts]
    rows = [row for row, _ in found]
    worst = max((row["verdict"] for row in rows), key=VERDICTS.index)
    deciding = [(row, each) for row, each in found if row["verdict"] == worst]
    return Answer(
        engine=engine,
        device=device,
        verdict=worst,
        kernels=() if worst == "refused" else _each_once(fill(row["kernel"], each) for row, each in found),
        why=_each_once(row["why"] for row, _ in deciding if row["why"]),
        fixes=_fixes(table, engine, facts, worst, checkup.path),
        rows=_each_once(row["id"] for row in rows),
        verified=max((row["verified"] for row in rows), key=("run", "read", "known").index),
    )


def _fixes(
    table: Mapping[str, Any], engine: str, facts: Sequence[Mapping[str, Any]], verdict: str, model: str
) -> tuple[str, ...]:
    """The first command that leads to a better verdict, and the first that leads to the best there is."""
    helpful: list[tuple[int, str]] = []
    for fix in table["fixes"]:
        wanted = verdict in fix.get("instead_of", VERDICTS)
        if wanted and all(meets(fix["when"], each, table["sets"]) for each in facts):
            rows = [find_row(table, engine, {**each, **fix["gives"]}) for each in facts]
            reached = max(VERDICTS.index(row["verdict"]) for row in rows)
            if reached < VERDICTS.index(verdict):
                helpful.append((reached, fill(fix["command"], facts[0], model)))
    if not helpful:
        return ()
    best = min(helpful, key=lambda one: one[0])
    return _each_once(command for _, command in (helpful[0], best))


def fill(template: str, facts: Mapping[str, Any], model: str = "") -> str:
    """A kernel's name or a command of the table, with what it leaves open."""
    return template.format(model=shlex.quote(model), bits=facts["bits"], group_size=facts["group_size"])


def _each_once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _notes(table: Mapping[str, Any], checkup: Checkup) -> Iterable[str]:
    for note in _NOTES:
        yield note.format(architecture=checkup.architecture or "of the model")
    if checkup.own_code:
        yield "config.json names Python code of the model's own: engines run it only when told to trust it."
    for engine in table["engines"].values():
        try:
            installed = metadata.version(engine["package"])
        except metadata.PackageNotFoundError:
            continue
        if installed not in engine["versions"]:
            read = " and ".join(engine["versions"])
            yield f"{engine['title']} {installed} is installed here; the table speaks of {read}."


def _render(diagnosis: Diagnosis) -> str:
    """For people: the folder, a table with devices of equal answers in one line, the commands, the notes."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = dict(zip(VERDICTS, ("green", "default", "yellow", "yellow", "red", "red"), strict=True))
    table = Table("engine", "device", "verdict", "kernel", "why", "known", box=box.SIMPLE_HEAD, pad_edge=False)
    reasons: dict[str, int] = {}
    for engine, title in diagnosis.engines.items():
        shown = title
        for devices, answer in _together(answer for answer in diagnosis.answers if answer.engine == engine):
            numbers = [str(reasons.setdefault(why, len(reasons) + 1)) for why in answer.why]
            verdict = f"[{colours[answer.verdict]}]{answer.verdict}[/]"
            kernels = escape(", ".join(answer.kernels) or "-")
            table.add_row(shown, devices, verdict, kernels, ", ".join(numbers) or "-", answer.verified)
            shown = ""
    terminal = os.isatty(1) and "NO_COLOR" not in os.environ
    width = None if terminal else 120
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, soft_wrap=False)
    console.print(*_head(diagnosis.checkup), sep="\n", markup=False)
    console.print(table)
    footnotes = Table.grid(padding=(0, 1))
    for why, number in reasons.items():
        footnotes.add_row(f"{number:3}", escape(why))
    console.print(footnotes)
    fixes = _fix_lines(diagnosis)
    if fixes:
        console.print("\nWhat helps:", *(f"  {line}" for line in fixes), sep="\n", markup=False, soft_wrap=True)
    console.print("", *diagnosis.notes, sep="\n", markup=False)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))


def _head(checkup: Checkup) -> list[str]:
    what = " ".join(part for part in (checkup.architecture, checkup.dtype) if part) or "model"
    lines = [f"{checkup.path}: {what}, {checkup.tensor_bytes / 1e9:.2f} GB of tensors"]
    return lines + [_kind_line(kind) for kind in checkup.kinds]


def _kind_line(kind: Kind) -> str:
    return f"  {kind.label()}: {kind.layers} layers, {kind.weights:,} weights"


def _together(answers: Iterable[Answer]) -> list[tuple[str, Answer]]:
    """Neighbouring devices whose answers are the same, in one entry: ``sm_80 - sm_89``."""
    groups: list[list[Answer]] = []
    for answer in answers:
        if groups and _same(groups[-1][-1], answer):
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return [(_span([answer.device for answer in group]), group[0]) for group in groups]


def _span(devices: Sequence[str]) -> str:
    return devices[0] if len(devices) == 1 else f"{devices[0]} - {devices[-1]}"


def _ranges(devices: Sequence[str], order: Sequence[str]) -> str:
    """``cpu, sm_80 - sm_89`` for devices that stand together in ``order``."""
    runs: list[list[str]] = []
    for device in devices:
        if runs and order.index(device) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(map(_span, runs))


def _same(a: Answer, b: Answer) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("verdict", "kernels", "why", "verified"))


def _fix_lines(diagnosis: Diagnosis) -> list[str]:
    """Every command once, with the engines and devices it is for."""
    order = list(dict.fromkeys(answer.device for answer in diagnosis.answers))
    where: dict[str, dict[str, list[str]]] = {}
    for answer in diagnosis.answers:
        for fix in answer.fixes:
            where.setdefault(fix, {}).setdefault(answer.engine, []).append(answer.device)
    lines = []
    for fix, by_engine in where.items():
        places = [f"{diagnosis.engines[engine]} ({_ranges(devices, order)})" for engine, devices in by_engine.items()]
        lines += [fix, f"    for {', '.join(places)}"]
    return lines

"""From records to what is read: the CSV of all figures, and a short table with the goals beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from check_stats import ratio_text
from check_store import Store, write_csv

__all__ = ["GOALS", "layer_rows", "short_table", "text_table", "write_all"]

GOALS: dict[tuple[str, str, int], float] = {
    ("w4a16", "70b", 1): 3.2, ("w4a16", "8b", 1): 2.6,
    ("w4a16", "70b", 16): 3.0, ("w4a16", "8b", 16): 2.5,
    ("w4a16", "70b", 64): 2.2, ("w4a16", "70b", 256): 0.85, ("w4a16", "70b", 4096): 0.93,
    ("w8a16", "70b", 1): 1.75, ("w8a16", "8b", 1): 1.6, ("w8a16", "70b", 16): 1.7,
    ("w8a16", "70b", 64): 1.65, ("w8a16", "70b", 256): 0.9, ("w8a16", "70b", 4096): 0.93,
    ("w8a8", "70b", 1): 1.6, ("w8a8", "70b", 16): 1.6, ("w8a8", "70b", 64): 1.6,
    ("w8a8", "70b", 256): 1.4, ("w8a8", "70b", 4096): 1.5,
}  # fmt: skip
"""Speed-up over cuBLAS bf16 of one layer's four linears, issue 3."""
LINEARS = 4


def layer_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the four linears of a layer, for every (mode, layer, M) with all four measured.

    A record of a measuring part has mode, layer, linear, m and ``seconds`` by contestant. A contestant that lacks
    one of the linears has no sum. ``lowbit`` is what the dispatcher picks.
    """
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if "seconds" in record:
            found[record["mode"], record["layer"], record["m"]].append(record)
    rows = []
    for (mode, layer, m), parts in sorted(found.items()):
        if len(parts) != LINEARS:
            continue
        names = [name for name in parts[0]["seconds"] if all(name in part["seconds"] for part in parts)]
        seconds = {name: sum(part["seconds"][name] for part in parts) for name in names}
        moved, flops = sum(part["bytes"] for part in parts), sum(part["flops"] for part in parts)
        row = {"mode": mode, "layer": layer, "m": m, "goal": GOALS.get((mode, layer, m))}
        rows.append({**row, "seconds": seconds, "bytes": moved, "flops": flops})
    return rows


def short_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per (mode, layer, M): microseconds, GB/s, TFLOP/s, the ratio to cuBLAS and its goal, ratios to peers.

    None where what the dispatcher picks was left out (``--without``).
    """
    rows = [row for row in layer_rows(records) if "lowbit" in row["seconds"]]
    peers = sorted({name for row in rows for name in row["seconds"]} - {"lowbit", "cublas bf16"})
    lines = [["mode", "layer", "M", "us", "GB/s", "TFLOP/s", "x cuBLAS", "goal", *(f"x {name}" for name in peers)]]
    for row in rows:
        ours, times = row["seconds"]["lowbit"], row["seconds"]
        lines.append(
            [
                row["mode"],
                row["layer"],
                str(row["m"]),
                f"{ours * 1e6:.1f}",
                f"{row['bytes'] / ours / 1e9:.0f}",
                f"{row['flops'] / ours / 1e12:.1f}",
                ratio_text(ours, times.get("cublas bf16")),
                f"{row['goal']:.2f}x" if row["goal"] else "-",
                *(ratio_text(ours, times.get(name)) for name in peers),
            ]
        )
    return text_table(lines) if rows else "no layer is measured completely"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first two left-aligned; a rule under the head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    printed = []
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        printed.append("  ".join(cells).rstrip())
        if number == 0:
            printed.append("  ".join("-" * width for width in widths))
    return "\n".join(printed)


def write_all(store: Store, folder: Path) -> str:
    """``linears.csv``, ``layers.csv``, ``checks.csv`` and ``summary.txt``; returns the summary."""
    machine = {name: store.about.get(name) for name in ("gpu", "driver", "torch", "triton", "sources", "date")}
    measured = [record for record in store.records() if "seconds" in record]
    linears = [
        {
            **{key: record[key] for key in ("mode", "layer", "linear", "m", "n", "k")},
            "contestant": name,
            "us": round(seconds * 1e6, 3),
            "gb_per_s": round(record["bytes"] / seconds / 1e9, 1),
            "tflop_per_s": round(record["flops"] / seconds / 1e12, 2),
            "x_cublas": round(record["seconds"]["cublas bf16"] / seconds, 3),
            "tile": record["tiles"].get(name, ""),
            "rms_error": record["errors"].get(name, ""),
            "spread": record["spread"].get(name, ""),
            "clock": record["clocks"].get("clocks.sm", ""),
            **machine,
        }
        for record in measured
        for name, seconds in record["seconds"].items()
    ]
    write_csv(folder / "linears.csv", linears)
    layers = [
        {**{key: row[key] for key in ("mode", "layer", "m", "goal")}, "contestant": name, "us": round(s * 1e6, 2),
         "x_cublas": round(row["seconds"]["cublas bf16"] / s, 3), **machine}
        for row in layer_rows(measured)
        for name, s in row["seconds"].items()
    ]  # fmt: skip
    write_csv(folder / "layers.csv", layers)
    checks = [
        {"check": record["case"], "ok": record["ok"], "figure": record["figure"], **machine}
        for record in store.records("correct")
    ]
    write_csv(folder / "checks.csv", checks)
    summary = _summary(store, checks, measured)
    (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    return summary


def _summary(store: Store, checks: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> str:
    about = store.about
    lines = [
        f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}, "
        f"sources {about['sources']}, table {about.get('table', 'unknown')}, {about['date']}",
        f"checks: {sum(bool(check['ok']) for check in checks)} of {len(checks)} passed",
    ]
    ended = {record["case"] for record in store.records() if record["part"] != "hung"}
    for part in ("limits", "host", "cold", "sanitizer", "model", "hung"):
        for record in store.records(part):
            if part != "hung" or record["case"] not in ended:  # a later run may have finished it
                lines.append(f"{part}: {record['case']}: {record['text']}")
    told: dict[str, list[str]] = defaultdict(list)
    for record in measured:
        for name, text in record.get("peers", {}).items():
            told[name].append(text)
    for name, texts in told.items():
        distinct = [f"{text} ({texts.count(text)} of {len(texts)} cases)" for text in dict.fromkeys(texts)]
        lines.append(f"peer {name}: {'; '.join(distinct)}")
    if measured:
        lines += ["", short_table(measured)]
    return "\n".join(lines)

"""The table of scripts/check_vllm, for a terminal and as the page under eval/results/."""

from __future__ import annotations

from typing import Any

from engine_report import FIGURES, compared, figures, page, partings, printed, versions

__all__ = ["markdown", "print_table"]

COLUMNS = ("checkpoint", "packed layers computed by", *FIGURES)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row's cells."""
    return row["format"], engine(row), *figures(row)


def engine(row: dict[str, Any]) -> str:
    """How vLLM ran it, and the kernels that took the packed layers."""
    used = [name for name in row.get("kernels", {}) if name.endswith("LinearKernel") or name.startswith("Lowbit")]
    return f"{row['engine']}: {', '.join(used)}" if used else row["engine"]


def notes(result: dict[str, Any]) -> list[str]:
    """What a verdict leaves open: messages of refusals, and the tokens at which continuations part."""
    lines = []
    for row in result["rows"]:
        label = f"{row['format']} ({engine(row)})"
        if "message" in row:
            lines.append(f"{label}: {row['verdict']}. {' '.join(row['message'].split())}")
        lines += partings(row, label, "vLLM", result["settings"]["dtype"])
    return lines


def print_table(result: dict[str, Any]) -> None:
    lines = (*notes(result), *compared(result["settings"]), versions(result))
    printed(title(result), COLUMNS, [cells(row) for row in result["rows"]], lines, width=150)


def markdown(result: dict[str, Any]) -> str:
    rows = [cells(row) for row in result["rows"]]
    return page(title(result), result, compared(result["settings"]), COLUMNS, rows, notes(result))


def title(result: dict[str, Any]) -> str:
    return f"vLLM on CPU: {result['model']}"

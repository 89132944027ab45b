"""The table of scripts/check_sglang, for a terminal and as the page under eval/results/."""

from __future__ import annotations

from typing import Any

from engine_report import FIGURES, compared, figures, page, partings, printed, versions
from sglang_stand_ins import STAND_INS

__all__ = ["FAULTS", "markdown", "print_table", "versions"]

COLUMNS = ("checkpoint", "SGLang", "its schemes", "loaded", *FIGURES)
FAULTS = {
    "different": "parameters hold something else",
    "unfilled": "parameters were not filled",
    "skipped": "tensors of ours are in no parameter",
    "not_given": "tensors of ours were not read",
}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row's cells."""
    chosen = ", ".join(name for name in row.get("schemes", {}) if not name.startswith("Unquantized"))
    if "tensors" not in row:
        filled = ""
    elif any(row[fault] for fault in FAULTS):
        filled = "NO"
    else:
        filled = f"{row['tensors']} tensors in {row['parameters']}"
    head = (row["format"], row["engine"], chosen, filled)
    return *head, *figures(row)


def notes(result: dict[str, Any]) -> list[str]:
    """What a verdict leaves open: messages, faults of loading, and the tokens at which continuations part."""
    lines = []
    for row in result["rows"]:
        label = f"{row['format']} ({row['engine']})"
        if "message" in row:
            # torch's messages go on with lists of everything that is not the case
            message = " ".join(row["message"].split()).split(" This could be because ")[0]
            lines.append(f"{label}: {row['verdict']}. {message}")
        for fault, words in FAULTS.items():
            if row.get(fault):
                lines.append(f"{label}: {len(row[fault])} {words}, such as {row[fault][0]}.")
        lines += partings(row, label, "SGLang", result["settings"]["dtype"])
    return lines


def summary(result: dict[str, Any]) -> list[str]:
    """What was done, and what was not."""
    return [
        "**No kernel of SGLang's was run.** Its kernels for quantized weights are CUDA's (Marlin, int8_scaled_mm) or "
        "want AMX, and neither is used here. `alone`: SGLang's engine as it is, which computes dense models and "
        "refuses the others on a CPU, with its message below. `kernels stood in for`: the same engine; SGLang reads "
        "the configuration, chooses the scheme, creates and fills the parameters, rearranges scales and zero points "
        "for Marlin, schedules and samples; only the following is replaced: "
        + "; ".join(f"{names} ({why})" for names, why in STAND_INS.items())
        + ". `sgl_kernel` cannot be installed without a GPU and is a module whose functions raise; where there are "
        "results none was called.",
        "Loaded: between filling and rearranging, every parameter held, bit for bit in its dtype, the tensors of the "
        "checkpoint that belong there (q, k, v and gate, up in one, experts in two), no parameter was left unfilled "
        "and no tensor left out: so many tensors in so many parameters. NO: not so, see below. Empty: it did not get "
        "that far.",
        *compared(result["settings"]),
    ]


def print_table(result: dict[str, Any]) -> None:
    lines = (*notes(result), *summary(result), versions(result))
    printed(title(result), COLUMNS, [cells(row) for row in result["rows"]], lines, width=170)


def markdown(result: dict[str, Any]) -> str:
    rows = [cells(row) for row in result["rows"]]
    return page(title(result), result, summary(result), COLUMNS, rows, notes(result))


def title(result: dict[str, Any]) -> str:
    return f"SGLang on CPU: {result['model']}"

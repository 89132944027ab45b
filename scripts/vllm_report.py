"""The table of scripts/check_vllm, for a terminal and as the page under eval/results/."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["markdown", "print_table"]

COLUMNS = ("checkpoint", "packed layers computed by", "alike", "largest diff", "mean diff", "verdict")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row's six cells."""
    if "message" in row:
        return row["format"], engine(row), "", "", "", row["verdict"]
    return row["format"], engine(row), row["alike"], f"{row['largest']:.4f}", f"{row['mean']:.5f}", row["verdict"]


def engine(row: dict[str, Any]) -> str:
    """How vLLM ran it, and the kernels that took the packed layers."""
    used = [name for name in row.get("kernels", {}) if name.endswith("LinearKernel")]
    return f"{row['engine']}: {', '.join(used)}" if used else row["engine"]


def notes(result: dict[str, Any]) -> list[str]:
    """What a verdict leaves open: messages of refusals, and the tokens at which continuations part."""
    lines = []
    for row in result["rows"]:
        label = f"{row['format']} ({engine(row)})"
        if "message" in row:
            lines.append(f"{label}: {row['verdict']}. {' '.join(row['message'].split())}")
        for part in row.get("parted", ()):
            lines.append(
                f"{label}: prompt {part['prompt']} parts at token {part['token']}, where the logits of the two tokens "
                f"differ by {part['our_gap']:.4f} in lowbit, {part['steps']} steps of the dtype, and the first two by "
                f"{part['their_gap']:.4f} in vLLM."
            )
        if "own_largest" in row:
            lines.append(
                f"{label}: lowbit differs from itself, in float32 and in {result['settings']['dtype']}, by at most "
                f"{row['own_largest']:.4f} and in the mean by {row['own_mean']:.5f}: activations rounded to 8 bits "
                "make a step of every small difference."
            )
    return lines


def summary(result: dict[str, Any]) -> str:
    """The line under the title: what was compared."""
    how = result["settings"]
    return (
        f"{how['prompts']} prompts of {how['prompt_tokens']} tokens from books-test.txt, {how['new_tokens']} generated "
        f"greedily, {how['dtype']}. Against lowbit: dequantized weights through transformers (weight-only formats), "
        "its integer layers (W8A8). Alike: prompts whose continuation is the same, token for token. Differences of "
        "log-probabilities in nats, over every token of the prompts and of vLLM's continuation. Weight-only is the "
        f"same where no difference is above {how['limit']} and all tokens are the same; a tie, listed, is a first "
        "different token that for lowbit is no further from the first than the row's largest difference. W8A8 is held "
        "against lowbit's own difference, in the mean."
    )


def versions(result: dict[str, Any]) -> str:
    def listed(of: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in of.items())

    return f"{listed(result['lowbit'])}; engine: {listed(result['engine'])}; {result['hardware']}; {result['date']}."


def print_table(result: dict[str, Any]) -> None:
    table = Table(*COLUMNS, title=f"vLLM on CPU: {result['model']}")
    for row in result["rows"]:
        table.add_row(*cells(row))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for line in (*notes(result), summary(result), versions(result)):
        console.print(line, highlight=False, markup=False)


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# vLLM on CPU: {result['model']}", "", f"`{result['command']}`", "", versions(result), ""]
    lines += [summary(result), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    if extra := notes(result):
        lines += ["", "## Refusals and ties, one by one", ""] + [f"- {line}" for line in extra]
    return "\n".join(lines) + "\n"

"""What the tables and pages of scripts/check_vllm and check_sglang share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["compared", "figures", "page", "partings", "printed", "versions"]

FIGURES = ("alike", "passed over", "largest diff", "mean diff", "verdict")
"""The last columns of both tables."""


def figures(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's cells under FIGURES; empty where nothing was computed."""
    if "alike" not in row:
        return "", "", "", "", row["verdict"]
    passed = str(row["passed_over"]) if row["weight_only"] else ""
    return row["alike"], passed, f"{row['largest']:.4f}", f"{row['mean']:.5f}", row["verdict"]


def partings(row: dict[str, Any], label: str, engine: str, dtype: str) -> list[str]:
    """The tokens at which continuations part, and what lowbit's own rounding of activations does."""
    lines = [
        f"{label}: prompt {part['prompt']} parts at token {part['token']}, where the logits of the two tokens "
        f"differ by {part['our_gap']:.4f} in lowbit, {part['steps']} steps of the dtype, and the first two by "
        f"{part['their_gap']:.4f} in {engine}."
        for part in row.get("parted", ())
    ]
    if "own_largest" in row:
        lines.append(
            f"{label}: lowbit differs from itself, in float32 and in {dtype}, by at most {row['own_largest']:.4f} and "
            f"in the mean by {row['own_mean']:.5f}: activations rounded to 8 bits make a step of every small "
            "difference."
        )
    return lines


def compared(settings: dict[str, Any]) -> list[str]:
    """What was compared, and with which prompts."""
    prompts, new, limit = settings["prompts"], settings["new_tokens"], settings["limit"]
    return [
        f"Computed: {prompts} prompts of {settings['prompt_tokens']} tokens, {new} generated greedily, "
        f"{settings['dtype']}, against lowbit: dequantized weights through transformers (weight-only formats), its "
        "integer layers (W8A8). Alike: prompts whose continuation is the same, token for token. Differences of "
        "log-probabilities in nats, over every token of the prompts and of the engine's continuation. Weight-only is "
        f"the same where no difference is above {limit:g} and all tokens are the same; W8A8 is held against lowbit's "
        "own difference between float32 and the dtype, in the mean.",
        "Prompts: consecutive windows of books-test.txt, in its order. Weight-only: the first whose continuation is "
        f"decided for lowbit: at each of the {new} tokens its first logit is more than {2 * limit:g} above its second. "
        f"That is twice {limit:g}, so differences within what is allowed cannot change a token; at a tie the last bit "
        "of a rounding would. Each checkpoint has its own, found before the engine is started; passed over: windows "
        "before the last one taken that are not decided. W8A8: the first, decided or not.",
        "MoE: a Qwen3-MoE made of books-4m, each of 8 experts a third of its layer's MLP (vllm_cases.py).",
    ]


def versions(result: dict[str, Any]) -> str:
    def listed(of: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in of.items())

    return f"{listed(result['lowbit'])}; engine: {listed(result['engine'])}; {result['hardware']}; {result['date']}."


def printed(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str], width: int
) -> None:
    """Table and lines on stdout; ``width`` where that is no terminal."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)


def page(
    title: str,
    result: dict[str, Any],
    summary: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """The page under eval/results/."""
    lines = [f"# {title}", "", f"`{result['command']}`", "", versions(result), ""]
    for paragraph in summary:
        lines += [paragraph, ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if notes:
        lines += ["", "## Refusals and partings, one by one", ""] + [f"- {line}" for line in notes]
    return "\n".join(lines) + "\n"

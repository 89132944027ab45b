"""The table of scripts/check_sglang, for a terminal and as the page under eval/results/."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from sglang_stand_ins import STAND_INS
from vllm_report import versions

__all__ = ["markdown", "print_table"]

COLUMNS = ("checkpoint", "SGLang", "its schemes", "loaded", "alike", "largest diff", "mean diff", "verdict")
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
    if "alike" not in row:
        return *head, "", "", "", row["verdict"]
    return *head, row["alike"], f"{row['largest']:.4f}", f"{row['mean']:.5f}", row["verdict"]


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
        for part in row.get("parted", ()):
            lines.append(
                f"{label}: prompt {part['prompt']} parts at token {part['token']}, where the logits of the two tokens "
                f"differ by {part['our_gap']:.4f} in lowbit, {part['steps']} steps of the dtype, and the first two by "
                f"{part['their_gap']:.4f} in SGLang."
            )
        if "own_largest" in row:
            lines.append(
                f"{label}: lowbit differs from itself, in float32 and in {result['settings']['dtype']}, by at most "
                f"{row['own_largest']:.4f} and in the mean by {row['own_mean']:.5f}: activations rounded to 8 bits "
                "make a step of every small difference."
            )
    return lines


def summary(result: dict[str, Any]) -> list[str]:
    """What was done, and what was not."""
    how = result["settings"]
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
        f"Computed: {how['prompts']} prompts of {how['prompt_tokens']} tokens from books-test.txt, {how['new_tokens']} "
        f"generated greedily, {how['dtype']}, against lowbit as in vllm-cpu.md: dequantized weights through "
        "transformers (weight-only formats), its integer layers (W8A8). Alike: prompts whose continuation is the same, "
        "token for token. Differences of log-probabilities in nats. Weight-only is the same where no difference is "
        f"above {how['limit']} and all tokens are the same; a tie, listed, is a first different token that for lowbit "
        "is no further from the first than the row's largest difference. W8A8 is held against lowbit's own difference, "
        "in the mean.",
    ]


def print_table(result: dict[str, Any]) -> None:
    table = Table(*COLUMNS, title=f"SGLang on CPU: {result['model']}")
    for row in result["rows"]:
        table.add_row(*cells(row))
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    for line in (*notes(result), *summary(result), versions(result)):
        console.print(line, highlight=False, markup=False)


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# SGLang on CPU: {result['model']}", "", f"`{result['command']}`", "", versions(result), ""]
    for paragraph in summary(result):
        lines += [paragraph, ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    if extra := notes(result):
        lines += ["", "## Refusals and ties, one by one", ""] + [f"- {line}" for line in extra]
    return "\n".join(lines) + "\n"

"""The table of architectures that work: quantizes a tiny random-weight model of each and prints Markdown.

    python eval/architectures.py [--out eval/results/architectures.md]

The models are those of tests/architectures.py; the weights are random, so nothing here speaks of quality.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from architectures import ARCHITECTURES, exercise  # noqa: E402


def rows() -> list[str]:
    """One table row per architecture; what fails is a row that says how."""
    lines = [
        "| architecture | weights packed | coverage | left dense in the blocks | logits vs dequantized | generates |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, architecture in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                o = exercise(name, "gptq", Path(folder))
            except Exception as error:  # the table is to show it
                lines.append(f"| {architecture.title} | - | - | - | {type(error).__name__}: {error} | - |")
                continue
        kinds = {"router" if "router" in left.lower() else left.partition(": ")[2].partition(",")[0] for left in o.left}
        left = ", ".join(sorted(kinds)) or "nothing"
        generates = "yes" if o.generated else ("no" if architecture.generates else "not a generator")
        resaved = "" if o.resaved else " (saved again: differs)"
        lines.append(
            f"| {architecture.title} | {o.weights} | {o.coverage:.1%} | {left} | {o.error:.0e}{resaved} | {generates} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "architectures.md")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = f"Tiny random-weight models, GPTQ 4 bits g32, CPU; {versions}."
    text = "\n".join([head, "", *rows(), ""])
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

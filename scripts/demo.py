"""Prints what the demo measured, and lets both models continue the same sentences.

    python scripts/demo.py BASE QUANTIZED FIGURES.json

FIGURES.json is what `lowbit eval QUANTIZED --base BASE --json` printed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lowbit

PROMPTS = ("It was a dark night, and the old house", "“My dear fellow,” said he,", "She had never been so happy as")
NEW_TOKENS = 32


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    base_path, path, figures_path = map(Path, sys.argv[1:])
    figures = json.loads(figures_path.read_text(encoding="utf-8"))
    base, tokenizer = lowbit.load(str(base_path))
    model, _ = lowbit.load(str(path))
    console = Console()
    console.print(figures_table(base_path, path, model, figures))
    console.print(figures["definition"], style="dim", highlight=False)
    for prompt in PROMPTS:
        console.print(f"\n[bold]{prompt}[/bold] ...")
        console.print(f"  original   {continuation(base, tokenizer, prompt)}", highlight=False, markup=False)
        console.print(f"  quantized  {continuation(model, tokenizer, prompt)}", highlight=False, markup=False)


def figures_table(base_path: Path, path: Path, model: Any, figures: dict[str, Any]) -> Table:
    """Sizes and quality of both models side by side."""
    packed = [module for module in model.modules() if isinstance(module, lowbit.QuantLinear)]
    dense_bytes = sum(2 * module.in_features * module.out_features for module in packed)
    packed_bytes = sum(
        tensor.nbytes for module in packed for name, tensor in module.state_dict().items() if name != "bias"
    )
    table = Table("", "original", "quantized", title=f"{base_path.name} at {packed[0].spec.label()}")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("weights of the quantized layers", f"{megabytes(dense_bytes)} (bf16)", megabytes(packed_bytes))
    table.add_row("model files", megabytes(model_bytes(base_path)), megabytes(model_bytes(path)))
    table.add_row("perplexity", f"{figures['base_ppl']:.3f}", f"{figures['ppl']:.3f}")
    table.add_row("KL(original || quantized), nats per token", "0", f"{figures['kl']:.5f}")
    table.add_row("top-1 agreement", "100 %", f"{100 * figures['top1']:.2f} %")
    return table


def model_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Samples from the model; the same seed for both, so that they part only where their predictions do."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.6, top_k=20, pad_token_id=0
    )
    return " ".join(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).split())


if __name__ == "__main__":
    main()

"""What travels with the weights of a model folder: tokenizer, generation config, chat templates, the model's code."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

__all__ = ["COMPANION_SUFFIXES", "copy_companions"]

# Vocabularies are called as their makers like: tiktoken.model, qwen.tiktoken, source.spm, bpe.codes (PhoBERT),
# prophetnet.tokenizer.
COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".codes", ".tokenizer")
# Written anew, or true of the source only; besides them every shard index.
_NOT_COPIED = ("config.json", "lowbit.json", "quantize_config.json", "quant_config.json", "adapter_config.json")


def copy_companions(folder: Path, out: Path, *, code: bool, also: Collection[str] = ()) -> None:
    """Copy byte for byte what is neither weights nor the model's configuration.

    Args:
        folder: of the model.
        out: an existing folder.
        code: copy Python files too.
        also: names of further files, copied where ``folder`` has them: what a tokenizer says it reads.
    """
    suffixes = (*COMPANION_SUFFIXES, ".py") if code else COMPANION_SUFFIXES
    for path in sorted(folder.iterdir()):
        if path.suffix not in suffixes and path.name not in also:
            continue
        if path.is_file() and path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    templates = folder / "additional_chat_templates"  # of a tokenizer that has several
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name, copy_function=shutil.copyfile)

"""What lowbit.convert takes over beside the weights: the files that say how the model is run, unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.checkpoint import read_checkpoint
from lowbit.convert import convert
from packed_folder import TINY_LAYERS, write_tiny

TAKEN = (
    "tokenizer.json", "tokenizer.model", "source.spm", "bpe.codes", "merges.txt", "generation_config.json",
    "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "modeling_own.py",
)  # fmt: skip
"""A tokenizer with several chat templates is saved with a folder of them (transformers 5)."""

LEFT = (
    "quant_config.json", "recipe.yaml", "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "original/params.json",
)  # fmt: skip
"""True of the source only, or no part of the model that lowbit reads."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path / "packed", TINY_LAYERS)
    (folder / "lowbit.json").unlink()  # the other files come from elsewhere
    for name in (*TAKEN, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the content of {name}")
    return folder


def test_companions_travel_unchanged_and_nothing_else_does(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "compressed-tensors", verbose=False)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {*TAKEN, "config.json", "lowbit.json", "model.safetensors"}
    for name in TAKEN:
        assert (tmp_path / "out" / name).read_text() == f"the content of {name}"
    assert read_checkpoint(tmp_path / "out").hashes_verified

"""What engines cannot do with the checkpoints of an architecture, whatever the grid: said before it is quantized."""

from __future__ import annotations

from .doctor import knowledge, meets
from .pack_config import FORMAT

__all__ = ["engine_limits"]

_PHRASES = {"refused": "do not open it", "wrong": "open it and compute something else"}


def engine_limits(model_type: str, experts: bool, form: str = FORMAT) -> list[str]:
    """A sentence per engine that will not run the checkpoint.

    They come from the rows of ``engines.json`` that ask for nothing but the architecture and the format.

    Args:
        model_type: of config.json.
        experts: whether experts of a mixture are quantized.
        form: ``pack-quantized`` or ``int-quantized``.
    """
    table = knowledge()
    facts = {"model_type": model_type, "experts": experts, "format": form}
    rows = [
        row
        for row in table["rows"]
        if "model_type" in row["when"] and row["when"].keys() <= facts.keys() and row["verdict"] in _PHRASES
    ]
    return [
        f"not for {table['engines'][row['engine']]['title']}, whose versions {' and '.join(row['versions'])} "
        f"{_PHRASES[row['verdict']]}: {row['why']}. `lowbit doctor` says what each engine does with the folder"
        for row in rows
        if meets(row["when"], facts, table["sets"])
    ]

"""Another tool's figures on the same model and windows, read from a file that eval/peers/ or a session wrote.

{"about": {"model": NAME, "calibration": ..., "versions": ...},
 "base": {DATA: {"ppl": ..., "windows": ...}},
 "llmcompressor-gptq-w4g128sym": {DATA: {"ppl": ..., "kl": ..., "top1": ...}, "seconds": ...}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Peers", "read_peers"]

_SAME_PPL = 1e-3  # relative; what other versions of the libraries change is far below, other windows far above


@dataclass(frozen=True)
class Peers:
    """One such file. ``about`` says how the figures were made."""

    about: dict[str, Any]
    base: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]

    def mismatch(self, model: str, data: str, windows: int, base_ppl: float) -> str | None:
        """Why these figures cannot stand beside ours; None when the base model's perplexity shows that they can."""
        if self.about["model"] != model:
            return f"they are of {self.about['model']}"
        if data not in self.base:
            return f"they have no figures on {data}, only on {sorted(self.base)}"
        theirs = self.base[data]
        if theirs["windows"] != windows:
            return f"they are on {theirs['windows']} windows of {data}, not {windows}"
        if abs(theirs["ppl"] / base_ppl - 1) > _SAME_PPL:
            return f"their base model's perplexity on {data} is {theirs['ppl']:.3f}, ours {base_ppl:.3f}"
        return None

    def of(self, method: str, spec: str, data: str) -> dict[str, Any] | None:
        """llm-compressor's figures by the method of the same name; its rtn is without data, ours may be weighted."""
        found = self.results.get(f"llmcompressor-{method.removesuffix(' (weighted)')}-{spec}", {}).get(data)
        return found if isinstance(found, dict) else None

    def others(self, methods: set[str], spec: str, data: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and figures of everything at this spec that stands beside none of ``methods``."""
        beside = {f"llmcompressor-{method.removesuffix(' (weighted)')}" for method in methods}
        for name, result in self.results.items():
            tool, _, label = name.rpartition("-")
            if label == spec and tool not in beside and isinstance(result.get(data), dict):
                yield tool, result[data]


def read_peers(path: str) -> Peers:
    """Reads such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of the form above.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"peers file {path!r} does not exist")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        about, base = content.pop("about"), content.pop("base")
        bases = {data: {"ppl": float(row["ppl"]), "windows": int(row["windows"])} for data, row in base.items()}
        peers = Peers({"model": str(about["model"]), **about}, bases, content)
        if not all(isinstance(result, dict) for result in content.values()):
            raise TypeError("a result is not an object")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"peers file {path!r} has not the form that eval/peer_results.py describes: {error}"
        ) from error
    return peers

"""What scripts/check_vllm and scripts/check_sglang share: the command line, the folders, the result's files."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

import provenance  # noqa: E402
import vllm_cases as cases  # noqa: E402
from engine_environment import say  # noqa: E402
from engine_reference import Reference  # noqa: E402

SETTINGS = ("prompts", "prompt_tokens", "new_tokens", "dtype", "limit")

__all__ = ["about", "arguments", "checked", "prepared", "working_folder", "write"]


def arguments(description: str | None, engine: str, env: Path, names: Sequence[str], time_limit: int) -> Any:
    """The parser of the options that both have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cases.BOOKS, help="an unquantized folder")
    parser.add_argument("--env", type=Path, default=env, help=f"{engine}'s environment, made if absent")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here, and reuse those that are there")
    parser.add_argument("--only", default=",".join(names), help="comma-separated: %(default)s")
    parser.add_argument("--prompts", type=int, default=8, help="windows of the text to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--limit", type=float, default=0.07, help="largest difference of a log-probability")
    parser.add_argument("--time-limit", type=int, default=time_limit, help=f"seconds for one run of {engine}")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    parser.add_argument("--out", type=Path, help="PREFIX of PREFIX.md and PREFIX.json")
    return parser


def checked(parser: argparse.ArgumentParser, given: Sequence[str], names: Sequence[str]) -> argparse.Namespace:
    """The options, ``names`` of --only among them; argparse exits with 2 and a sentence on bad ones."""
    options = parser.parse_args(given)
    options.names = options.only.split(",")
    if unknown := set(options.names) - set(names):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: {options.model} is not a model's folder")
    if min(options.prompts, options.prompt_tokens - 1, options.new_tokens, options.time_limit) < 1:
        parser.error("--prompts, --new-tokens and --time-limit must be at least 1, --prompt-tokens 2")
    if not 0 < options.limit < math.inf:
        parser.error(f"--limit must be a positive number, got {options.limit}")
    return options


@contextlib.contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def prepared(
    wanted: Sequence[cases.Case], work: Path, options: argparse.Namespace
) -> list[tuple[cases.Case, Path, Reference]]:
    """Every case with its folder and lowbit's own answer, all before an engine is started.

    Raises:
        ValueError: the text has too few prompts for a case.
    """
    base = work / cases.BASE
    if not base.exists():
        base.symlink_to(options.model.resolve(), target_is_directory=True)
    cases.make_moe(work)
    made = []
    for case in wanted:
        folder = cases.make(case, work)
        ours = Reference(case, folder, **{name: getattr(options, name) for name in SETTINGS})
        say(f"{case.label}: {options.prompts} prompts, {ours.passed_over} windows passed over")
        made.append((case, folder, ours))
    return made


def about(options: argparse.Namespace, versions: dict[str, str], engine: Sequence[str], script: str) -> dict[str, Any]:
    """Where the figures come from; ``engine``: the distributions whose versions are named, ``script``: check_..."""
    return {
        "command": provenance.command_line().replace(f"python scripts/{script}.py", f"scripts/{script}"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": provenance.cpu_name(),
        "lowbit": {"lowbit": provenance.lowbit_version(), "sources": provenance.lowbit_sources()}
        | {name: provenance.version(name) for name in ("torch", "transformers")},
        "engine": {name: versions[name] for name in engine if name in versions},
        "model": provenance.short_name(str(options.model)),
        "settings": {key: getattr(options, key) for key in SETTINGS},
        "rows": [],
    }


def write(result: dict[str, Any], prefix: Path | None, markdown: Callable[[dict[str, Any]], str]) -> None:
    """PREFIX.json and PREFIX.md, if there is a prefix."""
    if prefix is not None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        prefix.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        prefix.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

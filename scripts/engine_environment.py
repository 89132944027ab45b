"""A virtual environment for an engine that checks our files, apart from .venv: what scripts/*_environment.py share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["call", "clean_environ", "default_folder", "installed", "pip", "prepare", "say"]


def default_folder(name: str, version: str) -> Path:
    """Per engine, version and Python version, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lowbit" / f"{name}-{version}-py{sys.version_info.major}.{sys.version_info.minor}"


def prepare(folder: Path, packages: Mapping[str, str], engine: str, install: Callable[[Path], None]) -> Path:
    """Make a virtual environment with a CPU build of torch and the engine, or what is missing of it.

    Args:
        packages: distribution -> version, ``torch`` and ``engine`` among them.
        engine: of the environments that ``install(python)`` has completed, these have it.

    Returns:
        Its Python.

    Raises:
        ValueError: ``folder`` holds something else than a virtual environment.
        RuntimeError: pip failed; its message.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ValueError(f"{folder} exists and is not a virtual environment; name an empty or a new folder")
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        call([sys.executable, "-m", "venv", "--clear", str(folder)])
    torch, wanted = packages["torch"], packages[engine]
    if installed(python).get("torch", "").partition("+")[0] != torch:
        say(f"installing torch {torch}")
        _install_torch(python, f"torch=={torch}")
    if installed(python).get(engine) != wanted:
        say(f"installing {engine} {wanted}; this takes some minutes")
        install(python)
    return python


def _install_torch(python: Path, wanted: str) -> None:
    """A CPU build where pip's sources offer one, as scripts/_setup.sh does it."""
    if index := os.environ.get("LOWBIT_TORCH_INDEX"):
        return pip(python, "install", "--index-url", index, wanted)
    try:
        pip(python, "install", f"{wanted}+cpu")
    except RuntimeError:
        pip(python, "install", wanted)


def installed(python: Path) -> dict[str, str]:
    """Distribution name -> version, as that environment has them."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    versions: dict[str, str] = json.loads(call([str(python), "-c", code]))
    return versions


def clean_environ() -> dict[str, str]:
    """This process's environment variables without what ties it to its own Python; no network, no chatter."""
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return ours | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"[{Path(sys.argv[0]).stem}] {text}", file=sys.stderr, flush=True)


def pip(python: Path, *arguments: str) -> None:
    """Run pip in that environment. RuntimeError with its last lines if it fails."""
    call([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], clean_environ())


def call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """Standard output. RuntimeError with the last lines of standard error if the command fails."""
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        lines = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"{' '.join(command[:6])} ... failed with {done.returncode}:\n{lines}")
    return done.stdout

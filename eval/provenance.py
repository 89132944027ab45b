"""Where a figure comes from: versions, hardware and command line, as the tables in eval/results/ state them.

Imports nothing heavy: bench_calibration.py must stay a small process, see there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

__all__ = ["ROOT", "command_line", "cpu_name", "gpu_name", "lowbit_sources", "lowbit_version", "short_name", "version"]


def version(package: str) -> str:
    """The installed version of a package."""
    return importlib.metadata.version(package)


def lowbit_version() -> str:
    """Version and commit, ``0.1.0 (52be21d)``; ``+`` behind the commit says that the package has been changed since."""
    import lowbit

    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = ["status", "--porcelain", "--", "lowbit", "kernels"]
        changes = subprocess.run([*git, *status], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a source archive
        return lowbit.__version__
    return f"{lowbit.__version__} ({commit.stdout.strip()}{'+' if changes.stdout.strip() else ''})"


def lowbit_sources() -> str:
    """First 12 hex digits of the sha256 of lowbit's Python files: what a figure depends on, committed or not."""
    import lowbit

    package = Path(lowbit.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """The processor's name and how many of its logical cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {usable_cores()} cores"


def usable_cores() -> int:
    """Logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_name() -> str:
    """The first GPU's name as the driver gives it, without importing torch.

    Raises:
        ValueError: there is no NVIDIA GPU.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(f"no NVIDIA GPU here: {error}") from error


def short_name(path: str) -> str:
    """A file or folder by its last two names, ``books/test.txt``: the same wherever it lies. Other text as it is."""
    return "/".join(Path(path).resolve().parts[-2:]) if Path(path).exists() else path


def command_line() -> str:
    """The command that runs now, its paths as seen from the repository's root, where it is to be repeated."""
    script = os.path.relpath(sys.argv[0], ROOT)
    return shlex.join(["python", script, *(_relative(argument) for argument in sys.argv[1:])])


def _relative(argument: str) -> str:
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    is_path = os.path.isabs(value) or (os.sep in value and os.path.exists(value))
    return name + equals + (os.path.relpath(value, ROOT) if is_path else value)

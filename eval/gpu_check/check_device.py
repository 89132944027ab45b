"""The machine that a figure comes from: GPU, driver, clocks, versions, and which sources were run."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "NoGpu", "about", "clocks", "require_gpu", "sources", "without_gluon"]

ROOT = Path(__file__).resolve().parents[2]
MIN_ARCH = 75


class NoGpu(RuntimeError):
    """There is no GPU that the kernels run on; the message says why in one sentence."""


def require_gpu() -> torch.device:
    """The current CUDA device. NoGpu when there is none, or one that is too old."""
    if not torch.cuda.is_available():
        build = torch.version.cuda
        reason = "this torch is built without CUDA" if build is None else f"torch for CUDA {build} finds no device"
        raise NoGpu(f"no CUDA GPU here ({reason}); on a machine with one this command checks and measures the kernels")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < MIN_ARCH:
        raise NoGpu(f"{torch.cuda.get_device_name()} is sm_{major}{minor}; the kernels need sm_{MIN_ARCH} or newer")
    return torch.device("cuda", torch.cuda.current_device())


def without_gluon(without: Sequence[str]) -> tuple[str, ...]:
    """What is left out; the families in Gluon, too, with a line on stderr, where this Triton has no Gluon for them."""
    from lowbit_kernels.releases import gluon_missing
    from lowbit_kernels.tiles import HOPPER

    missing = gluon_missing()
    if missing is None or set(HOPPER) <= set(without):
        return tuple(without)
    print(f"left out: {', '.join(HOPPER)}: {missing}", file=sys.stderr)
    return (*without, *(family for family in HOPPER if family not in without))


def about(device: torch.device, *, tiny: bool = False, tables: bool = True) -> dict[str, Any]:
    """What a record carries. On the CPU (``--interpret``) the GPU's entries say so.

    Args:
        tiny: a run of ``--tiny``.
        tables: whether the tables of tiles count as sources: not for what makes one.
    """
    import triton

    from lowbit_kernels.table import table_for

    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none: Triton's interpreter on the CPU",
        "arch": _arch(device),
        "driver": _query("driver_version")[0] if on_gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "sources": sources(tables=tables) + " tiny" * tiny,  # so that no full run takes up what a tiny one left
        "table": table_for(_arch(device), torch.cuda.get_device_name(device) if on_gpu else None).source,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment; nothing is changed."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return dict(zip(names, _query(*names), strict=True))


def sources(*, tables: bool = True) -> str:
    """First 12 hex digits of the sha256 of the kernels, their tables if they count, and of these scripts."""
    digest = hashlib.sha256()
    for folder in (ROOT / "kernels" / "lowbit_kernels", Path(__file__).parent):
        for path in sorted([*folder.rglob("*.py"), *(folder.rglob("*.json") if tables else ())]):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _query(*names: str) -> list[str]:
    """Values of nvidia-smi for the current device, by one process; or why there are none."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    which = torch.cuda.current_device() if uuid is None else f"GPU-{uuid}"  # CUDA_VISIBLE_DEVICES renumbers
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"unknown ({type(error).__name__})"] * len(names)
    values = [value.strip() for value in done.stdout.split(",")]
    return values if len(values) == len(names) else [f"unknown ({done.stdout.strip()!r})"] * len(names)

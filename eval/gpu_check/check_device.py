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


def about(device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """What a record carries. On the CPU (``--interpret``) the GPU's entries say so."""
    import triton

    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none: Triton's interpreter on the CPU",
        "arch": _arch(device),
        "driver": _query("driver_version") if on_gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "sources": sources() + " tiny" * tiny,  # so that no full run takes up what a tiny one left
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment; nothing is changed."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {name: _query(name) for name in names}


def sources() -> str:
    """First 12 hex digits of the sha256 of the kernels and of these scripts."""
    digest = hashlib.sha256()
    for folder in (ROOT / "kernels" / "lowbit_kernels", Path(__file__).parent):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _query(name: str) -> str:
    """One value of nvidia-smi for the current device, or why there is none."""
    index = torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={name}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip()

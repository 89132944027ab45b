"""The environment of scripts/check_sglang: SGLang with a CPU build of torch, apart from .venv.

The package index has SGLang for CUDA only, and its requirements bring some gigabytes of CUDA. Only what the engine
imports to serve a text model on a CPU is installed, by name, beside the wheel itself. What SGLang then still asks for
and no index has is put into a folder of its own: ``sgl_kernel``, of which the CPU build (AMX) exists as sources only.
Its functions are imported and never called by what is checked here; each raises if it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import engine_environment as engine
from engine_environment import call, installed, pip, say

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch": "2.13.0", "sglang": "0.5.23", "torchvision": "0.28.0"}
IMPORTED = (
    "transformers==5.19.0", "compressed-tensors==0.18.0", "tokenizers==0.23.2", "triton==3.6.0", "numpy", "scipy",
    "safetensors", "pydantic", "fastapi", "uvicorn", "uvloop", "orjson", "msgspec", "pyzmq", "psutil", "requests",
    "aiohttp", "setproctitle", "pillow", "IPython", "partial_json_parser", "sentencepiece", "tiktoken", "einops",
    "packaging", "tqdm", "prometheus-client", "python-multipart", "pybase64", "interegular", "xxhash", "regex",
    "gguf", "dill", "openai==2.8.0", "openai-harmony==0.0.4", "zstandard", "easydict", "distro", "python-dateutil",
    "py-spy", "watchfiles", "numba==0.65.1", "xgrammar==0.2.7", "llguidance", "apache-tvm-ffi==0.1.11", "ninja",
    "kernels<0.15,>=0.14.1",
)  # fmt: skip
"""Of SGLang's own requirements what is imported on a CPU, with its pins."""

MISSING = '''"""Stands in for sgl_kernel, whose build for CPUs is in no package index: every function of it raises."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name}: there is no build of sgl_kernel for CPUs here")

    return missing
'''
TYPES = '''"""Names of number formats, as far as the choice of a Marlin kernel asks for them."""

from collections import namedtuple

ScalarType = namedtuple("ScalarType", "name size_bits bias")


class scalar_types:
    uint4, uint8 = ScalarType("uint4", 4, 0), ScalarType("uint8", 8, 0)
    uint4b8, uint8b128 = ScalarType("uint4b8", 4, 8), ScalarType("uint8b128", 8, 128)
    float8_e4m3fn, float4_e2m1f = ScalarType("float8_e4m3fn", 8, 0), ScalarType("float4_e2m1f", 4, 0)
'''

__all__ = ["PACKAGES", "default_folder", "engine_environ", "installed", "prepare", "say"]


def default_folder() -> Path:
    """Per SGLang and Python version, in the user's cache."""
    return engine.default_folder("sglang-cpu", PACKAGES["sglang"])


def prepare(folder: Path) -> Path:
    """The environment's Python; ValueError and RuntimeError as engine.prepare."""
    python = engine.prepare(folder, PACKAGES, "sglang", install)
    quiet_torchvision(python)
    stand_ins(folder)
    return python


def install(python: Path) -> None:
    pip(python, "install", f"torch=={PACKAGES['torch']}", *IMPORTED)
    # Without what they require, which is for CUDA; sglang last, because its presence says that all is there.
    pip(python, "install", "--no-deps", f"torchvision=={PACKAGES['torchvision']}")
    pip(python, "install", "--no-deps", f"sglang=={PACKAGES['sglang']}")


def quiet_torchvision(python: Path) -> None:
    """torchvision's operators are CUDA's and do not load; the rest of it, which is Python, would not without this."""
    code = "import importlib.util as u; print(u.find_spec('torchvision').submodule_search_locations[0])"
    (Path(call([str(python), "-c", code]).strip()) / "_meta_registrations.py").write_text("", encoding="utf-8")


def stand_ins(folder: Path) -> None:
    """The folder that goes before all others on SGLang's path: sgl_kernel, and our plugin with its entry point."""
    place = folder / "stand-ins"
    about = place / "lowbit_check_sglang-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (place / "sgl_kernel").mkdir(exist_ok=True)
    (place / "sgl_kernel" / "__init__.py").write_text(MISSING, encoding="utf-8")
    (place / "sgl_kernel" / "scalar_type.py").write_text(TYPES, encoding="utf-8")
    shutil.copyfile(ROOT / "scripts" / "sglang_stand_ins.py", place / "sglang_stand_ins.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lowbit-check-sglang\nVersion: 0\n", encoding="utf-8")
    entry = "[sglang.srt.plugins]\nlowbit_check = sglang_stand_ins:register\n"
    (about / "entry_points.txt").write_text(entry, encoding="utf-8")


def engine_environ(folder: Path) -> dict[str, str]:
    """Environment variables of SGLang's processes, for the environment at ``folder``."""
    return engine.clean_environ() | {
        "PYTHONPATH": str((folder / "stand-ins").resolve()),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_PLUGINS": "lowbit_check",
        "PYTHONWARNINGS": "ignore",
    }

"""Where a model comes from, a local folder or the Hugging Face hub; and which device it gets."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from ..companions import COMPANION_SUFFIXES

__all__ = ["auto_class", "parse_device", "resolve"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_WANTED = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANION_SUFFIXES)]
# Copies of the weights in other layouts, which some repositories keep beside the ones transformers reads.
_UNWANTED = ["*/*.safetensors", "consolidated*.safetensors"]


def resolve(path_or_id: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The folder of a model: the local one, or the hub's snapshot, fetched into the hub's cache.

    Only configuration, tokenizer and safetensors are fetched; Python files only with ``trust_remote_code``, which runs
    none of them here, pickled weights never. ``HF_HUB_OFFLINE=1`` keeps to the cache.

    Raises:
        FileNotFoundError: neither a folder here nor a model that can be fetched.
        NotADirectoryError: the path is a file.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder with a config.json")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no such model folder: {name} (and it cannot be a Hugging Face model id)")
    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except Exception as error:
        # The hub client raises its own errors, the HTTP library's and plain OSErrors; only the last may mean the disk.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no folder {name} here, and no model of that id could be fetched from the Hugging Face hub: {reason}"
        ) from error


def auto_class(config: Any) -> Any:
    """The auto class that builds what ``config.architectures`` names; ``AutoModelForCausalLM`` where none does."""
    named = (config.architectures or [""])[0]
    for auto in (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModel,
    ):
        try:
            found = auto._model_mapping[type(config)]
        except KeyError:
            continue
        if named in [cls.__name__ for cls in (found if isinstance(found, (tuple, list)) else (found,))]:
            return auto
    return AutoModelForCausalLM


def parse_device(device: str | torch.device) -> torch.device:
    """``auto`` (CUDA when there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: another device, or CUDA where torch sees none or fewer.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {str(device)!r}")
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) >= count:
            raise ValueError(f"device {str(device)!r} was asked for, but torch sees {count} CUDA devices")
    return parsed

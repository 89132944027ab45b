"""Configuration and safetensors headers of a model on the Hugging Face hub: a few ranges over HTTP, no weights."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from .headers import INDEX, Header, read_headers

__all__ = ["hub_headers"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_CONFIGS = ["config.json", "quantize_config.json", "quant_config.json", INDEX]


def hub_headers(name: str) -> tuple[Path, dict[str, Header]]:
    """The folder of the hub's cache with a model's configuration, and every tensor of it.

    Headers of shards that are in the cache are read there, others from the hub. ``HF_HUB_OFFLINE=1`` keeps to the
    cache.

    Raises:
        FileNotFoundError: neither a folder here nor a model of the hub that can be read, or one without safetensors.
        ValueError: what is in the cache is damaged.
    """
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no such model folder: {name} (and it cannot be a Hugging Face model id)")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_CONFIGS))
        try:
            return folder, read_headers(folder)
        except FileNotFoundError:  # not, or not all, in the cache
            found = HfApi().get_safetensors_metadata(name, revision=folder.name)  # a snapshot's name is its commit
    except ValueError:
        raise
    except Exception as error:  # the hub client's own, the HTTP library's and plain OSErrors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"no folder {name} here, and no model of that id could be read on the Hugging Face hub: {reason}"
        ) from None
    return folder, {
        tensor: Header(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0], shard)
        for shard, metadata in found.files_metadata.items()
        for tensor, info in metadata.tensors.items()
    }

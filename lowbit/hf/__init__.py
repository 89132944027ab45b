"""Everything that touches transformers: loading models dense or packed, and what a packed folder takes from its source.

No other part of lowbit imports transformers.
"""

from .export import (
    check_names,
    checkpoint_names,
    companion_files,
    config_dict,
    dense_tensors,
    ignore_names,
    rounding_notes,
)
from .installed import install, uninstall
from .loading import load, load_dense
from .marking import mark_packed
from .onthefly import LowbitConfig
from .source import parse_device, resolve

__all__ = [
    "LowbitConfig",
    "check_names",
    "checkpoint_names",
    "companion_files",
    "config_dict",
    "dense_tensors",
    "ignore_names",
    "install",
    "load",
    "load_dense",
    "mark_packed",
    "parse_device",
    "resolve",
    "rounding_notes",
    "uninstall",
]

"""Everything that touches transformers: loading models dense or packed, and what a packed folder takes from its source.

No other part of lowbit imports transformers.
"""

from .export import checkpoint_names, companion_files, config_dict, dense_tensors, ignore_names
from .loading import load, load_dense
from .source import parse_device, parse_dtype, resolve

__all__ = [
    "checkpoint_names",
    "companion_files",
    "config_dict",
    "dense_tensors",
    "ignore_names",
    "load",
    "load_dense",
    "parse_device",
    "parse_dtype",
    "resolve",
]

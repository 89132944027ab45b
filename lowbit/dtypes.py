"""The compute dtypes, float32, float16 and bfloat16, and their names in arguments and files."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "dtype_name", "parse_dtype"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A compute dtype, or None for ``auto``.

    Raises:
        ValueError: not auto, float32, float16 or bfloat16.
    """
    if dtype == "auto":
        return None
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed not in DTYPES.values():
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {str(dtype)!r}")
    return parsed


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``, as configuration files have it; of any dtype."""
    return str(dtype).removeprefix("torch.")

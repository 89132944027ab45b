"""Checkpoint formats of other tools, read into lowbit's own layout and written from it.

| `quant_method`     | read                                   | module             |
|--------------------|----------------------------------------|--------------------|
| compressed-tensors | `pack-quantized`, `int-quantized`      | compressed.py      |
| gptq               | `checkpoint_format` gptq, gptq_v2      | gptq.py            |
| awq                | `version` gemm                         | awq.py             |

What is peculiar to a format (AWQ's order of nibbles, GPTQ version 1's zero minus one, ``g_idx``) is known in its module
and nowhere else. config.json's part of a format is read in ``pack_config.py`` and ``foreign_config.py``.
"""

from __future__ import annotations

from typing import Any

from ..foreign_config import GptqConfig, read_section
from ..pack_config import PackedFormat
from .awq import AwqFormat
from .base import PackedLinear, SourceFormat, StoredWeight
from .compressed import CompressedFormat
from .gptq import GptqFormat

__all__ = ["PackedLinear", "SourceFormat", "StoredWeight", "parse_section"]


def parse_section(section: Any) -> SourceFormat:
    """Recognise and read a ``quantization_config``.

    Raises:
        ValueError: a method, format or version lowbit does not read (says which it reads), or contradictory fields.
    """
    config = read_section(section)
    if isinstance(config, PackedFormat):
        return CompressedFormat(config)
    return GptqFormat(config) if isinstance(config, GptqConfig) else AwqFormat(config)

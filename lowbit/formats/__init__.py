"""Checkpoint formats of other tools, read into lowbit's own layout and written from it.

| `quant_method`     | read                                   | module             |
|--------------------|----------------------------------------|--------------------|
| compressed-tensors | `pack-quantized`, `int-quantized`      | compressed.py      |
| gptq               | `checkpoint_format` gptq, gptq_v2      | gptq.py            |
| awq                | `version` gemm                         | awq.py             |

What is peculiar to a format (AWQ's order of nibbles, GPTQ version 1's zero minus one, ``g_idx``) is known in its module
and nowhere else.
"""

from __future__ import annotations

from typing import Any

from ..pack_quantized import QUANT_METHOD as COMPRESSED_TENSORS
from ..pack_quantized import parse_quantization_config
from .awq import QUANT_METHOD as AWQ
from .awq import parse_awq_config
from .base import PackedLinear, SourceFormat, StoredWeight, as_mapping
from .compressed import CompressedFormat
from .gptq import QUANT_METHOD as GPTQ
from .gptq import parse_gptq_config

__all__ = ["PackedLinear", "SourceFormat", "StoredWeight", "parse_section"]

_READ = (
    "compressed-tensors (format pack-quantized or int-quantized), gptq (checkpoint_format gptq or gptq_v2) and awq "
    "(version gemm)"
)


def parse_section(section: Any) -> SourceFormat:
    """Recognise and read a ``quantization_config``.

    Raises:
        ValueError: a method, format or version lowbit does not read (says which it reads), or contradictory fields.
    """
    method = as_mapping(section, "quantization_config").get("quant_method")
    if method == COMPRESSED_TENSORS:
        return CompressedFormat(parse_quantization_config(section))
    if method == GPTQ:
        return parse_gptq_config(section)
    if method == AWQ:
        return parse_awq_config(section)
    raise ValueError(f"lowbit reads the quant_methods {_READ}; this checkpoint has quant_method {method!r}")

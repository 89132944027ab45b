"""Loading a checkpoint whose files are not in QuantLinear's layout: GPTQ, AWQ.

transformers takes weights from a folder or from a state dict. Here it gets a state dict of lazy tensors in our layout:
each is read from its shard and converted when transformers asks for it, so no second copy of the model exists.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoint import Checkpoint
from .source import auto_class

__all__ = ["foreign_from_pretrained"]


def foreign_from_pretrained(
    checkpoint: Checkpoint, *, config: Any, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained(folder, output_loading_info=True)`` for a checkpoint in a foreign layout.

    Args:
        checkpoint: the folder, read.
        config: the model's, its ``quantization_config`` made by :func:`~lowbit.hf.quantizer.in_memory_config`.
        trust_remote_code: see :func:`~lowbit.hf.load`.
        options: of ``from_pretrained``.

    Returns:
        the model and its loading info.
    """
    folder = checkpoint.path
    # The class and its configuration, whose choice the auto class leaves to itself; with no folder it cannot load.
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    load: Any = type(empty).from_pretrained
    model, info = load(
        None, config=empty.config, state_dict=checkpoint.lowbit_tensors(), output_loading_info=True, **options
    )
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info

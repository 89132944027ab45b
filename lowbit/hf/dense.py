"""How the dense checkpoint of an architecture stores what lowbit packs as plain linears."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from ..expand import DenseLayout, MergedExperts
from ..experts import why_not_separable
from .experts import revert_names
from .source import auto_class

__all__ = ["dense_layout"]


def dense_layout(folder: Path) -> DenseLayout | None:
    """Which weights of a folder's architecture are stored transposed (GPT-2) or merged over experts (gpt-oss).

    The model is built on the meta device: no weight is read or allocated.

    Returns:
        None where transformers does not know the architecture, or only with code that comes with the model.

    Raises:
        ValueError: the architecture's class refuses the configuration.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError:
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the model's class makes of a configuration it does not like
        raise ValueError(f"{folder}: config.json describes no model that can be built: {error}") from None
    state = dict(model.state_dict())
    owners = {id(tensor): name.rpartition(".")[0] for name, tensor in state.items()}
    transposed, merged = set(), {}
    for name, tensor in revert_names(model, state).items():
        if id(tensor) not in owners:  # split or joined on the way into a file
            continue
        module = model.get_submodule(owners[id(tensor)])
        layer, _, part = name.rpartition(".")
        if type(module).__name__ == "Conv1D" and part == "weight":
            transposed.add(layer)
        elif why_not_separable(module) is None:
            merged[layer] = MergedExperts(
                count=module.num_experts,
                gated=module.has_gate,
                biased=module.has_bias,
                transposed=module.is_transposed,
                concatenated=module.is_concatenated,
            )
    return DenseLayout(frozenset(transposed), merged)

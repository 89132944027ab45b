"""How the dense checkpoint of an architecture stores what lowbit packs as plain linears."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

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
    merged = _merged(model)
    alone = {packed: how for packed, how in merged.items() if _can_be_reverted(model, how.module)}
    return DenseLayout(_transposed(model), alone, frozenset(merged.keys() - alone), partial(revert_names, model))


def _transposed(model: PreTrainedModel) -> frozenset[str]:
    """Names in files of GPT-2's Conv1D layers."""
    layers = (name for name, module in model.named_modules() if type(module).__name__ == "Conv1D")
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in layers}
    return frozenset(name.removesuffix(".weight") for name in revert_names(model, weights))


def _merged(model: PreTrainedModel) -> dict[str, MergedExperts]:
    """Experts whose tensors are merged in files too, by what packed ones are called there."""
    expert = ".0.down_proj.weight_packed"
    modules = {name: module for name, module in model.named_modules() if name and why_not_separable(module) is None}
    if not modules:
        return {}
    numbered = {name.rpartition(".0.")[0] for name in revert_names(model, dict(model.state_dict()))}
    merged = {}
    for name, module in modules.items():
        (packed,) = revert_names(model, {f"{name}{expert}": torch.empty(0)})
        packed = packed.removesuffix(expert)
        if packed in numbered:
            continue  # taken apart on the way into a file: one expert's projections, as in a packed one
        merged[packed] = MergedExperts(
            module=name,
            count=module.num_experts,
            gated=module.has_gate,
            biased=module.has_bias,
            transposed=module.is_transposed,
            concatenated=module.is_concatenated,
        )
    return merged


def _can_be_reverted(model: PreTrainedModel, name: str) -> bool:
    """Whether a module's tensors become those of a file without another module's."""
    try:
        revert_names(model, {f"{name}.{part}": t for part, t in model.get_submodule(name).named_parameters()})
    except ValueError:  # transformers: "Expected pattern ... in collected tensors"
        return False
    return True

"""Names of experts: transformers merges the per-expert tensors of a checkpoint while loading, lowbit keeps them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading
from transformers import __version__ as VERSION
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, revert_weight_conversion

from ..experts import Experts, why_not_separable

__all__ = ["revert_names", "separated", "why_not_saved"]

CONVERTS_FIRST = hasattr(core_model_loading, "apply_converters")
"""Whether transformers, writing a model, takes merged tensors apart before it changes names: from 5.21 on."""

_MERGED = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")
_LOOKAHEAD = re.compile(r"\(\?!.*\)$")


def separated(model: nn.Module, conversions: Sequence[Any]) -> list[Any]:
    """``conversions`` of a model for its :class:`~lowbit.experts.Experts`: what merges experts is replaced by renamings
    of the projections of one expert (Mixtral's files say w1, w3 and w2). Without such experts, all stay.

    Where experts of other layers are still merged (left dense), what merges those stays, said of their names alone: in
    files they are single experts too.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if not any(isinstance(module, Experts) for module in modules.values()):
        return list(conversions)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    merged = [name.removeprefix(prefix) for name, module in modules.items() if why_not_separable(module) is None]
    kept: list[Any] = []
    done: set[str] = set()
    for entry in conversions:
        found = isinstance(entry, WeightConverter) and _MERGED.search(entry._original_target_patterns[0])
        # without a * the files too hold all experts in one tensor (Qwen3-VL-MoE), which nothing here takes apart
        if not found or not all(".*." in source for source in entry._original_source_patterns):
            kept.append(entry)
            continue
        parts = ("gate_proj", "up_proj") if found[1] == "gate_up_proj" else (found[1],)
        for source, part in zip(entry._original_source_patterns, parts, strict=True):
            stored = _LOOKAHEAD.sub("", source).removesuffix(".weight").rpartition(".")[2]
            if stored != part:
                kept.append(WeightRenaming(rf"\.experts\.(\d+)\.{stored}\.", rf".experts.\1.{part}."))
        for name in merged:
            target = f"{name}.{found[1]}"
            if target not in done:
                done.add(target)
                # not weight_packed, nor any other part of a packed one
                weights = [rf"{name}.*.{part}.weight(?!\w)" for part in parts]
                kept.append(WeightConverter(weights, [target], operations=entry.operations))
    return kept


def revert_names(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names of the original checkpoint, as ``save_pretrained`` of this model will write it."""
    if any(isinstance(module, Experts) for module in model.modules()):
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            everything = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [entry for entry in everything if not isinstance(entry, PrefixChange)]
        model._weight_conversions = separated(model, conversions) or None
        if not CONVERTS_FIRST and model._weight_conversions is not None:
            return _revert_in_turn(model, state)
    reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return reverted


def _revert_in_turn(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 5.21 does it: what was merged is taken apart, then names are changed."""
    conversions = model._weight_conversions
    try:
        for kind in (WeightConverter, WeightRenaming):
            model._weight_conversions = [entry for entry in conversions if isinstance(entry, kind)]
            state = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = conversions
    return state


def why_not_saved(model: PreTrainedModel) -> str | None:
    """Why transformers' own ``save_pretrained`` would write wrong names, or None.

    Before 5.21 it changes names first, after which what takes the dense experts of one layer apart (:func:`separated`)
    no longer knows its own: Mixtral's, whose names in files are others.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    merged = any(isinstance(e, WeightConverter) and _MERGED.search(e._original_target_patterns[0]) for e in conversions)
    renamed = any(isinstance(entry, WeightRenaming) for entry in conversions)
    if CONVERTS_FIRST or not (merged and renamed):
        return None
    if not any(isinstance(module, Experts) for module in model.modules()):
        return None
    return f"experts that stayed dense beside packed ones need transformers 5.21 or newer, this is {VERSION}"

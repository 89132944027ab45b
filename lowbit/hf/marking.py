"""What quantizing in place leaves to do: transformers must know that the model holds packed layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..formats.reordered import ReorderedLinear
from ..linear import Int8Linear, QuantLinear
from ..pack_config import quantization_config
from .export import checkpoint_names, ignore_names
from .quantizer import METHOD, PackedConfig, PackedQuantizer

__all__ = ["mark_packed"]


def mark_packed(model: nn.Module) -> None:
    """Make a model whose linears were replaced what a loaded one is: ``save_pretrained`` writes a packed folder.

    Unmarked, it would write the packed tensors under a config.json that does not speak of them, and who loads that
    folder gets weights that were made up. Models that are not transformers', or hold nothing packed, stay as they are.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, Int8Linear))}
    if not packed or not isinstance(model, PreTrainedModel):
        return
    stored = checkpoint_names(model, packed)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    section = quantization_config({stored[name]: module.spec for name, module in packed.items()},
                                  ignore_names(model, dense))  # fmt: skip
    reordered = {name: {"reordered": True} for name, module in packed.items() if isinstance(module, ReorderedLinear)}
    quantizer = PackedQuantizer(PackedConfig(METHOD, section, reordered))
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = quantizer.quantization_config

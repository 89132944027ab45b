"""Our HfQuantizer: puts QuantLinears into a model while transformers still has it on meta, then lets it load them.

The folder on disk says ``compressed-tensors`` and stays so. Only in memory, between ``AutoConfig`` and
``from_pretrained``, the configuration names the method registered here; what ``save_pretrained`` writes is the
compressed-tensors configuration again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import Checkpoint
from ..formats.reordered import ReorderedLinear
from ..linear import linear_class
from ..linearize import linearize, place, settle
from ..spec import QuantSpec
from .experts import separated

__all__ = ["METHOD", "LowbitConfig", "LowbitQuantizer", "in_memory_config"]

METHOD = "lowbit-in-memory"


def in_memory_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """What replaces ``config.quantization_config`` for one ``from_pretrained``; plain data, as transformers demands.

    Args:
        dtype: of the scales; None keeps what each layer has in the file, which may be finer than the model's.
    """
    return {
        "quant_method": METHOD,
        "stored": checkpoint.lowbit_section(),
        "linears": {
            linear.name: {
                "shape": list(linear.shape),
                "spec": linear.spec.to_dict(),
                "scale_dtype": str(dtype or linear.scale_dtype).removeprefix("torch."),
                "reordered": linear.reordered,
            }
            for linear in checkpoint.linears.values()
        },
    }


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):
    """The packed layers of a checkpoint by name, and the compressed-tensors configuration they were read under."""

    def __init__(self, quant_method: str, stored: dict[str, Any], linears: dict[str, dict[str, Any]]) -> None:
        self.quant_method = quant_method
        self.stored = stored
        self.linears = linears

    def to_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: the configuration as it was read."""
        return copy.deepcopy(self.stored)


@register_quantizer(METHOD)
class LowbitQuantizer(HfQuantizer):
    """Replaces each ``nn.Linear`` that is packed on disk by an empty QuantLinear of the same name."""

    requires_calibration = True  # there is no quantizing while loading: folders come packed

    def is_serializable(self) -> bool:
        """QuantLinear's state_dict is the disk layout; that of reordered layers (GPTQ's act-order) is nobody's."""
        assert isinstance(self.quantization_config, LowbitConfig)
        return not any(layer["reordered"] for layer in self.quantization_config.linears.values())

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The matmul is a torch.library operator, so generate() may compile."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        assert isinstance(self.quantization_config, LowbitConfig)
        layers = self.quantization_config.linears
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        replaced = linearize(model)
        settle(model, replaced, _module_names(model, layers).values())
        for name, module_name in _module_names(model, layers).items():
            module, layer = model.get_submodule(module_name), layers[name]
            assert isinstance(module, nn.Linear)
            if f"{module_name}.weight" in tied:
                raise ValueError(
                    f"{name} is packed, but the configuration ties its weight to another (tie_word_embeddings)"
                )
            n, k = layer["shape"]
            if (n, k) != (module.out_features, module.in_features):
                raise ValueError(
                    f"{name} is packed with the shape {(n, k)}, but the model config.json describes needs "
                    f"{(module.out_features, module.in_features)}"
                )
            spec = QuantSpec.from_dict(layer["spec"])
            module_class = ReorderedLinear if layer["reordered"] else linear_class(spec)
            packed = module_class(
                k,
                n,
                spec,
                bias=module.bias is not None,
                dtype=getattr(torch, layer["scale_dtype"]),
                device="meta",
            )
            place(model, module_name, packed)
            parent = model.get_submodule(module_name.rpartition(".")[0])
            if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
                # GPT-2's and T5's _init_weights would reach for the weight of the parent's linears; all are loaded,
                # and the parent has nothing of its own to initialize.
                parent._is_hf_initialized = True
        self._shapes = _shapes(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Packed experts are loaded one by one, not merged."""
        return separated(model, super().update_weight_conversions(weight_conversions, model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        # transformers 5.17 lets a quantizer's model take a dense tensor of any shape without a word.
        loaded = _shapes(model)
        wrong = [(name, loaded[name], shape) for name, shape in self._shapes.items() if loaded[name] != shape]
        if wrong:
            raise ValueError(f"weights of another shape (found, needed): {wrong[:5]}, {len(wrong)} in all")


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _module_names(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Checkpoint name -> module name, by the key mapping transformers itself is going to use.

    Args:
        layers: as in LowbitConfig.

    Raises:
        ValueError: a packed layer is not an ``nn.Linear`` of the model, or two are the same.
    """
    transforms = separated(model, get_model_conversion_mapping(model))
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = {f"{name}.{part}": name for name in modules for part in ("weight_packed", "weight")}
    found: dict[str, str] = {}
    for name, layer in layers.items():
        key = f"{name}.{'weight' if 'activations' in layer['spec'] else 'weight_packed'}"  # int-quantized or packed
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, linears)
        module_name = linears.get(renamed) or linears.get(key)
        if module_name is None:
            raise ValueError(f"{name} is packed, but {type(model).__name__} has no nn.Linear of that name")
        if module_name in found.values():
            raise ValueError(f"two packed layers belong to {module_name}, {name} is one of them")
        found[name] = module_name
    return found

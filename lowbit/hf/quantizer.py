"""Our HfQuantizer: puts QuantLinears into a model while transformers still has it on meta, then lets it load them.

The folder on disk says ``compressed-tensors`` and stays so. Only in memory, between ``AutoConfig`` and
``from_pretrained``, the configuration names the method registered here; what ``save_pretrained`` writes is the
compressed-tensors configuration again. Importing this module adds that one name to transformers and changes nothing.
"""

from __future__ import annotations

import copy
import weakref
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
from ..cpu import DISK
from ..dtypes import dtype_name
from ..experts import Experts
from ..formats.reordered import ReorderedLinear
from ..heap import return_free_memory
from ..linear import Int8Linear, QuantLinear, linear_class
from ..linearize import linearize, place, settle
from ..ops import best_layout
from ..spec import QuantSpec
from .experts import separated, why_not_saved
from .plain_reader import PlainReader
from .sharded import settle_shards, sharded, tp_size

__all__ = [
    "METHOD",
    "LoadingQuantizer",
    "PackedConfig",
    "PackedQuantizer",
    "check_shapes",
    "in_memory_config",
    "leave_parent_alone",
    "prepare",
    "shapes_of",
    "unknown_layers",
]

METHOD = "lowbit-in-memory"


def in_memory_config(checkpoint: Checkpoint, dtype: torch.dtype | None, *, repack: bool = True) -> dict[str, Any]:
    """What replaces ``config.quantization_config`` for one ``from_pretrained``; plain data, as transformers demands.

    Args:
        dtype: of the scales; None keeps what each layer has in the file, which may be finer than the model's.
        repack: make the layers ready to run when they are loaded; False for a model that is moved afterwards.
    """
    return {
        "quant_method": METHOD,
        "repack": repack,
        "stored": checkpoint.lowbit_section(),
        "linears": {
            linear.name: {
                "shape": list(linear.shape),
                "spec": linear.spec.to_dict(),
                "scale_dtype": dtype_name(dtype or linear.scale_dtype),
                "reordered": linear.reordered,
            }
            for linear in checkpoint.linears.values()
        },
    }


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The packed layers of a checkpoint by name, and the compressed-tensors configuration they were read under."""

    def __init__(
        self,
        quant_method: str,
        stored: dict[str, Any],
        linears: dict[str, dict[str, Any]],
        repack: bool = True,
    ) -> None:
        self.quant_method = quant_method
        self.stored = stored
        self.linears = linears
        self.repack = repack

    def to_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: the configuration as it was read."""
        return copy.deepcopy(self.stored)


class LoadingQuantizer(HfQuantizer):
    """What transformers is told alike of folders that are packed and of those that are packed while they are loaded."""

    _loading: Any
    """The model, weakly, while it is loaded."""

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are: gradients go through the packed weights, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The matmul is a torch.library operator, so generate() may compile."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Packed experts are loaded one by one, not merged. transformers 5.17 does not say of which model."""
        return separated(self._loading, super().update_weight_conversions(weight_conversions, *model))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
        """What ``save_pretrained`` asks before it writes.

        Raises:
            ValueError: this transformers would write some tensors under wrong names.
        """
        reason = why_not_saved(model)
        if reason is not None:
            raise ValueError(f"not serializable: {reason}; `lowbit convert IN OUT --to compressed-tensors` writes it")
        state, metadata = super().get_state_dict_and_metadata(model)
        return state, metadata


@register_quantizer(METHOD)
class PackedQuantizer(LoadingQuantizer):
    """Replaces each ``nn.Linear`` that is packed on disk by an empty QuantLinear of the same name."""

    requires_calibration = True  # there is no quantizing while loading: folders come packed

    def is_serializable(self) -> bool:
        """What ``save_pretrained`` asks first.

        Raises:
            ValueError: some columns are reordered (GPTQ's act-order), for which compressed-tensors has no place.
        """
        assert isinstance(self.quantization_config, PackedConfig)
        reordered = [name for name, layer in self.quantization_config.linears.items() if layer["reordered"]]
        if reordered:
            raise ValueError(
                f"not serializable: compressed-tensors, which save_pretrained writes, cannot hold the columns of "
                f"{reordered[0]}, reordered by act-order (g_idx), {len(reordered)} layers in all; `lowbit convert IN "
                "OUT --to gptq` writes them"
            )
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        assert isinstance(self.quantization_config, PackedConfig)
        self._reader = PlainReader(options.get("checkpoint_files"))
        layers = self.quantization_config.linears
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        replaced = linearize(model)
        self._names = _module_names(model, layers)
        settle(model, replaced, self._names.values())
        for name, module_name in self._names.items():
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
            given = {"bias": module.bias is not None, "dtype": getattr(torch, layer["scale_dtype"])}
            packed: nn.Module
            if tp_size(model) > 1:
                packed = sharded(model, module_name, n, k, spec, reordered=layer["reordered"], **given)
            elif layer["reordered"]:
                packed = ReorderedLinear(k, n, spec, **given, device="meta")
            else:
                packed = linear_class(spec)(k, n, spec, **given, device="meta")
            place(model, module_name, packed)
            leave_parent_alone(model, module_name)
        self._shapes = shapes_of(model)
        self._loading = weakref.proxy(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        del self._loading  # a model is copied with its quantizer, and a weak reference cannot be
        check_shapes(model, self._shapes)
        settle_shards(model)
        assert isinstance(self.quantization_config, PackedConfig)
        if self.quantization_config.repack:
            prepare(model, self._reader, {module: name for name, module in self._names.items()})


def prepare(model: nn.Module, reader: PlainReader | None = None, names: dict[str, str] | None = None) -> None:
    """Make loaded layers ready to run: frozen, checked, and in the layout that their device is fastest with.

    Packed experts are put into stacks, for grouped calls, once their linears are ready.

    transformers maps the files into memory. A layer that is about to be repacked or stacked on the CPU is read once
    more with plain reads, and the mapped copy is dropped unread: a page of a mapped file that was touched counts as
    memory of the process until the whole file is unmapped, and at the end that would be the packed size a second time.

    Args:
        model: layers on meta, which accelerate has put on disk or into the CPU's memory for a GPU, stay as on disk.
        reader: of the files the model was loaded from, or None.
        names: module name -> name in those files.

    Raises:
        ValueError: scales that were finite and not zero in the file are not in the dtype they were loaded in.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    moving = {id(module) for group in experts if group.why_not_stackable() is None for module in group.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, (QuantLinear, Int8Linear)):
            continue
        module.requires_grad_(False)  # transformers makes every floating point parameter it loads trainable
        scales = module.weight_scale
        if scales.is_meta:
            continue
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise ValueError(f"{name}: its scales do not fit into {scales.dtype}; load it with dtype auto or float32")
        attribute = "weight" if isinstance(module, Int8Linear) else "weight_packed"
        stored, held = f"{(names or {}).get(name)}.{attribute}", getattr(module, attribute)
        copied = held.device.type == "cpu" and (id(module) in moving or _is_repacked_on_the_cpu(module))
        if copied and reader is not None and stored in reader and reader[stored].dtype == held.dtype:
            setattr(module, attribute, nn.Parameter(reader[stored][:], requires_grad=False))
        module.repack()
    return_free_memory()
    for group in experts:
        group.repack()


def _is_repacked_on_the_cpu(module: QuantLinear | Int8Linear) -> bool:
    if isinstance(module, Int8Linear) or module.weight_packed.device.type != "cpu":
        return False
    n, k, spec, scales = module.out_features, module.in_features, module.spec, module.weight_scale
    layout = best_layout(
        n, k, bits=spec.bits, symmetric=spec.symmetric, dtype=scales.dtype, device=module.weight_packed.device
    )
    return layout != DISK


def leave_parent_alone(model: PreTrainedModel, name: str) -> None:
    """Keep transformers from initializing the module around the packed layer ``name``.

    GPT-2's and T5's ``_init_weights`` would reach for the weight of the parent's linears. All of them are loaded; a
    parent that has something of its own to initialize is left as it is.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
        parent._is_hf_initialized = True


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(model: nn.Module, before: dict[str, tuple[int, ...]]) -> None:
    """Refuse what transformers 5.17 lets a quantizer's model take without a word: a dense tensor of any shape.

    Args:
        before: :func:`shapes_of` the model that was to be filled.

    Raises:
        ValueError: names the tensors, with the shapes found and needed.
    """
    loaded = shapes_of(model)
    wrong = [(name, loaded[name], shape) for name, shape in before.items() if loaded[name] != shape]
    if wrong:
        raise ValueError(f"weights of another shape (found, needed): {wrong[:5]}, {len(wrong)} in all")


def unknown_layers(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> list[str]:
    """Packed layers that have no ``nn.Linear`` in the model, nor in what linearize() makes of it.

    Args:
        layers: as in PackedConfig.
    """
    replaced = linearize(model)
    try:
        return [name for name, module_name in _find_modules(model, layers).items() if module_name is None]
    finally:
        settle(model, replaced, ())


def _module_names(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Checkpoint name -> module name.

    Raises:
        ValueError: a packed layer is not an ``nn.Linear`` of the model, or two are the same.
    """
    found: dict[str, str] = {}
    for name, module_name in _find_modules(model, layers).items():
        if module_name is None:
            raise ValueError(f"{name} is packed, but {type(model).__name__} has no nn.Linear of that name")
        if module_name in found.values():
            raise ValueError(f"two packed layers belong to {module_name}, {name} is one of them")
        found[name] = module_name
    return found


def _find_modules(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Checkpoint name -> name of an ``nn.Linear``, by the key mapping transformers itself is going to use."""
    transforms = separated(model, get_model_conversion_mapping(model))
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = {f"{name}.{part}": name for name in modules for part in ("weight_packed", "weight")}
    found: dict[str, str | None] = {}
    for name, layer in layers.items():
        key = f"{name}.{'weight' if 'activations' in layer['spec'] else 'weight_packed'}"  # int-quantized or packed
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, linears)
        found[name] = linears.get(renamed) or linears.get(key)
    return found

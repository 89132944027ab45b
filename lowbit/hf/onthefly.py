"""LowbitConfig: quantize while loading, one weight at a time, without data."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..activations import build_spec
from ..experts import Experts
from ..linear import Int8Linear, QuantLinear, linear_class
from ..linearize import place, plan_linearized
from ..pack_config import quantization_config
from ..report import QuantReport
from ..spec import PACKED_BITS, QuantSpec
from .experts import separated
from .export import checkpoint_names, ignore_names
from .pack_op import PackOp, Slot, expert_slots, linear_slot
from .plain_reader import PlainReader
from .quantizer import METHOD as PACKED_METHOD
from .quantizer import LoadingQuantizer, PackedConfig, check_shapes, leave_parent_alone, prepare, shapes_of
from .sharded import tp_size

__all__ = ["LowbitConfig", "LowbitQuantizer"]

METHOD = "lowbit"
_FIELDS = ("bits", "group_size", "symmetric", "activations", "ignore", "allow_partial")

logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):
    """``from_pretrained(dense_model, quantization_config=LowbitConfig(bits=4))`` quantizes while it loads.

    Round to nearest with lowbit's search for the best grid: the codes are those of ``lowbit.quantize(...,
    method="rtn")`` without a text. The linears and experts of the model's blocks are quantized, embeddings and output
    head are not. ``model.hf_quantizer.report`` is the :class:`~lowbit.report.QuantReport`: every weight with its error,
    every weight left dense with the reason. What ``save_pretrained`` writes is an ordinary compressed-tensors folder.

    Args:
        bits: 2, 4 or 8.
        group_size: columns that share a scale: 32, 64, 128, or -1 for whole rows. Default: 128, with activations -1.
        symmetric: None is the width's default, see :class:`~lowbit.QuantSpec`.
        activations: None, or ``int8`` for W8A8 with a scale per token (bits 8, whole rows, symmetric).
        ignore: regular expressions, searched for in the module names; what matches stays dense.
        allow_partial: accept a model of which less than 90 % of the decoder's weights can be quantized.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool | None = None,
        activations: str | None = None,
        ignore: Sequence[str] = (),
        allow_partial: bool = False,
    ) -> None:
        if activations == "int8-static":
            raise ValueError(
                "activations 'int8-static' needs calibration, and quantizing while loading sees no data; give 'int8', "
                "or use lowbit.quantize"
            )
        spec = build_spec(bits, group_size, symmetric, activations)
        if spec.bits not in PACKED_BITS:
            raise ValueError(f"bits must be one of {PACKED_BITS} to be packed, got {bits!r}")
        if isinstance(ignore, str) or not all(isinstance(pattern, str) for pattern in ignore):
            raise ValueError(f"ignore must be a sequence of regular expressions, got {ignore!r}")
        if type(allow_partial) is not bool:
            raise ValueError(f"allow_partial must be True or False, got {allow_partial!r}")
        self.quant_method = METHOD
        self.bits, self.group_size, self.symmetric = spec.bits, spec.group_size, spec.symmetric
        self.activations, self.ignore, self.allow_partial = activations, list(ignore), allow_partial

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the fields by name, as ``to_dict`` gives them.

        Raises:
            ValueError: a field that does not exist, or a value that is not allowed.
        """
        fields = {**config_dict, **kwargs}
        fields.pop("quant_method", None)
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            raise ValueError(f"LowbitConfig has the fields {_FIELDS}, got {unknown}")
        config = cls(**fields)
        return (config, {}) if return_unused_kwargs else config

    @property
    def spec(self) -> QuantSpec:
        """The grid."""
        return build_spec(self.bits, self.group_size, self.symmetric, self.activations)


@register_quantizer(METHOD)
class LowbitQuantizer(LoadingQuantizer):
    """Puts packed linears into a model on meta and fills them from its dense checkpoint.

    Attributes:
        report: what became of every weight; complete once the model is loaded.
    """

    requires_calibration = False
    quantization_config: LowbitConfig | PackedConfig
    report: QuantReport

    def __init__(self, config: LowbitConfig, **options: Any) -> None:
        super().__init__(config, **options)
        if self.pre_quantized:
            raise ValueError(
                f"the checkpoint's config.json names the quantization method {METHOD!r}, which no file has: it is what "
                "LowbitConfig is called while a dense checkpoint is loaded; lowbit's folders say compressed-tensors"
            )
        self._targets: dict[str, QuantLinear | Int8Linear] = {}

    def is_serializable(self) -> bool:
        """What is saved is an ordinary packed checkpoint."""
        return True

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element; dense weights that are only read take no room on the device a model is spread over."""
        read_only = param_name in self._op.slots and param.is_floating_point()
        return 0.0 if read_only else param.element_size()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether it is a dense tensor of layers that are going to be packed."""
        return param_name in self._op.slots

    def get_quantize_ops(self) -> PackOp:
        """What packs a tensor."""
        return self._op

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        config = self.quantization_config
        assert isinstance(config, LowbitConfig)
        if tp_size(model) > 1:
            raise ValueError(
                f"tp_size {tp_size(model)}: LowbitConfig quantizes whole weights, and tensor parallel loading reads "
                "parts of them; write a packed folder with `lowbit quantize` and load that"
            )
        self._started = time.perf_counter()
        self._loading = weakref.proxy(model)
        dense_bytes = _tensor_bytes(model)
        conv1d = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
        plan = plan_linearized(model, config.spec, config.ignore, in_blocks=True, allow_partial=config.allow_partial)
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        shared = [name for name in plan.targets if f"{name}.weight" in tied]
        if shared:
            raise ValueError(f"{shared[0]} shares its weight with another layer; leave it out with ignore")
        self.report = QuantReport(
            model.config.name_or_path or type(model).__name__, "rtn", config.spec, plan.coverage,
            skipped=list(plan.skipped), base_bytes=dense_bytes,
        )  # fmt: skip
        slots: dict[str, Slot] = {}
        for name in plan.targets:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            n, k, dtype = linear.out_features, linear.in_features, linear.weight.dtype
            packed = linear_class(config.spec)(
                k, n, config.spec, bias=linear.bias is not None, dtype=dtype, device="meta"
            )
            place(model, name, packed)
            leave_parent_alone(model, name)
            slots[f"{name}.weight"] = linear_slot(name, n, k, transposed=name in conv1d)
            self._targets[name] = packed
        self._shapes = shapes_of(model)
        reader = PlainReader(options.get("checkpoint_files"))
        merged = _merged_slots(model, reader, self._targets)
        for matrix in (matrix for slot in merged.values() for matrix in slot.matrices):
            slots.pop(matrix.name, None)
        slots |= merged
        scale_dtypes = {name: packed.weight_scale.dtype for name, packed in self._targets.items()}
        self._op = PackOp(slots, config.spec, scale_dtypes, reader)
        self._op.placeholders = {name for name in slots if _add_placeholder(model, name, slots[name])}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        del self._loading  # a model is copied with its quantizer, and a weak reference cannot be
        op = self._op
        if op.problems:
            raise ValueError(f"{'; '.join(op.problems[:3])}; {len(op.problems)} problems in all")
        missing = [name for name in self._targets if name not in op.records]
        if missing:
            raise ValueError(
                f"the checkpoint has no weight for {missing[:3]}, {len(missing)} layers in all; none is made "
                "up. lowbit.quantize reads checkpoints that keep these layers in another form"
            )
        check_shapes(model, self._shapes)
        assert isinstance(self.quantization_config, LowbitConfig)
        dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        stored = checkpoint_names(model, self._targets)
        section = quantization_config(
            dict.fromkeys(stored.values(), self.quantization_config.spec), ignore_names(model, dense)
        )
        self._finish_report(model)
        self.quantization_config = PackedConfig(PACKED_METHOD, section, {})
        model.config.quantization_config = self.quantization_config
        prepare(model)

    def _finish_report(self, model: PreTrainedModel) -> None:
        report, names = self.report, list(self._targets)
        report.layers = [self._op.records[name] for name in names]
        # Weights are tied by now, and were one by one when the report was begun.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shared = {
            name: source
            for name, source in model.all_tied_weights_keys.items()
            if name in parameters and parameters[name] is parameters.get(source)
        }
        report.base_bytes -= sum(parameters[name].nbytes for name in shared)
        report.skipped = [
            replace(weight, reason=f"the same weight as {shared[weight.name]}") if weight.name in shared else weight
            for weight in report.skipped
        ]
        report.packed_bytes = _tensor_bytes(model)
        bits = 8 * sum(p.nbytes for name in names for part, p in self._targets[name].named_parameters()
                       if part not in ("weight_shape", "bias"))  # fmt: skip
        report.linear_bits = bits / sum(n * k for n, k in (layer.shape for layer in report.layers))
        report.seconds["load and quantize"] = time.perf_counter() - self._started
        self._targets = {}
        logger.info(report.summary())


def _merged_slots(
    model: PreTrainedModel, reader: PlainReader, targets: Mapping[str, QuantLinear | Int8Linear]
) -> dict[str, Slot]:
    """Slots for merged experts, where the checkpoint's files hold them merged and all of their linears are targets."""
    slots: dict[str, Slot] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found = expert_slots(name, module)
            inside = {matrix.name.rpartition(".")[0] for slot in found.values() for matrix in slot.matrices}
            slots |= found if inside <= set(targets) else {}
    if not slots:
        return {}
    renamings = [entry for entry in separated(model, get_model_conversion_mapping(model))
                 if isinstance(entry, WeightRenaming)]  # fmt: skip
    stored = set()
    for key in reader.names():
        stored |= {key, rename_source_key(key, renamings, [], model.base_model_prefix, slots)[0]}
    return {name: slot for name, slot in slots.items() if name in stored}


def _add_placeholder(model: PreTrainedModel, name: str, slot: Slot) -> bool:
    """Give the checkpoint's key a parameter to belong to, which is never filled.

    Returns:
        whether there was none: Int8Linear has a ``weight`` of its own.
    """
    owner, _, part = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, Int8Linear):
        return False
    parameter = nn.Parameter(torch.empty(slot.shape, dtype=model.dtype, device="meta"), requires_grad=False)
    module._parameters[part] = parameter  # register_parameter() refuses a name that QuantLinear's stand-in has
    return True


def _tensor_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())

"""install: plain ``from_pretrained`` keeps compressed-tensors checkpoints packed.

transformers looks up the configuration class and the quantizer class of a ``quant_method`` in two tables. ``install``
puts ours into the rows of ``compressed-tensors``. They take the checkpoints lowbit reads, ``pack-quantized`` and
``int-quantized``; whatever else the method covers (fp8, nvfp4, sparse, ...) is handed to the classes that were there.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig as TheirConfig
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer as TheirQuantizer

from ..checkpoint import Checkpoint, read_checkpoint
from ..formats import parse_section
from ..pack_config import QUANT_METHOD
from .quantizer import PackedConfig, PackedQuantizer, in_memory_config, unknown_layers

__all__ = ["install", "uninstall"]

_before: tuple[Any, Any] | None = None
"""The two rows as install() found them; None while it is not in effect."""


def install() -> None:
    """From now on, in this process, transformers loads compressed-tensors checkpoints packed and runs lowbit's kernels.

    ``AutoModelForCausalLM.from_pretrained(path)``, pipelines and everything built on them are meant, with INT4 and INT8
    ``pack-quantized`` and with ``int-quantized`` checkpoints, asymmetric ones too. What lowbit does not read goes to
    transformers' own quantizer with a warning that says why; so does, on request and without one,
    ``quantization_config=CompressedTensorsConfig(dequantize=True)``. With PEFT installed, LoRA adapters can be put on
    packed layers. Models loaded earlier stay as they are. Calling it again changes nothing; :func:`uninstall` takes it
    back.

    Unlike :func:`lowbit.load`, ``from_pretrained`` does not compare the files with the hashes in ``lowbit.json``.
    """
    global _before
    if AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is not InstalledQuantizer:
        _before = AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD], AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = CompressedTensorsConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = InstalledQuantizer
    if importlib.util.find_spec("peft") is not None:
        from . import lora

        lora.install()


def uninstall() -> None:
    """Undo :func:`install`. Models that are loaded stay packed and keep working."""
    global _before
    if _before is not None and AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is InstalledQuantizer:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD], AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = _before
    _before = None
    if "peft" in sys.modules:
        from . import lora

        lora.uninstall()


class CompressedTensorsConfig(TheirConfig):
    """config.json's ``quantization_config`` as it stands there; made for checkpoints that lowbit reads.

    It has the name of the class it stands in for because transformers compares the names when a user passes one too.
    """

    def __init__(self, **section: Any) -> None:
        # Not super().__init__(), which needs the package compressed-tensors and completes the section with defaults.
        self.section = section
        self.quant_method = QUANT_METHOD
        self.dequantize = False
        self.use_optimized_inference = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """One of these where lowbit reads the checkpoint, else transformers' own."""
        try:
            parse_section(config_dict)
        except ValueError as error:
            _warn(str(error))
            return TheirConfig.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The section."""
        return copy.deepcopy(self.section)

    def to_diff_dict(self) -> dict[str, Any]:
        """The section."""
        return self.to_dict()

    def theirs(self) -> Any:
        """The same as transformers' own class, with the loading options that were set on this one."""
        config = TheirConfig.from_dict(self.to_dict())
        for name in self.get_loading_attributes():
            setattr(config, name, getattr(self, name))
        return config

    @property
    def asks_for_theirs(self) -> bool:
        """Whether a loading option is set that only transformers' own quantizer knows."""
        run_compressed = getattr(self, "run_compressed", True)  # the option's name until transformers 5.1x
        return bool(self.dequantize or self.use_optimized_inference or not run_compressed)


class InstalledQuantizer(PackedQuantizer):
    """A :class:`PackedQuantizer` that reads the checkpoint itself; an instance of transformers' where it should be."""

    def __new__(cls, quantization_config: Any, **options: Any) -> Any:
        """The quantizer for ``quantization_config``."""
        if not isinstance(quantization_config, CompressedTensorsConfig):
            return TheirQuantizer(quantization_config, **options)
        if quantization_config.asks_for_theirs:
            return TheirQuantizer(quantization_config.theirs(), **options)
        return super().__new__(cls)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        checkpoint_files: list[str] | None = options.get("checkpoint_files")
        reason = "it is given as a state dict, not as safetensors files"
        if checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            with torch.device("cpu"):  # transformers calls this with "meta" as the default device
                checkpoint = read_checkpoint(Path(checkpoint_files[0]).parent, verify_hashes=False)
            self.quantization_config = PackedConfig(
                **in_memory_config(checkpoint, _scale_dtype(checkpoint, model.dtype))
            )
            unknown = unknown_layers(model, self.quantization_config.linears)
            if not unknown:
                super()._process_model_before_weight_loading(model, **options)
                return
            self.quantization_config = CompressedTensorsConfig(**self.quantization_config.stored)
            reason = f"{type(model).__name__} has no nn.Linear for {unknown[:3]}, {len(unknown)} packed layers in all"
        self._hand_over(reason)
        self._process_model_before_weight_loading(model, **options)

    def _hand_over(self, reason: str) -> None:
        """Become transformers' own quantizer, which is what transformers holds this object for from now on."""
        _warn(reason)
        theirs: HfQuantizer = TheirQuantizer(self.quantization_config.theirs(), pre_quantized=self.pre_quantized)
        theirs.validate_environment()
        self.__class__ = type(theirs)
        self.__dict__ = theirs.__dict__


def _warn(reason: str) -> None:
    warnings.warn(
        f"lowbit leaves this compressed-tensors checkpoint to transformers, which may expand its weights: {reason}",
        stacklevel=3,
    )


def _scale_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the scales: the file's own (None) where the model is loaded in the dtype it is stored in."""
    stored = {info.dtype for info in checkpoint.dense.values() if info.dtype.is_floating_point}
    return None if dtype in stored else dtype

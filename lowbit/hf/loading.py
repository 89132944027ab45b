"""load and load_dense: a model and its tokenizer from a folder or a hub id, packed folders kept packed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging
from transformers.utils.import_utils import is_accelerate_available

from ..checkpoint import Checkpoint, quantization_section, read_checkpoint, read_config, read_tensor_infos
from ..linear import Int8Linear, QuantLinear
from .foreign import foreign_from_pretrained
from .quantizer import in_memory_config
from .source import auto_class, parse_device, parse_dtype, resolve

__all__ = ["TOKENIZER_FILES", "load", "load_dense"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def load(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model for inference; a packed folder stays packed.

    Args:
        path_or_id: a folder, or a Hugging Face model id. compressed-tensors ``pack-quantized``, GPTQ and AWQ folders,
            whoever wrote them, get a :class:`~lowbit.linear.QuantLinear` for every packed layer, ``int-quantized`` ones
            (W8A8) an :class:`~lowbit.linear.Int8Linear`; unquantized folders load dense.
        device: ``auto`` is CUDA when there is one, else the CPU.
        dtype: of embeddings, norms, scales and activations; ``auto`` is the checkpoint's.
        trust_remote_code: run Python code that comes with the model. Never taken from a configuration file.

    Returns:
        the model in eval mode on ``device``, and its tokenizer (None where the folder has none).

    Raises:
        FileNotFoundError: no such folder or model, or the folder has no config.json or weights.
        ValueError: device or dtype is not available, or the checkpoint is damaged, incomplete, of a format lowbit does
            not read, or does not fit the model its config.json describes. Raised before a module is built wherever the
            files alone show it.
    """
    target, compute = parse_device(device), parse_dtype(dtype)
    folder = resolve(path_or_id, trust_remote_code=trust_remote_code)
    if quantization_section(folder, read_config(folder)) is None:
        return _load_dense(folder, compute, target, trust_remote_code)
    checkpoint = read_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    config.quantization_config = in_memory_config(checkpoint, compute)
    with _quiet(warnings=True):
        model = _from_pretrained(folder, compute, target, trust_remote_code, checkpoint, config=config)
    _prepare(model)
    return model, _tokenizer(folder, trust_remote_code)


def load_dense(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load an unquantized causal language model, the input of quantization. Arguments as for :func:`load`.

    Raises:
        FileNotFoundError: no such folder or model, or the folder has no config.json or safetensors weights.
        ValueError: the model is quantized already (names its quant_method), weights are missing or damaged, or device
            or dtype is not available.
    """
    target, compute = parse_device(device), parse_dtype(dtype)
    folder = resolve(path_or_id, trust_remote_code=trust_remote_code)
    section = quantization_section(folder, read_config(folder))
    if section is not None:
        method = section.get("quant_method")
        raise ValueError(f"{folder} is quantized already (quant_method {method!r}); give the unquantized model")
    return _load_dense(folder, compute, target, trust_remote_code)


def _load_dense(folder: Path, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool) -> Loaded:
    read_tensor_infos(folder)  # a truncated shard is reported by its name, before anything is built
    with _quiet(warnings=False):
        model = _from_pretrained(folder, dtype, device, trust_remote_code)
    return model, _tokenizer(folder, trust_remote_code)


def _from_pretrained(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
    checkpoint: Checkpoint | None = None,
    **options: Any,
) -> PreTrainedModel:
    # Without accelerate transformers can only load to the CPU; the model is moved afterwards.
    if device.type == "cuda" and is_accelerate_available():
        options["device_map"] = {"": device}
    options["dtype"] = "auto" if dtype is None else dtype
    options["ignore_mismatched_sizes"] = True  # reported below, with names and shapes, instead of a bare RuntimeError
    if checkpoint is not None and not checkpoint.in_lowbit_layout:
        model, info = foreign_from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **options)
    else:
        config = options.get("config") or AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        model, info = auto_class(config).from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    unexpected: list[str] = []
    if checkpoint is not None:
        # AutoGPTQ wrote a bias of zeros for every layer, also for those that have none.
        unexpected = sorted(name for name in info["unexpected_keys"] if not _is_zero_bias(checkpoint, name))
    problems = {
        "weights missing from the folder": sorted(info["missing_keys"]),
        "weights of another shape (found, needed)": sorted(info["mismatched_keys"]),
        "weights the model has no place for": unexpected,
    }
    for what, names in problems.items():
        if names:
            raise ValueError(f"{folder} does not fit {type(model).__name__}: {what}: {names[:5]}, {len(names)} in all")
    moved: PreTrainedModel = model.to(device)
    return moved


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    layer, _, part = name.rpartition(".")
    return part == "bias" and layer in checkpoint.linears and not bool(checkpoint.tensor(name).any())


def _prepare(model: PreTrainedModel) -> None:
    """Make the loaded QuantLinears ready to run."""
    for name, module in model.named_modules():
        if not isinstance(module, (QuantLinear, Int8Linear)):
            continue
        scales = module.weight_scale
        # They were finite and not zero in the file, but may be either in a dtype of a smaller range.
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise ValueError(f"{name}: its scales do not fit into {scales.dtype}; load it with dtype auto or float32")
        module.requires_grad_(False)  # transformers makes every floating point parameter it loads trainable
        module.repack()


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


@contextmanager
def _quiet(*, warnings: bool) -> Iterator[None]:
    """No progress bar over the weights and, for packed folders, no load report: its content is checked and raised.

    transformers' settings are restored, whatever happens.
    """
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    if bars:
        hf_logging.disable_progress_bar()
    if warnings:
        hf_logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()

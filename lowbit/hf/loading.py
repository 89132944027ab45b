"""load and load_dense: a model and its tokenizer from a folder or a hub id, packed folders kept packed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging
from transformers.utils.import_utils import is_accelerate_available

from ..checkpoint import Checkpoint, quantization_section, read_checkpoint, read_config, read_tensor_infos
from ..dtypes import parse_dtype
from ..modes import own_modes
from .foreign import foreign_from_pretrained
from .quantizer import in_memory_config, prepare
from .source import auto_class, parse_device, resolve

__all__ = ["TOKENIZER_FILES", "load", "load_dense"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip

_ALONE = threading.RLock()
"""transformers changes its own functions and its verbosity while it loads a model: two at once leave them changed."""

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


@own_modes()
def load(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    distributed_config: Any = None,
) -> Loaded:
    """Load a causal language model for inference; a packed folder stays packed.

    Args:
        path_or_id: a folder, or a Hugging Face model id. compressed-tensors ``pack-quantized``, GPTQ and AWQ folders,
            whoever wrote them, get a :class:`~lowbit.linear.QuantLinear` for every packed layer, ``int-quantized`` ones
            (W8A8) an :class:`~lowbit.linear.Int8Linear`; unquantized folders load dense.
        device: ``auto`` is CUDA when there is one, else the CPU.
        dtype: of embeddings, norms, scales and activations; ``auto`` is the one config.json names,
            but for scales their own.
        trust_remote_code: run Python code that comes with the model. Never taken from a configuration file.
        device_map: spread the model over devices with accelerate instead: ``"auto"``, or a dict from module names to
            devices, ``"cpu"`` and ``"disk"`` among them. As in transformers; with ``device`` auto.
        offload_folder: where transformers puts what does not lie in the checkpoint as it is needed, for ``"disk"``.
        distributed_config: transformers' ``DistributedConfig(tp_size=..., tp_plan="auto")``, under ``torchrun`` with
            that many processes: each loads its part of every layer, onto a GPU of its own where there are any.
            compressed-tensors folders only, with ``device`` auto.

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
    shared = _shared(device, device_map, offload_folder, distributed_config)
    if quantization_section(folder, read_config(folder)) is None:
        return _load_dense(folder, compute, target, trust_remote_code, **shared)
    checkpoint = read_checkpoint(folder)
    if distributed_config is not None and not checkpoint.in_lowbit_layout:
        raise ValueError(
            f"{folder} is not in the layout of compressed-tensors, which several ranks can read parts of; "
            f"`lowbit convert {folder} OUT --to compressed-tensors` writes it so"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    in_place = (
        target.type == "cpu" or bool(shared) or is_accelerate_available()
    )  # else loaded on the CPU and moved, see below
    config.quantization_config = in_memory_config(checkpoint, compute, repack=in_place)
    with _quiet():
        model = _from_pretrained(folder, compute, target, trust_remote_code, checkpoint, config=config, **shared)
    if not in_place:
        prepare(model)
    return model, _tokenizer(folder, trust_remote_code)


def _shared(
    device: str | torch.device,
    device_map: str | dict[str, Any] | None,
    offload_folder: str | os.PathLike[str] | None,
    distributed_config: Any,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model that is not to lie on one device; none for one that is.

    Raises:
        ValueError: options that do not go together, or accelerate is missing.
    """
    if distributed_config is None and device_map is None:
        if offload_folder is not None:
            raise ValueError(f"offload_folder {os.fspath(offload_folder)!r} goes with a device_map, there is none")
        return {}
    if distributed_config is not None:
        if device_map is not None:
            raise ValueError("give a device_map or a distributed_config, not both: each says where everything goes")
        if str(device) != "auto":
            raise ValueError(
                f"with a distributed_config, which gives each rank its device, device must be auto: {device}"
            )
        return {"distributed_config": distributed_config}
    if str(device) != "auto":
        raise ValueError(f"with a device_map, which says where everything goes, device must be auto, got {device!s}")
    if not isinstance(device_map, (str, dict)):
        raise ValueError(
            f"device_map must be a name such as 'auto' or a dict of modules and devices, got {device_map!r}"
        )
    if not is_accelerate_available():
        raise ValueError("a device_map needs the package accelerate, which is not installed")
    return {"device_map": device_map, "offload_folder": offload_folder}


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


def _load_dense(
    folder: Path, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool, **options: Any
) -> Loaded:
    read_tensor_infos(folder)  # a truncated shard is reported by its name, before anything is built
    unplaced: list[str] = []
    with _quiet():
        model = _from_pretrained(folder, dtype, device, trust_remote_code, unplaced=unplaced, **options)
    if unplaced:  # such as the layers for multi-token prediction; transformers' own logger, for its verbosity to count
        shown = f"{unplaced[:5]}, {len(unplaced)} in all"
        logging.getLogger("transformers").warning(
            f"{folder}: {type(model).__name__} has no place for these weights: {shown}"
        )
    return model, _tokenizer(folder, trust_remote_code)


def _from_pretrained(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
    checkpoint: Checkpoint | None = None,
    unplaced: list[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """``unplaced`` takes the names of weights a dense model has no place for; for a packed one they are an error."""
    # Without accelerate transformers can only load to the CPU; the model is moved afterwards.
    shared = "distributed_config" in options or "device_map" in options  # then transformers chooses the device
    if device.type == "cuda" and is_accelerate_available() and not shared:
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
    if checkpoint is None:
        (unplaced if unplaced is not None else unexpected).extend(sorted(info["unexpected_keys"]))
    else:
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
    moved: PreTrainedModel = model if shared else model.to(device)
    return moved


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    layer, _, part = name.rpartition(".")
    return part == "bias" and layer in checkpoint.linears and not bool(checkpoint.tensor(name).any())


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar over the weights and no load report: its content is checked, and raised or said in a line.

    transformers' settings are restored, whatever happens; other threads wait to load theirs.
    """
    with _ALONE:
        verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
        if bars:
            hf_logging.disable_progress_bar()
        hf_logging.set_verbosity(max(verbosity, logging.ERROR))
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()

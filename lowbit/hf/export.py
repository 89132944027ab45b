"""What a packed folder takes over from its source: names, dense tensors, configuration, tokenizer files."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from ..checkpoint import read_tensor_infos
from ..companions import copy_companions
from ..dtypes import dtype_name
from .experts import revert_names
from .loading import TOKENIZER_FILES

__all__ = [
    "check_names",
    "checkpoint_names",
    "companion_files",
    "config_dict",
    "dense_tensors",
    "ignore_names",
    "rounding_notes",
]

_PACKED_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


def checkpoint_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Module name -> name in the checkpoint, for the linears ``names``.

    transformers 5 renames some models' weights while loading; files keep the original names. The mapping is the one
    ``save_pretrained`` uses, applied to ``<name>.weight_packed``, so a packed model saved again has the same names.
    """
    names = list(names)
    markers = {name: torch.empty(0) for name in names}
    reverted = revert_names(model, {f"{name}.weight_packed": marker for name, marker in markers.items()})
    found = {id(tensor): key.removesuffix(".weight_packed") for key, tensor in reverted.items()}
    return {name: found[id(marker)] for name, marker in markers.items()}


def ignore_names(model: PreTrainedModel, dense_linears: Iterable[str]) -> list[str]:
    """``quantization_config.ignore`` for the linears left dense: their module names, and where they differ the names in
    the checkpoint too. transformers matches the former, other engines the latter.

    With them goes what is no ``nn.Linear`` here but one in other engines (vLLM 0.32, ``qwen3_moe.py``): routers, that
    is modules with a two-dimensional weight of their own, and experts that are still merged, as a pattern per layer.
    """
    routers = [name for name, module in model.named_modules() if _is_linear_elsewhere(module)]
    names = checkpoint_names(model, [*dense_linears, *routers])
    return list(dict.fromkeys([*names, *names.values(), *_merged_experts(model)]))


def _is_linear_elsewhere(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    return weight.ndim == 2 and weight.is_floating_point()


def _merged_experts(model: PreTrainedModel) -> list[str]:
    """``re:`` patterns for the linears that other engines make of the 3-D weights of dense experts."""
    merged = {
        name: torch.empty_like(parameter, device="meta")
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] in ("gate_up_proj", "up_proj", "down_proj")
    }
    of_one = (re.match(r"(.*\.experts)\.", name) for name in revert_names(model, merged))
    return list(dict.fromkeys(f"re:{re.escape(found[1])}\\..*" for found in of_one if found))


def dense_tensors(model: PreTrainedModel, exclude: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint that is not a quantized linear's weight, under its name in the original checkpoint.

    Biases of quantized linears are included. Of tied weights the one is yielded that ``save_pretrained`` keeps; buffers
    transformers does not save are left out.

    Args:
        model: dense, or with some linears replaced by QuantLinears.
        exclude: module names of the quantized linears.

    Yields:
        (name, tensor) as the model holds it: not copied, on its own device.

    Raises:
        ValueError: ``exclude`` names a module that has no weight.
    """
    yield from revert_names(model, _dense_state(model, exclude)).items()


def check_names(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Ask for every name of the folder to come, before there is anything to lose.

    Args:
        model: as it will be calibrated, its experts separated.
        targets: module names of the linears to be quantized.

    Raises:
        ValueError: transformers cannot say how the architecture's files name its tensors.
    """
    targets = list(targets)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in targets]
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in _dense_state(model, targets).items()}
    try:
        checkpoint_names(model, targets)
        ignore_names(model, dense)
        revert_names(model, state)
    except Exception as error:  # whatever a conversion makes of a tensor that it does not expect
        raise ValueError(
            f"transformers {transformers_version} cannot say how files of {type(model).__name__} name its tensors: "
            f"{type(error).__name__}: {error}"
        ) from error


def _dense_state(model: PreTrainedModel, exclude: Iterable[str]) -> dict[str, Tensor]:
    """What is stored beside the linears ``exclude``, under the model's names."""
    state = dict(model.state_dict())
    for name in exclude:
        parts = [f"{name}.{part}" for part in _PACKED_PARTS if f"{name}.{part}" in state]
        if not parts:
            raise ValueError(f"cannot exclude {name}: {type(model).__name__} has no weight of that name")
        for part in parts:
            del state[part]
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and _same_memory(state[target], state[source]):
            del state[target]
    return state


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.device == b.device


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """config.json as ``save_pretrained`` would write it, without ``quantization_config``, which the caller adds."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    fields.pop("quantization_config", None)
    fields.pop("transformers_weights", None)
    return fields


def companion_files(
    source: str | os.PathLike[str] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Put tokenizer, generation config and chat templates into ``out_dir``.

    Files of the source folder are copied byte for byte; with Python code of the model's, the tokenizer's or the
    processor's own (``auto_map``) that too. What the source does not have is written from ``tokenizer`` and ``model``.

    Args:
        source: the folder the model was loaded from, or None.
        tokenizer: opened from ``source``; None where the model has none.
        trust_remote_code: whether ``tokenizer`` was opened with it.

    Returns:
        names of the files now in place.

    Raises:
        ValueError: the tokenizer cannot be opened with them.
    """
    out = Path(out_dir)
    if source is not None:
        vocabulary = tuple(tokenizer.vocab_files_names.values()) if tokenizer is not None else ()
        copy_companions(Path(source), out, code=_has_code(Path(source), model), also=vocabulary)
    if tokenizer is not None and not any((out / name).is_file() for name in TOKENIZER_FILES):
        tokenizer.save_pretrained(out)
    if not (out / "generation_config.json").is_file() and model.can_generate():
        model.generation_config.save_pretrained(out)
    if tokenizer is not None:
        _check_tokenizer(out, model, trust_remote_code)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def _has_code(source: Path, model: PreTrainedModel) -> bool:
    """Whether the model, its tokenizer or a processor, whose entry may be nested, names classes of its own."""
    described = source.glob("*_config.json")
    return bool(getattr(model.config, "auto_map", None)) or any(b'"auto_map"' in p.read_bytes() for p in described)


def _check_tokenizer(folder: Path, model: PreTrainedModel, trust_remote_code: bool) -> None:
    """Open the tokenizer of a folder that will get the configuration of ``model``, as whoever reads it will."""
    try:
        AutoTokenizer.from_pretrained(
            folder, config=model.config, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever the tokenizer's class makes of a file that is not there
        names = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"the model's tokenizer cannot be opened with the files that go into the output, {names}: "
            f"{type(error).__name__}: {error}"
        ) from error


def rounding_notes(model: PreTrainedModel, folder: Path) -> list[str]:
    """What reading a model rounded: tensors whose dtype in the folder's files holds more than the model's.

    transformers gives every tensor the one dtype config.json names, some that its classes list excepted.
    """
    infos = read_tensor_infos(folder)
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    rounded: dict[tuple[str, str], list[str]] = {}
    for name, tensor in revert_names(model, state).items():
        info = infos.get(name) or infos.get(name.removeprefix(f"{model.base_model_prefix}."))
        if info is not None and _loses(info.dtype, tensor.dtype):
            rounded.setdefault((dtype_name(info.dtype), dtype_name(tensor.dtype)), []).append(name)
    return [
        f"{len(names)} of {len(infos)} tensors are {stored} in the source's files and were rounded to {loaded}, the "
        f"model's dtype; --dtype float32 rounds none: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for (stored, loaded), names in rounded.items()
    ]


def _loses(stored: torch.dtype, loaded: torch.dtype) -> bool:
    if not (stored.is_floating_point and loaded.is_floating_point):
        return False
    fine, coarse = torch.finfo(stored), torch.finfo(loaded)
    return fine.eps < coarse.eps or fine.max > coarse.max

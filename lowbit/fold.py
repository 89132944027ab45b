"""Moving a scale from the linears that read a channel into the norm or linear that produces it.

In exact arithmetic a fold changes no output. In floating point the producer's weight is rounded once more: a norm
weight kept in bfloat16 moves by up to 2^-8 relative, which is small beside 4-bit rounding but not beside 8-bit. Fold
float32 copies where that matters, and store what was folded, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .mappings import Fold
from .walk import BlockInputs, first_output, to_device

__all__ = ["apply_fold", "exact_folds", "first_call", "in_float32"]

# A wrong fold changes a branch by about its own size, float32 rounding by about 1e-6 of it.
_EXACT = 1e-3


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Multiply the columns of all readers of ``fold.smooth`` by ``scales`` and divide it by them, in place.

    Computed in float32 (float64 for float64 parameters), stored in each parameter's own dtype.

    Args:
        block: the decoder block ``fold`` was resolved on.
        scales: ``(K,)`` finite and positive; equal on columns that share a channel.

    Raises:
        ValueError: scales of a wrong shape, not finite and positive, or different on one channel. Nothing is changed.
    """
    balance = [_linear(block, name) for name in fold.balance]
    k = balance[0].in_features
    if tuple(scales.shape) != (k,) or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"scales for {fold.balance} must be ({k},), finite and positive, got {tuple(scales.shape)}")
    per_channel = _per_channel(fold, scales)
    smooth = block.get_submodule(fold.smooth)
    for name, parameter in smooth.named_parameters(recurse=False):
        _divide(parameter, fold, per_channel, offset=fold.norm_offset if name == "weight" else 0)
    others = [block.get_parameter(f"{name}.weight") for name in fold.others]
    for weight in (*(linear.weight for linear in balance), *others):
        work = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(work) * scales.to(device=weight.device, dtype=work))


@torch.no_grad()
def exact_folds(
    block: nn.Module, folds: Sequence[Fold], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Fold], list[Fold]]:
    """Test folds by applying random scales of powers of two on one real input and undoing them.

    All are applied at once, and only where that changes something are the halves, down to single folds. The block is
    left bit for bit as it was. A fold of an expert that no token of the input is routed to cannot be seen to be wrong.

    Args:
        block: a float32 or float64 decoder block.
        args, kwargs: arguments of a real call of the block, the hidden states first (:func:`first_call`).

    Returns:
        the folds that change nothing, and those that do.

    Raises:
        ValueError: the block's weights are in a dtype too coarse to tell rounding from a wrong fold.
    """
    if not folds:
        return [], []
    names = dict.fromkeys(name for fold in folds for name in (fold.smooth, *fold.balance, *fold.others))
    saved = {p: p.clone() for name in names for p in block.get_submodule(name).parameters(recurse=False)}
    coarse = sorted({str(p.dtype) for p in saved if p.dtype not in (torch.float32, torch.float64)})
    if coarse:
        raise ValueError(f"folds are tested in float32 or float64, this block holds {coarse}")
    expected = first_output(block(*args, **kwargs))
    hidden = args[0] if args else kwargs["hidden_states"]
    allowed = _EXACT * (expected - hidden).double().norm()

    def changes_nothing(tried: Sequence[int]) -> bool:
        """Whether the block's output stays when all of these folds are applied at once; undoes them."""
        try:
            for i in tried:
                apply_fold(block, folds[i], _powers_of_two(block, folds[i], seed=i))
            change = (first_output(block(*args, **kwargs)) - expected).double().norm()
        finally:
            for parameter, value in saved.items():
                parameter.copy_(value)
        return bool(change <= allowed)

    def wrong(tried: Sequence[int]) -> list[int]:
        """Those of the folds that change the output, by bisection."""
        if not tried or changes_nothing(tried):
            return []
        middle = len(tried) // 2
        return list(tried) if not middle else wrong(tried[:middle]) + wrong(tried[middle:])

    bad = set(wrong(range(len(folds))))
    return [fold for i, fold in enumerate(folds) if i not in bad], [folds[i] for i in sorted(bad)]


def first_call(
    inputs: BlockInputs, index: int, device: torch.device, sequences: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of block ``index`` with its first batch, in float32 on ``device``.

    Args:
        sequences: of the batch only the first so many, in every argument that leads with the batch's number of them.
    """
    hidden, rest = inputs.hidden[0], to_device(inputs.arguments[index][0], device)
    batch = hidden.shape[0]

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = value[:sequences] if value.ndim > 1 and value.shape[0] == batch else value
        return part.float() if part.is_floating_point() else part

    args, kwargs = tree_map(cut, rest)
    first: Tensor = to_device(hidden[:sequences], device).float()
    return (args, {**kwargs, "hidden_states": first}) if inputs.keyword else ((first, *args), kwargs)


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Parameters and buffers in float32 while open; afterwards each is rounded once to the dtype it had."""
    dtypes = {t: t.dtype for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()}
    for tensor in dtypes:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} must be an nn.Linear to take a scale, got {type(module).__name__}")
    return module


def _per_channel(fold: Fold, scales: Tensor) -> Tensor:
    """``(C,)``: one scale per channel of the smooth module."""
    ids = fold.channel_ids()
    if ids is None:
        return scales
    ids = ids.to(scales.device)
    out = torch.ones(int(ids.max()) + 1, dtype=scales.dtype, device=scales.device)
    out[ids] = scales
    if not torch.equal(out[ids], scales):
        raise ValueError(f"scales for {fold.balance} must be equal on columns that read one channel of {fold.smooth}")
    return out


def _divide(parameter: Tensor, fold: Fold, scales: Tensor, offset: int) -> None:
    work = torch.promote_types(parameter.dtype, torch.float32)
    divisor = scales.to(device=parameter.device, dtype=work)
    if fold.rows is None:
        parameter.copy_((parameter.to(work) + offset) / divisor - offset)
        return
    rows = torch.tensor(fold.rows, device=parameter.device)
    part = parameter[rows].to(work)
    parameter[rows] = (part / (divisor if part.ndim == 1 else divisor.unsqueeze(1))).to(parameter.dtype)


def _powers_of_two(block: nn.Module, fold: Fold, seed: int) -> Tensor:
    """Reproducible scales in {1/2, 1, 2}: dividing and multiplying by them rounds nothing."""
    weight = _linear(block, fold.balance[0]).weight
    ids = fold.channel_ids()
    count = weight.shape[1] if ids is None else int(ids.max()) + 1
    draw = torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(seed))
    scales = torch.exp2(draw.to(weight.dtype)).to(weight.device)
    return scales if ids is None else scales[ids.to(weight.device)]

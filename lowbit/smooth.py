"""What a layer's inputs look like, before its weights are quantized: SmoothQuant's scales and static input scales.

SmoothQuant (Xiao et al., arXiv 2211.10438, section 4) moves outliers of the activations into the weights. Input channel
j of the linears that read one tensor is divided, and their columns j are multiplied, by

    s_j = max |X_j| ** alpha / max |W_j| ** (1 - alpha)

with the maxima taken over the calibration tokens and over all rows of these linears. The division goes into the norm or
linear before them, where mappings.py knows of one and fold.py proves on a real input that the block stays the same. The
paper folds into norms alone; a fold into the value or up projection costs nothing more where rows have scales of their
own, because a row divided by a number has the same codes, so these are done too.

A static scale is the one, of 0.3 to 1 times ``max |x| / 127``, whose rounded and clamped inputs are nearest to the
inputs: the least ``E (x - x_q * scale)^2`` over the calibration tokens. Linears that read the same tensor get the same.

Both are measured on the unquantized model, block by block, on the compute device: two passes more over the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .affine import QuantizedWeight
from .distributed import ALONE, Ranks
from .fold import apply_fold, exact_folds, first_call, in_float32
from .linear import Int8Linear, QuantLinear
from .mappings import NOT_QUANTIZED, Fold, reasons_without_fold, resolve
from .walk import Block, BlockInputs, call_block, linear_groups, linears

__all__ = ["UNREACHED", "InputRanges", "StaticScale", "measure_inputs", "smooth_scales"]

UNREACHED = "no calibration token reached it"
_TOP = 127
_SMALLEST_FACTOR, _FACTORS = 0.3, 15
_CHUNK = 2**20  # inputs whose candidates are compared at a time


@dataclass
class InputRanges:
    """What :func:`measure_inputs` found and did.

    Attributes:
        scales: full name of a linear -> its input scale ``(1,)`` in the weight's dtype; empty for dynamic activations.
        smoothed: full names of the linears whose inputs were smoothed.
        reasons: full names of those whose were not -> why not.
        alpha: migration strength; None where nothing was smoothed.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    smoothed: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    alpha: float | None = None

    def pack(self, name: str, qw: QuantizedWeight, bias: Tensor | None) -> QuantLinear | Int8Linear:
        """The module of one linear, with the input scale found for it where its activations are static."""
        if qw.spec.activations is None:
            return QuantLinear.from_quantized(qw, bias)
        return Int8Linear.from_quantized(qw, bias, input_scale=self.scales.get(name))

    def notes(self) -> list[str]:
        """What was done, for the report."""
        notes = []
        if self.scales:
            notes.append(f"{len(self.scales)} static input scales, of least squared error over the calibration tokens")
        if self.alpha is not None:
            notes.append(f"SmoothQuant with alpha {self.alpha:g} on the inputs of {len(self.smoothed)} weights")
            for why in dict.fromkeys(self.reasons.values()):
                names = [name for name, reason in self.reasons.items() if reason == why]
                notes.append(f"not smoothed: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})")
        return notes


def smooth_scales(maxima: Tensor, weights: Sequence[Tensor], alpha: float, channels: Tensor | None = None) -> Tensor:
    """``s (K,)`` of the formula above, in float32; 1 where a channel or its weights are all zero.

    Args:
        maxima: ``(K,)`` largest ``|x|`` of every input channel.
        weights: ``(N_i, K)`` of the linears that read this input.
        alpha: migration strength, 0 to 1: how much of the range goes into the weights.
        channels: ``(K,)`` int64 ids; columns of one id read one channel and get one scale, from their common maxima.
    """
    inputs = maxima.float()
    columns = torch.stack([w.detach().float().abs().amax(0) for w in weights]).amax(0)
    if channels is not None:
        ids = channels.to(inputs.device)
        inputs, columns = (torch.zeros_like(t).scatter_reduce_(0, ids, t, "amax")[ids] for t in (inputs, columns))
    scales = inputs.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((inputs > 0) & (columns > 0) & scales.isfinite() & (scales > 0), scales, 1.0)


class StaticScale:
    """The scale of least squared rounding error, over inputs that come batch by batch.

    Args:
        largest: the largest ``|x|`` there will be, 0 or more.
        dtype: the scale is stored in; candidates are rounded to it before they are compared.
    """

    def __init__(self, largest: float, dtype: torch.dtype) -> None:
        factors = torch.linspace(1.0, _SMALLEST_FACTOR, _FACTORS, dtype=torch.float64)
        candidates = (largest / _TOP * factors).to(dtype)
        usable = candidates.isfinite() & (candidates.float() >= torch.finfo(torch.float32).tiny)
        # All-zero inputs round to zero on any scale.
        self.candidates = candidates[usable] if bool(usable.any()) else torch.ones(1, dtype=dtype)
        self.losses = torch.zeros(len(self.candidates), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in inputs of any shape."""
        for part in x.detach().reshape(-1).split(_CHUNK):
            wide = part.float()
            for i, candidate in enumerate(self.candidates.float().tolist()):
                codes = (wide * (1 / candidate)).clamp_(-_TOP - 1, _TOP).round_()
                self.losses[i] += codes.mul_(candidate).sub_(wide).square_().sum(dtype=torch.float64).cpu()

    def best(self) -> Tensor:
        """``(1,)``; of equals the largest, which clips least."""
        return self.candidates[self.losses.argmin()].reshape(1).clone()


@torch.no_grad()
def measure_inputs(
    blocks: Sequence[Block],
    targets: Sequence[str],
    inputs: BlockInputs,
    device: torch.device,
    *,
    static: bool,
    alpha: float | None,
    model_type: str = "",
    ranks: Ranks = ALONE,
) -> InputRanges:
    """Smooth every block where ``alpha`` is given, and find static input scales where ``static``.

    Args:
        blocks: all decoder blocks, unquantized, in order; with ``alpha`` their weights change, their outputs do not.
        targets: full names of the linears that will be quantized; scales are folded only where all readers are.
        inputs: as caught by :func:`lowbit.walk.capture_block_inputs`; the hidden states are replaced block by block.
        device: where blocks are run; they end where they were.
        ranks: processes that each have a part of the inputs.

    Raises:
        ValueError: a target that no token reached has no static scale, or an input is NaN or infinite.
    """
    found = InputRanges(alpha=alpha)
    for index, block in enumerate(blocks):
        home = next(block.module.parameters()).device
        block.module.to(device)
        prefix = f"{block.name}."
        wanted = {name.removeprefix(prefix) for name in targets if name.startswith(prefix)}
        work = _Work(block, index, inputs, device, wanted, found, ranks)
        if alpha is not None:
            work.smooth(alpha, model_type)
        if static:
            work.static_scales()
        if index < len(blocks) - 1:
            for batch, hidden in enumerate(inputs.hidden):
                hidden.copy_(work.run(batch))
        block.module.to(home)
    return found


class _Work:
    """One block of :func:`measure_inputs`, on the compute device."""

    def __init__(
        self,
        block: Block,
        index: int,
        inputs: BlockInputs,
        device: torch.device,
        wanted: set[str],
        found: InputRanges,
        ranks: Ranks,
    ) -> None:
        self.block, self.index, self.inputs, self.device, self.found = block, index, inputs, device, found
        self.ranks = ranks
        self.modules = linears(block.module)
        groups = (tuple(n for n in g.names if n in wanted) for g in linear_groups(block, inputs, index, device, wanted))
        self.groups = [group for group in groups if group]
        self.wanted = wanted

    def run(self, batch: int) -> Tensor:
        rest = self.inputs.arguments[self.index][batch]
        return call_block(self.block.module, self.inputs.hidden[batch], rest, self.inputs.keyword, self.device)

    def full(self, name: str) -> str:
        return f"{self.block.name}.{name}"

    def _observe(self, take: Any) -> None:
        """Run all batches; ``take(first name of the group, inputs)`` for each group and batch."""
        hooks = [
            self.modules[group[0]].register_forward_pre_hook(lambda _, args, name=group[0]: take(name, args[0]))
            for group in self.groups
        ]
        try:
            for batch in range(len(self.inputs.hidden)):
                self.run(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def maxima(self) -> dict[str, Tensor]:
        """Largest ``|x|`` per input channel, ``(K,)`` float32, for every linear that a token reached."""
        largest: dict[str, Tensor] = {}

        def take(name: str, x: Tensor) -> None:
            if not x.numel():  # an expert that nothing in this batch is routed to
                return
            found = x.detach().reshape(-1, x.shape[-1]).abs().amax(0).float()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        self._observe(take)
        for name, *_ in self.groups:
            unreached = torch.full((self.modules[name].in_features,), -1.0, device=self.device)
            values = self.ranks.max_(largest.get(name, unreached))
            if bool((values >= 0).any()):
                largest[name] = values
        for name, values in largest.items():
            if not bool(values.isfinite().all()):
                raise ValueError(f"{self.full(name)}: the calibration inputs contain NaN or infinite values")
        return {name: largest[group[0]] for group in self.groups for name in group if group[0] in largest}

    def smooth(self, alpha: float, model_type: str) -> None:
        """Find the scales of every fold of the block and move them, in place; note what was smoothed and what not.

        Readers of one tensor share its scales. The experts of a layer are such readers: their maxima are taken over the
        tokens of all of them.

        Args:
            alpha: migration strength, 0 to 1.
            model_type: ``config.model_type``, as :func:`lowbit.mappings.resolve` takes it.

        Raises:
            ValueError: an input is NaN or infinite.
        """
        block, maxima = self.block.module, self.maxima()
        reasons = reasons_without_fold(block, model_type)
        with in_float32(block):
            folds = []
            for fold in resolve(block, model_type):
                if self.wanted.issuperset(fold.balance) and any(name in maxima for name in fold.balance):
                    folds.append(fold)
                else:
                    why = NOT_QUANTIZED if not self.wanted.issuperset(fold.balance) else UNREACHED
                    reasons.update(dict.fromkeys(fold.balance, why))
            call = self.inputs, self.index, self.device
            good, bad = self.ranks.first(lambda: exact_folds(block, folds, *first_call(*call)))
            for fold in bad:
                why = f"moving a scale into {fold.smooth} changed the block's output"
                reasons.update(dict.fromkeys(fold.balance, why))
            for fold in good:
                found = torch.stack([maxima[name] for name in fold.balance if name in maxima]).amax(0)
                self._smooth_fold(fold, found, alpha)
        smoothed = {name for fold in good for name in fold.balance}
        for name in sorted(self.wanted):
            if name in smoothed:
                self.found.smoothed.append(self.full(name))
            else:
                self.found.reasons[self.full(name)] = reasons[name]

    def _smooth_fold(self, fold: Fold, maxima: Tensor, alpha: float) -> None:
        weights = [self.modules[name].weight for name in fold.balance]
        apply_fold(self.block.module, fold, smooth_scales(maxima, weights, alpha, fold.channel_ids()))

    def static_scales(self) -> None:
        """Find the static input scale of every linear of the block; linears that read one tensor get one.

        Raises:
            ValueError: no token reached a linear, so nothing is known of its inputs; or they are NaN or infinite.
        """
        maxima = self.maxima()
        missing = sorted(self.wanted - set(maxima))
        if missing:
            raise ValueError(
                f"no calibration token reached {self.full(missing[0])} ({len(missing)} such in this block), so it has "
                "no static input scale; use more samples or dynamic activations, or leave it dense with ignore"
            )
        dtypes = {group[0]: self.modules[group[0]].weight.dtype for group in self.groups}
        searches = {name: StaticScale(float(maxima[name].max()), dtype) for name, dtype in dtypes.items()}
        self._observe(lambda name, x: searches[name].add(x))
        for name in searches:
            self.ranks.sum_(searches[name].losses)
        for group in self.groups:
            self.found.scales.update({self.full(name): searches[group[0]].best() for name in group})

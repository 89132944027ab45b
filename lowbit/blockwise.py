"""Calibrate a model one decoder block at a time: the walk's inputs into the calibrators, their weights back.

Per block, in order: move it to the compute device, fold AWQ's scales if asked for, then group by group accumulate the
inputs' Hessian over all batches and quantize, so that later groups and later blocks see what the earlier ones became.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .affine import QuantizedWeight, dequantize
from .calib.awq import awq_quantize
from .calib.gptq import factorize, gptq_quantize
from .calib.hessian import CrossMoment, Hessian, output_loss
from .calib.rtn import rtn_quantize
from .distributed import ALONE, Ranks
from .fold import exact_folds, first_call, in_float32
from .folding import Folding
from .heap import GrowthLimit, return_free_memory
from .mappings import Fold, reasons_without_fold, resolve
from .onednn import has_fast_bfloat16_products
from .report import LayerRecord
from .routed import BLENDED, RoutedInputs
from .spec import QuantSpec
from .walk import Block, BlockInputs, BlockRun, LinearGroup, linear_groups, linears

__all__ = ["METHODS", "Calibration", "own_batches", "product_dtype", "quantize_blocks", "quantize_dense"]

METHODS = ("gptq", "awq", "rtn", "awq+gptq")

_HEAP_SLACK, _HEAP_MARGIN = 40 << 20, 16 << 20  # bytes; eval/results/notes.md has others
_FEWEST_ROUNDED = 32  # batches whose products may be rounded to bfloat16
_MEMORY_SHARE = 0.3  # of the free memory that half-done batches may hold before blocks are run anew per stage


@dataclass(frozen=True)
class Calibration:
    """How blocks are quantized.

    Attributes:
        spec, method: the grid, and one of :data:`METHODS`.
        device: where blocks are run and weights quantized, one block at a time.
        model_type: ``config.model_type``, for the few AWQ tables that need it.
        correct: aim at the original model's outputs instead of the original weights' (gptq only).
        ranks: processes that each have a part of the inputs.
    """

    spec: QuantSpec
    method: str
    device: torch.device
    model_type: str = ""
    correct: bool = True
    ranks: Ranks = ALONE

    @property
    def corrects(self) -> bool:
        """Whether a share of the text also runs through the original model."""
        return self.correct and "gptq" in self.method


class Store(Protocol):
    """Where finished weights go."""

    def __call__(self, name: str, linear: nn.Linear, qw: QuantizedWeight) -> None:
        """A weight is done; its block may still run ``linear``, which already holds the dequantized weight."""

    def flush(self, device: torch.device) -> None:
        """The block is done: everything stored so far may replace its linear, on ``device``."""


def quantize_dense(
    model: nn.Module, targets: Sequence[str], spec: QuantSpec, device: torch.device, store: Store
) -> Iterator[LayerRecord]:
    """Round every target to the nearest code without any data; yields a record per weight."""
    modules = linears(model)
    for name in targets:
        linear = modules[name]
        weight = linear.weight.detach().to(device)
        yield _rounded(name, linear, weight, spec, store, ())
        store.flush(linear.weight.device)


def _rounded(
    name: str, linear: nn.Linear, weight: Tensor, spec: QuantSpec, store: Store, notes: tuple[str, ...]
) -> LayerRecord:
    qw = rtn_quantize(weight, spec, scale_dtype=linear.weight.dtype)
    weight = weight.float()
    loss = float((dequantize(qw) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
    store(name, linear, qw)
    n, k = weight.shape
    return LayerRecord(name, (n, k), spec, "rtn", loss, loss, "weights", None, notes)


@torch.no_grad()
def quantize_blocks(
    blocks: Sequence[Block], targets: Sequence[str], inputs: BlockInputs, how: Calibration, store: Store
) -> Iterator[LayerRecord]:
    """Quantize the target linears of every block in turn; yields a record per weight, in execution order.

    Args:
        blocks: all decoder blocks, in order.
        targets: full module names of the linears to quantize.
        inputs: as caught by :func:`lowbit.walk.capture_block_inputs`; hidden states are replaced block by block.
        how: grid, method, device.
        store: called with each full name, its linear (already holding the dequantized weight) and the codes.
    """
    reference_batches = _reference_batches(len(inputs.hidden), how) if how.corrects else range(0)
    own = [h.clone() if i in reference_batches else h.new_empty(0) for i, h in enumerate(inputs.hidden)]
    reference = BlockInputs(own, inputs.arguments, inputs.keyword)
    return_free_memory()  # tokenizing left some
    heap = GrowthLimit(_HEAP_SLACK, _HEAP_MARGIN)
    for index, block in enumerate(blocks):
        prefix = f"{block.name}."
        wanted = [name.removeprefix(prefix) for name in targets if name.startswith(prefix)]
        home = next(block.module.parameters()).device
        block.module.to(how.device)
        work = _BlockWork(block, index, inputs, reference, reference_batches, wanted, how, store, heap)
        yield from work.run()
        store.flush(home)
        block.module.to(home)


class _BlockWork:
    """One block, from its original weights to its quantized ones."""

    def __init__(
        self,
        block: Block,
        index: int,
        inputs: BlockInputs,
        reference: BlockInputs,
        reference_batches: range,
        wanted: Sequence[str],
        how: Calibration,
        store: Store,
        heap: GrowthLimit,
    ) -> None:
        self.block, self.index, self.inputs, self.wanted, self.how = block, index, inputs, wanted, how
        self.reference, self.reference_batches = reference, reference_batches
        self.last = index == len(inputs.arguments) - 1
        self.store, self.heap = store, heap
        self.modules = linears(block.module)
        found = linear_groups(block, inputs, index, how.device, wanted)
        how.ranks.agree({f"the order of the linears in {block.name}": str([group.names for group in found])})
        kept = [LinearGroup(tuple(n for n in g.names if n in set(wanted)), g.unread) for g in found]
        self.groups = [group for group in kept if group.names]
        self.notes: dict[str, tuple[str, ...]] = {}
        self.products = product_dtype(len(inputs.hidden), how.device, how.ranks)
        self.together = _together(sum(how.ranks.collect(len(inputs.hidden))), how.device)
        self.routed = RoutedInputs(block.module, how.device, how.ranks, self.products)

    def run(self) -> Iterator[LayerRecord]:
        """Quantize the wanted linears, in the order in which the block calls them, those it does not call last.

        After it the hidden states are the quantized block's, except behind the last block.
        """
        reached = {name for group in self.groups for name in group.names}
        if "awq" in self.how.method:
            self._fold_scales()
        original = copy.deepcopy(self.block.module) if self.reference_batches else None
        keep = self._fits()
        stops = [group.names[0] for group in self.groups]
        unread = [group.unread for group in self.groups]
        device = self.how.device
        run = BlockRun(self.block.module, self.inputs, self.index, stops, device, keep=keep, unread=unread)
        ref = BlockRun(
            original if original is not None else self.block.module,
            self.reference,
            self.index,
            stops if original is not None else (),
            device,
            keep=keep,
            batches=self.reference_batches,
            unread=unread,
        )
        with run, ref, self.routed:
            for stage, group in enumerate(self.groups):
                try:
                    total, drift = self._moments(stage, run, ref)
                    hessian, starved = self.routed.resolve(group.names[0], total)
                except ValueError as error:
                    raise ValueError(f"{self.block.name}.{group.names[0]}: {error}") from error
                if starved is not None:
                    self.notes.update({name: (*self.notes.get(name, ()), starved) for name in group.names})
                if hessian is None:
                    reached.difference_update(group.names)
                elif "gptq" in self.how.method and (starved is None or BLENDED in starved):
                    yield from self._gptq(group.names, hessian, drift)
                else:
                    for name in group.names:
                        yield self._round(name, hessian, "awq" if self.how.method == "awq" else "rtn")
            for name in self.wanted:
                if name not in reached:
                    yield self._unreached(name)
            if not self.last:  # nobody asks for the last block's outputs
                run.finish(self.heap.check)
                ref.finish(self.heap.check)

    def _moments(self, stage: int, run: BlockRun, ref: BlockRun | None) -> tuple[Hessian, CrossMoment | None]:
        """H of a stage's inputs over all tokens, and their drift from the original model over the reference's.

        An expert has no drift: the original model may route other tokens to it.
        """
        name = self.groups[stage].names[0]
        k = self.modules[name].in_features
        total = Hessian(k, self.how.device, self.products)
        ref = None if self.routed.is_expert(name) else ref
        drift = CrossMoment(k, self.how.device, self.products) if ref is not None and self.how.corrects else None
        waiting: list[Tensor] = []
        for batch in run.batches:
            x = run.inputs(stage, batch)
            if ref is None or drift is None or batch not in ref.batches:
                waiting.append(x)
            else:
                drift.add(ref.inputs(stage, batch), x)
                if stage == len(self.groups) - 1:
                    ref.finish_batch(batch)  # the original does not wait for this stage's weights
            if (batch + 1) % self.together == 0 or batch == run.batches[-1]:
                total.add(*waiting)
                waiting.clear()
            self.heap.check()
        self.how.ranks.add_up(total, drift)
        if drift is not None:
            total.merge_(drift.hessian)
        return total, drift

    def _gptq(self, names: Sequence[str], hessian: Tensor, drift: CrossMoment | None) -> Iterator[LayerRecord]:
        """All linears of a group at once: they share the Hessian, and rows do not see each other."""
        dtype = self.modules[names[0]].weight.dtype
        weight = torch.cat([self.modules[name].weight.detach().float() for name in names])
        count, ranks = len(weight), self.how.ranks
        # Of all rows on every rank: how it is computed depends on how many there are, and ranks must get the same bits.
        target = weight if drift is None else drift.target(weight)
        weight, target = weight[ranks.rows(count)], target[ranks.rows(count)]
        factor = factorize(hessian)
        found = gptq_quantize(weight, hessian, self.how.spec, factor=factor, target=target, scale_dtype=dtype)
        energy = output_loss(target, torch.zeros_like(target), hessian)
        found, energy = ranks.whole((found, energy), count)
        rows = [self.modules[name].out_features for name in names]
        for name, result, own in zip(names, found.split(rows), energy.split(rows), strict=True):
            method = "rtn" if result.method == "rtn" else self.how.method
            losses = float(result.loss.sum()), float(result.rtn_loss.sum())
            yield self._record(name, result.weight, method, losses, float(own.sum()), result.damp_frac, result.notes)

    def _round(self, name: str, hessian: Tensor, method: str) -> LayerRecord:
        """Round to nearest on the inputs' grid, or on AWQ's clipped one."""
        linear, spec = self.modules[name], self.how.spec
        dtype, count, ranks = linear.weight.dtype, linear.out_features, self.how.ranks
        weight = linear.weight.detach().float()[ranks.rows(count)]
        rtn = rtn_quantize(weight, spec, hessian.diagonal(), scale_dtype=dtype)
        found = awq_quantize(weight, hessian, spec, scale_dtype=dtype) if method == "awq" else rtn
        losses = tuple(
            output_loss(candidate, weight, hessian)
            for candidate in (dequantize(found), dequantize(rtn), torch.zeros_like(weight))
        )
        found, losses = ranks.whole((found, losses), count)
        loss, rtn_loss, energy = (float(rows.sum()) for rows in losses)
        return self._record(name, found, method, (loss, rtn_loss), energy)

    def _record(
        self,
        name: str,
        qw: QuantizedWeight,
        method: str,
        losses: tuple[float, float],
        energy: float,
        damp_frac: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> LayerRecord:
        """Put the quantized weight in place and write down how it went."""
        linear, full_name = self.modules[name], f"{self.block.name}.{name}"
        linear.weight.data = dequantize(qw).to(linear.weight.dtype)
        self.store(full_name, linear, qw)
        loss, rtn_loss = (value / max(energy, 1e-30) for value in losses)
        n, k = qw.codes.shape
        notes = self.notes.get(name, ()) + notes
        return LayerRecord(full_name, (n, k), self.how.spec, method, loss, rtn_loss, "outputs", damp_frac, notes)

    def _unreached(self, name: str) -> LayerRecord:
        linear = self.modules[name]
        note = "no calibration token reached it: rounded to nearest"
        full_name = f"{self.block.name}.{name}"
        return _rounded(full_name, linear, linear.weight.detach(), self.how.spec, self.store, (note,))

    def _fold_scales(self) -> None:
        """AWQ's scale search on the unquantized block, the scales moved into the norm or linear before."""
        block, how = self.block.module, self.how
        stops = [group.names[0] for group in self.groups]
        reasons = reasons_without_fold(block, how.model_type)
        with in_float32(block):
            folds = resolve(block, how.model_type)
            good, bad = how.ranks.first(lambda: self._exact_folds(folds))
        for fold in bad:
            reasons.update(dict.fromkeys(fold.balance, f"moving a scale into {fold.smooth} changed the block's output"))
        reached = {name for group in self.groups for name in group.names}
        folding = Folding(self.modules, good, reached, how.spec, how.ranks, reasons)
        routed = RoutedInputs(block, how.device, how.ranks, self.products)
        with BlockRun(block, self.inputs, self.index, stops, how.device, keep=self._fits()) as run, routed:
            for stage, group in enumerate(self.groups):
                if folding.wants(group.names):
                    folding.take(group.names, self._moments(stage, run, None)[0], routed)
        with in_float32(block):  # the block's own dtype rounds once, at the end
            folding.apply(block)
        what = "clip search" if how.method == "awq" else "gptq"
        for name in self.wanted:
            if name in reasons:
                self.notes[name] = (f"{what} alone: {reasons[name]}",)

    def _exact_folds(self, folds: Sequence[Fold]) -> tuple[list[Fold], list[Fold]]:
        block, call = self.block.module, (self.inputs, self.index, self.how.device)
        try:
            return exact_folds(block, folds, *first_call(*call, sequences=1))
        except RuntimeError:
            # Not every argument can be cut: BLOOM's alibi has a row for each head of each sequence.
            return exact_folds(block, folds, *first_call(*call))

    def _fits(self) -> bool:
        """Whether all batches can stay halted inside the block at once."""
        tokens = sum(h.shape[0] * h.shape[1] for h in self.inputs.hidden)
        size = self.inputs.hidden[0].element_size()
        widths = 4.0 * self.inputs.hidden[0].shape[-1]
        widths += sum(self.modules[g.names[0]].in_features * self.routed.share(g.names[0]) for g in self.groups)
        streams = 1 + len(self.reference_batches) / len(self.inputs.hidden)
        sharers = self.how.ranks.here if self.how.device.type == "cpu" else 1
        return tokens * widths * size * streams * sharers < _MEMORY_SHARE * _free_bytes(self.how.device)


def _reference_batches(count: int, how: Calibration) -> range:
    """Which of this rank's ``count`` batches: of all ranks', every so many, whoever has them."""
    counts = how.ranks.collect(count)
    # Spread over the whole text, and never fewer than two batches' worth.
    step = max(1, min(round(1 / _reference_share(how.spec.bits)), sum(counts) // 2))
    return range(-sum(counts[: how.ranks.rank]) % step, count, step)


def _reference_share(bits: int) -> float:
    """Of the batches, how many also run through the original model: what coarse grids get wrong needs more of them.

    eval/results/notes.md has the KL at shares from 1 to 1/16.
    """
    return 1 / 4 if bits < 4 else 1 / 12


def product_dtype(batches: int, device: torch.device, ranks: Ranks = ALONE) -> torch.dtype:
    """The dtype to multiply ``batches`` of inputs in for their Hessian: bfloat16 on CPUs that are faster at it.

    There it takes a half to a third of float32's time, with matrix units much less. What is lost (:meth:`Hessian.add`)
    is averaged out over the batches, and then far below what a Hessian is known to: K columns and n tokens give it to
    about ``sqrt(K / n)``. Of few batches it is not, and there is little time to gain.
    """
    # Sums that are added up over the ranks have to be of one kind, whatever the CPUs are.
    fast, counts = zip(*ranks.collect((has_fast_bfloat16_products(), batches)), strict=True)
    gains = device.type == "cpu" and all(fast) and sum(counts) >= _FEWEST_ROUNDED
    return torch.bfloat16 if gains else torch.float32


def _together(batches: int, device: torch.device) -> int:
    """How many consecutive batches, of all ranks' ``batches``, enter the sums of a Hessian at once.

    On a CPU adding the products of each to sums in float64 takes an eighth of the time of multiplying them.
    """
    if device.type != "cpu" or batches < 32:
        return 1
    return 4 if batches < 64 else 8  # longer runs are shared less evenly by ranks


def own_batches(count: int, how: Calibration) -> range:
    """This rank's part of ``count`` batches: contiguous, and of those that are added at once all or none.

    What enters a sum then has the same bits wherever it is computed. With too many ranks for that, they are parted.
    """
    together = _together(count, how.device)
    if count < together * how.ranks.count:
        together = 1
    part = how.ranks.share(-(-count // together))
    return range(part.start * together, min(part.stop * together, count))


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not every system tells: assume little, which only costs time
        return 2.0**31

"""One model in memory through calibration: text spread over the ranks, weights put into modules, sizes taken."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .activations import needs_ranges
from .affine import QuantizedWeight, dequantize
from .blockwise import Calibration, own_batches, quantize_blocks, quantize_dense
from .distributed import Ranks
from .linear import Int8Linear, QuantLinear
from .linearize import place
from .plan import Plan
from .progress import track
from .report import LayerRecord, QuantReport
from .smooth import InputRanges, measure_inputs
from .walk import Block, BlockInputs, block_stacks, capture_block_inputs, find_blocks, linears

__all__ = ["ModuleStore", "check_windows", "run", "tensor_bytes"]

_BATCH_BYTES = {"cpu": 4096, "cuda": 32768}  # tokens of a batch times the bytes of one activation


def run(
    model: nn.Module,
    plan: Plan,
    tokens: Tensor | None,
    how: Calibration,
    store: ModuleStore,
    report: QuantReport,
    progress: bool,
    smooth: float | None = None,
) -> None:
    """Quantize a model in place and fill in the report.

    Args:
        tokens: all windows, of which this rank takes its share; None where nothing is calibrated.
        store: its modules get to hold the weights.
        progress: show a bar.
    """
    started = time.perf_counter()
    model.eval()
    if tokens is not None:
        modules = linears(model)
        widest = max(modules[name].in_features for name in plan.targets)
        if tokens.numel() < widest:
            report.notes.append(
                f"{tokens.numel()} calibration tokens for inputs of up to {widest} channels: the Hessians are "
                f"singular and held up by damping; use more samples"
            )
    report.base_bytes = tensor_bytes(model)
    if tokens is not None and needs_ranges(how.spec, smooth):
        store.inputs = _measure(model, plan, tokens, how, smooth)
        report.notes += store.inputs.notes()
    records = _records(model, plan, tokens, how, store)
    report.layers = list(track(records, f"{how.method} {how.spec.label()}", len(plan.targets), progress))
    report.packed_bytes = tensor_bytes(model)
    report.linear_bits = store.bits_per_weight()
    report.seconds["quantize"] = time.perf_counter() - started


def _records(
    model: nn.Module, plan: Plan, tokens: Tensor | None, how: Calibration, store: ModuleStore
) -> Iterator[LayerRecord]:
    if tokens is None:
        if how.ranks.rank == 0:  # without data there is nothing to share
            yield from quantize_dense(model, plan.targets, how.spec, how.device, store)
        return
    for stack in block_stacks(find_blocks(model)):
        yield from quantize_blocks(stack, plan.targets, _block_inputs(model, stack, tokens, how), how, store)


def check_windows(windows: int, ranks: Ranks) -> None:
    """Refuse more ranks than windows.

    Raises:
        ValueError: names both.
    """
    if windows < ranks.count:
        raise ValueError(
            f"{windows} calibration windows cannot be spread over {ranks.count} ranks; use more samples, a longer text "
            f"or fewer ranks"
        )


def _block_inputs(model: nn.Module, blocks: Sequence[Block], tokens: Tensor, how: Calibration) -> BlockInputs:
    embedding = next(model.parameters())
    batch_tokens = _BATCH_BYTES.get(how.device.type, _BATCH_BYTES["cuda"]) // embedding.element_size()
    rows = max(1, batch_tokens // tokens.shape[1])
    batches = tokens.split(rows)
    if len(batches) < how.ranks.count:  # no rank is left without
        batches = tokens.split(len(tokens) // how.ranks.count)
    mine = own_batches(len(batches), how)
    return capture_block_inputs(model, blocks, [batches[i].to(embedding.device) for i in mine])


def _measure(model: nn.Module, plan: Plan, tokens: Tensor, how: Calibration, smooth: float | None) -> InputRanges:
    blocks = find_blocks(model)
    if len(block_stacks(blocks)) > 1:
        raise ValueError(
            f"{type(model).__name__}: static activations and smoothing need a model of one stack of blocks"
        )
    inputs = _block_inputs(model, blocks, tokens, how)
    static = needs_ranges(how.spec, None)
    return measure_inputs(
        blocks,
        plan.targets,
        inputs,
        how.device,
        static=static,
        alpha=smooth,
        model_type=how.model_type,
        ranks=how.ranks,
    )


class ModuleStore:
    """Where quantized weights go: into modules that replace the linears once their block is done."""

    def __init__(self, model: nn.Module, packed: bool) -> None:
        self._model, self._packed = model, packed
        self._bits = self._weights = 0
        self._pending: list[tuple[str, QuantLinear | Int8Linear]] = []
        self.modules: dict[str, QuantLinear | Int8Linear] = {}
        self.inputs = InputRanges()

    def __call__(self, name: str, linear: nn.Linear, qw: QuantizedWeight) -> None:
        n, k = qw.codes.shape
        zero_bits = 0 if qw.zeros is None else -(-n * qw.spec.bits // 32) * 32 * qw.zeros.shape[1]
        self._bits += n * k * qw.spec.bits + qw.scales.numel() * qw.scales.element_size() * 8 + zero_bits
        self._weights += n * k
        if not self._packed:
            linear.weight.data = dequantize(qw).to(linear.weight)
            return
        bias = None if linear.bias is None else linear.bias.detach()
        self._pending.append((name, self.inputs.pack(name, qw, bias)))

    def flush(self, device: torch.device) -> None:
        """Swap the finished modules in, on ``device``."""
        for name, module in self._pending:
            place(self._model, name, module.to(device))
            self.modules[name] = module
        self._pending.clear()

    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zeros counted."""
        return self._bits / self._weights if self._weights else 0.0


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once however many names it has."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())

"""The one call: walk x calibrators x checkpoint.

:func:`quantize` takes a model folder to a packed folder; :func:`quantize_` does the same to a module in memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activations import build_spec, check_request, needs_ranges, needs_text
from .affine import QuantizedWeight, dequantize
from .blockwise import METHODS, Calibration, quantize_blocks, quantize_dense
from .data import check_vocabulary, load_text
from .evaluate import context_length
from .linear import Int8Linear, QuantLinear
from .linearize import place, plan_linearized
from .plan import Plan
from .progress import track
from .report import LayerRecord, QuantReport
from .smooth import InputRanges, measure_inputs
from .spec import PACKED_BITS, QuantSpec
from .walk import Block, BlockInputs, block_stacks, capture_block_inputs, find_blocks, linears
from .windows import choose_windows, enough

__all__ = ["quantize", "quantize_"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


def quantize_(
    model: nn.Module,
    spec: QuantSpec,
    method: str = "rtn",
    *,
    calibration: Tensor | None = None,
    ignore: Sequence[str] = (),
    device: str | torch.device | None = None,
    packed: bool = True,
    correct: bool = True,
    smooth: float | None = None,
    allow_partial: bool = False,
    progress: bool = False,
) -> QuantReport:
    """Quantize the linears of a module in place.

    Without calibration data every ``nn.Linear`` of any module is rounded to nearest, a language model's output head
    excepted. With it the model must be a causal LM: its decoder blocks are calibrated one after the other, everything
    else stays.

    Args:
        model: changed in place, also when the call is interrupted half-way.
        spec: the grid; 2, 4 or 8 bits when ``packed``. With activations: ``rtn`` or ``gptq``, symmetric, packed.
        method: ``rtn``, ``gptq``, ``awq`` or ``awq+gptq``; all but ``rtn`` need calibration data.
        calibration: token ids ``(windows, seq_len)`` int64, or None.
        ignore: regular expressions searched for in module names; what matches stays dense.
        device: where to compute; the weights end up where they were. Default: where the first weight is.
        packed: replace each linear by a :class:`lowbit.QuantLinear`, or an Int8Linear where activations are quantized.
            False keeps the ``nn.Linear`` with its dequantized weight, to measure widths that have no packed form.
        correct: aim GPTQ at the original model's outputs (:func:`lowbit.calib.hessian.corrected_target`).
        smooth: SmoothQuant's migration strength (:mod:`lowbit.smooth`), for quantized activations only.
        allow_partial: accept that less than 90 % of the decoder's weights is covered.
        progress: show a bar on stderr.

    Returns:
        The report; its sizes count all parameters and buffers of the model.

    Raises:
        ValueError: bad arguments, weights that cannot be quantized, or too little coverage, before anything is changed.
    """
    _check_method(method, spec, calibration, packed)
    check_request(spec, method, smooth, calibrated=calibration is not None, packed=packed)
    if calibration is not None:
        find_blocks(model)
        _check_tokens(model, calibration)
    plan = plan_linearized(model, spec, ignore, in_blocks=calibration is not None, allow_partial=allow_partial)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    report = QuantReport(type(model).__name__, method, spec, plan.coverage, skipped=list(plan.skipped))
    if calibration is not None:
        report.calibration = _calibration_record(
            "the tokens given", sha256(calibration.cpu().numpy().tobytes()).hexdigest(), calibration
        )
    training = {name: module.training for name, module in model.named_modules()}
    try:
        how = Calibration(spec, method, where, _model_type(model), correct)
        store = _Store(model, packed)
        _run(model, plan, calibration, how, store, report, progress, smooth)
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, False)
    for module in store.modules.values():
        module.repack()
    return report


def _check_method(method: str, spec: QuantSpec, calibration: Tensor | None, packed: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if packed and spec.bits not in PACKED_BITS:
        raise ValueError(
            f"{spec.bits}-bit weights have no packed form (packed widths: {PACKED_BITS}); use packed=False"
        )
    if method != "rtn" and calibration is None:
        raise ValueError(f"method {method!r} needs calibration tokens; only 'rtn' works without data")
    if calibration is not None and (calibration.ndim != 2 or calibration.dtype != torch.int64 or not len(calibration)):
        raise ValueError(
            f"calibration must be token ids (windows, seq_len) int64 with at least one window, got "
            f"{tuple(calibration.shape)} {calibration.dtype}"
        )


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Refuse tokens the model has no embedding or no position for, where it says how many there are."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if isinstance(embedding, nn.Embedding):
        check_vocabulary(tokens, embedding.num_embeddings)
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config") and tokens.shape[1] > context_length(model):
        raise ValueError(
            f"calibration windows of {tokens.shape[1]} tokens exceed the model's context of {context_length(model)}"
        )


def _calibration_record(source: str, digest: str, tokens: Tensor) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": digest,
        "windows": len(tokens),
        "seq_len": tokens.shape[1],
        "tokens": tokens.numel(),
    }


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _run(
    model: nn.Module,
    plan: Plan,
    tokens: Tensor | None,
    how: Calibration,
    store: _Store,
    report: QuantReport,
    progress: bool,
    smooth: float | None = None,
) -> None:
    """Quantize a model in place and fill in the report."""
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
    report.base_bytes = _tensor_bytes(model)
    if tokens is not None and needs_ranges(how.spec, smooth):
        store.inputs = _measure(model, plan, tokens, how, smooth)
        report.notes += store.inputs.notes()
    records = _records(model, plan, tokens, how, store)
    report.layers = list(track(records, f"{how.method} {how.spec.label()}", len(plan.targets), progress))
    report.packed_bytes = _tensor_bytes(model)
    report.linear_bits = store.bits_per_weight()
    report.seconds["quantize"] = time.perf_counter() - started


def _records(
    model: nn.Module, plan: Plan, tokens: Tensor | None, how: Calibration, store: _Store
) -> Iterator[LayerRecord]:
    if tokens is None:
        yield from quantize_dense(model, plan.targets, how.spec, how.device, store)
        return
    for stack in block_stacks(find_blocks(model)):
        yield from quantize_blocks(stack, plan.targets, _block_inputs(model, stack, tokens, how), how, store)


def _block_inputs(model: nn.Module, blocks: Sequence[Block], tokens: Tensor, how: Calibration) -> BlockInputs:
    embedding_device = next(model.parameters()).device
    rows = max(1, _BATCH_TOKENS.get(how.device.type, _BATCH_TOKENS["cuda"]) // tokens.shape[1])
    batches = [batch.to(embedding_device) for batch in tokens.split(rows)]
    return capture_block_inputs(model, blocks, batches)


def _measure(model: nn.Module, plan: Plan, tokens: Tensor, how: Calibration, smooth: float | None) -> InputRanges:
    blocks = find_blocks(model)
    if len(block_stacks(blocks)) > 1:
        raise ValueError(
            f"{type(model).__name__}: static activations and smoothing need a model of one stack of blocks"
        )
    inputs = _block_inputs(model, blocks, tokens, how)
    static = needs_ranges(how.spec, None)
    return measure_inputs(
        blocks, plan.targets, inputs, how.device, static=static, alpha=smooth, model_type=how.model_type
    )


class _Store:
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


def _tensor_bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int = 4,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activations: str | None = None,
    smooth: float | None = None,
    method: str = "gptq",
    calibration: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    seq_len: int = 2048,
    ignore: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    allow_partial: bool = False,
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> QuantReport:
    """Quantize a model folder into a packed folder that lowbit, vLLM, SGLang and transformers open.

    ``out`` appears when it is complete and not before; the input is never changed.

    Args:
        model: folder or hub id of a causal language model.
        out: folder to write.
        bits, symmetric: see :class:`lowbit.QuantSpec`; 2, 4 and 8 bits have a file format.
        group_size: columns that share a scale. Default: 128, and the whole row (-1) with quantized activations.
        activations: ``int8`` (a scale per token) or ``int8-static`` (one per layer, by calibration): W8A8, with bits 8,
            whole rows, symmetric, and the methods ``gptq`` and ``rtn``. Default: left alone.
        smooth: SmoothQuant's migration strength between 0 and 1 (:mod:`lowbit.smooth`), with ``activations`` only.
        method: ``gptq``, ``awq``, ``rtn`` or ``awq+gptq``.
        calibration: ``wikitext2``, a ``.txt`` or ``.jsonl`` file, or a hub id. None: wikitext2, or nothing for ``rtn``,
            which weighs its grid by the inputs only when there is a text. Windows are taken from a file's beginning,
            from a hub data set at random.
        samples: windows to calibrate on; None takes up to 128. A number the text cannot give is an error.
        seq_len: tokens per window, cut to the model's context.
        ignore: regular expressions of module names to leave dense.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:N``: where blocks are calibrated. The model
            itself stays in main memory.
        dtype: compute and scale dtype; ``auto`` is the checkpoint's own.
        seed: picks the windows of a hub data set; nothing else is random.
        overwrite: replace ``out``, at the end, if it is a model folder.
        allow_partial: accept that less than 90 % of the decoder's weights is covered.
        trust_remote_code: run the model folder's own Python code.
        verbose: print the plan to stderr, the summary to stdout, and show progress.

    Returns:
        The report that was also written to ``lowbit.json``.

    Raises:
        ValueError, OSError: bad input, before any work; the message names the value and what is allowed.
    """
    from . import hf
    from .checkpoint import CheckpointWriter, check_output

    spec = build_spec(bits, group_size, symmetric, activations)
    check_request(spec, method, smooth, calibrated=True, packed=True)
    if calibration is None and needs_text(spec, method, smooth):
        calibration = "wikitext2"
    _check_method(method, spec, torch.zeros(1, 1, dtype=torch.int64), True)
    _check_counts(samples, seq_len)
    check_output(out, model, overwrite)
    where = hf.parse_device(device)
    hf.parse_dtype(dtype)
    if calibration is not None and Path(calibration).suffix not in (".txt", ".jsonl"):
        hf.resolve(model, trust_remote_code=trust_remote_code)  # a mistyped model should not cost a data set's download
    started = time.perf_counter()
    text = (
        None
        if calibration is None
        else load_text(calibration, "train", max_chars=enough(calibration, samples, seq_len))
    )
    loaded, tokenizer = hf.load_dense(model, dtype=dtype, trust_remote_code=trust_remote_code)
    tokens = None
    report = QuantReport(os.fspath(model), method, spec, 0.0, out=os.fspath(out))
    if text is not None:
        seq_len = min(seq_len, context_length(loaded))
        tokens = choose_windows(tokenizer, text, samples, seq_len, seed)
        check_vocabulary(tokens, loaded.get_input_embeddings().num_embeddings)
        report.calibration = _calibration_record(text.name, text.sha256, tokens)
    plan = plan_linearized(loaded, spec, ignore, in_blocks=True, allow_partial=allow_partial)
    report.coverage, report.skipped = plan.coverage, list(plan.skipped)
    report.seconds["load"] = time.perf_counter() - started
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        if verbose:
            print(_describe(report, plan, loaded, where), file=sys.stderr)
        how = Calibration(spec, method, where, _model_type(loaded))
        _run(loaded, plan, tokens, how, _Store(loaded, packed=True), report, verbose, smooth)
        _write(writer, loaded, tokenizer, model, report)
    if verbose:
        print(report.summary())
    return report


def _check_counts(samples: int | None, seq_len: int) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}")


def _write(writer: Any, model: Any, tokenizer: Any, source: str | os.PathLike[str], report: QuantReport) -> None:
    from . import hf
    from .checkpoint import linear_tensors, quantization_config

    started = time.perf_counter()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, Int8Linear))}
    stored = hf.checkpoint_names(model, packed)
    for name, module in packed.items():
        scale = getattr(module, "input_scale", None)
        for key, tensor in linear_tensors(stored[name], module.quantized_weight(), scale).items():
            writer.add(key, tensor)
    for name, tensor in hf.dense_tensors(model, packed):
        writer.add(name, tensor)
    dense = hf.ignore_names(model, [name for name, m in model.named_modules() if isinstance(m, nn.Linear)])
    config = quantization_config({stored[name]: module.spec for name, module in packed.items()}, dense)
    writer.add_json("config.json", {**hf.config_dict(model), "quantization_config": config})
    hf.companion_files(source, model, tokenizer, writer.path)
    report.seconds["write"] = time.perf_counter() - started
    writer.finish(report.to_dict())
    report.seconds["write"] = time.perf_counter() - started  # hashes and fsync included, which no record can hold


def _describe(report: QuantReport, plan: Plan, model: nn.Module, device: torch.device) -> str:
    """The plan, before the work."""
    data = "no data"
    if report.calibration:
        c = report.calibration
        data = f"{c['windows']} x {c['seq_len']} tokens of {c['source']}"
    return (
        f"plan: {len(plan.targets)} weights ({plan.coverage:.1%} of the decoder) to {report.spec.label()} by "
        f"{report.method} on {device}, {data}; {_tensor_bytes(model) / 1e6:.1f} MB model -> {report.out}"
    )

"""The one call: walk x calibrators x checkpoint.

:func:`quantize` takes a model folder to a packed folder; :func:`quantize_` does the same to a module in memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .affine import QuantizedWeight, dequantize
from .blockwise import METHODS, Calibration, quantize_blocks, quantize_dense
from .data import TextSource, check_vocabulary, load_text, token_windows
from .evaluate import context_length
from .linear import QuantLinear
from .plan import Plan, make_plan
from .progress import track
from .report import LayerRecord, QuantReport
from .spec import PACKED_BITS, QuantSpec
from .walk import capture_block_inputs, find_blocks, linears

__all__ = ["quantize", "quantize_"]

_SAMPLES = 128
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
    allow_partial: bool = False,
    progress: bool = False,
) -> QuantReport:
    """Quantize the linears of a module in place.

    Without calibration data every ``nn.Linear`` of any module is rounded to nearest, a language model's output head
    excepted. With it the model must be a causal LM: its decoder blocks are calibrated one after the other, everything
    else stays.

    Args:
        model: changed in place, also when the call is interrupted half-way.
        spec: the grid; 2, 4 or 8 bits when ``packed``.
        method: ``rtn``, ``gptq``, ``awq`` or ``awq+gptq``; all but ``rtn`` need calibration data.
        calibration: token ids ``(windows, seq_len)`` int64, or None.
        ignore: regular expressions searched for in module names; what matches stays dense.
        device: where to compute; the weights end up where they were. Default: where the first weight is.
        packed: replace each linear by a :class:`lowbit.QuantLinear`. False keeps the ``nn.Linear`` with its dequantized
            weight, to measure widths that have no packed form.
        correct: aim GPTQ at the original model's outputs (:func:`lowbit.calib.hessian.corrected_target`).
        allow_partial: accept that less than 90 % of the decoder's weights is covered.
        progress: show a bar on stderr.

    Returns:
        The report; its sizes count all parameters and buffers of the model.

    Raises:
        ValueError: bad arguments, weights that cannot be quantized, or too little coverage, before anything is changed.
    """
    _check_method(method, spec, calibration, packed)
    blocks = find_blocks(model) if calibration is not None else None
    if calibration is not None:
        _check_tokens(model, calibration)
    plan = make_plan(model, blocks, spec, ignore, allow_partial=allow_partial)
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
        _run(model, plan, calibration, how, store, report, progress)
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
    blocks = find_blocks(model)
    embedding_device = next(model.parameters()).device
    rows = max(1, _BATCH_TOKENS.get(how.device.type, _BATCH_TOKENS["cuda"]) // tokens.shape[1])
    batches = [batch.to(embedding_device) for batch in tokens.split(rows)]
    inputs = capture_block_inputs(model, blocks, batches)
    yield from quantize_blocks(blocks, plan.targets, inputs, how, store)


class _Store:
    """Where quantized weights go: into QuantLinears that replace the linears once their block is done."""

    def __init__(self, model: nn.Module, packed: bool) -> None:
        self._model, self._packed = model, packed
        self._bits = self._weights = 0
        self._pending: list[tuple[str, QuantLinear]] = []
        self.modules: dict[str, QuantLinear] = {}

    def __call__(self, name: str, linear: nn.Linear, qw: QuantizedWeight) -> None:
        n, k = qw.codes.shape
        zero_bits = 0 if qw.zeros is None else -(-n * qw.spec.bits // 32) * 32 * qw.zeros.shape[1]
        self._bits += n * k * qw.spec.bits + qw.scales.numel() * qw.scales.element_size() * 8 + zero_bits
        self._weights += n * k
        if not self._packed:
            linear.weight.data = dequantize(qw).to(linear.weight)
            return
        bias = None if linear.bias is None else linear.bias.detach()
        self._pending.append((name, QuantLinear.from_quantized(qw, bias)))

    def flush(self, device: torch.device) -> None:
        """Swap the finished modules in, on ``device``."""
        for name, module in self._pending:
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module.to(device))
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
    group_size: int = 128,
    symmetric: bool | None = None,
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
        bits, group_size, symmetric: see :class:`lowbit.QuantSpec`; 2, 4 and 8 bits have a file format.
        method: ``gptq``, ``awq``, ``rtn`` or ``awq+gptq``.
        calibration: ``wikitext2``, a ``.txt`` or ``.jsonl`` file, or a hub id. None: wikitext2, or nothing for ``rtn``,
            which weighs its grid by the inputs only when a text is given. Windows are taken from a file's beginning,
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

    spec = QuantSpec(bits, group_size, symmetric)  # type: ignore[arg-type]  # None is resolved by the spec
    if calibration is None and method != "rtn":
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
        else load_text(calibration, "train", max_chars=_enough(calibration, samples, seq_len))
    )
    loaded, tokenizer = hf.load_dense(model, dtype=dtype, trust_remote_code=trust_remote_code)
    tokens = None
    report = QuantReport(os.fspath(model), method, spec, 0.0, out=os.fspath(out))
    if text is not None:
        seq_len = min(seq_len, context_length(loaded))
        tokens = _choose_windows(tokenizer, text, samples, seq_len, seed)
        check_vocabulary(tokens, loaded.get_input_embeddings().num_embeddings)
        report.calibration = _calibration_record(text.name, text.sha256, tokens)
    blocks = find_blocks(loaded)
    plan = make_plan(loaded, blocks, spec, ignore, allow_partial=allow_partial)
    report.coverage, report.skipped = plan.coverage, list(plan.skipped)
    report.seconds["load"] = time.perf_counter() - started
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        if verbose:
            print(_describe(report, plan, loaded, where), file=sys.stderr)
        how = Calibration(spec, method, where, _model_type(loaded))
        _run(loaded, plan, tokens, how, _Store(loaded, packed=True), report, verbose)
        _write(writer, loaded, tokenizer, model, report)
    if verbose:
        print(report.summary())
    return report


def _check_counts(samples: int | None, seq_len: int) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}")


def _enough(calibration: str | os.PathLike[str], samples: int | None, seq_len: int) -> int | None:
    """Characters that surely hold the windows asked for; a hub data set is streamed no further. None reads all."""
    return None if os.fspath(calibration) == "wikitext2" else 2 * 8 * (samples or _SAMPLES) * seq_len


def _choose_windows(tokenizer: Any, text: TextSource, samples: int | None, seq_len: int, seed: int) -> Tensor:
    wanted = samples or _SAMPLES
    if text.is_file:
        windows = _first_windows(tokenizer, text.text, seq_len, wanted)
    else:
        windows = token_windows(tokenizer, text.text, seq_len)
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:wanted]]
    if samples is not None and len(windows) < samples:
        raise ValueError(
            f"calibration text {text.name!r} holds {len(windows)} windows of {seq_len} tokens, {samples} were asked "
            f"for; use a longer text, fewer samples or a shorter seq_len"
        )
    return windows


def _first_windows(tokenizer: Any, text: str, seq_len: int, wanted: int) -> Tensor:
    """The first windows of a text, tokenizing no more of it than they need: a long text's tokens take much memory.

    Part of the text is cut off at a line's end and one window more is asked for than used, so that the cut cannot show
    in any token that is kept.
    """
    length = 6 * seq_len * (wanted + 1)
    while length < len(text):
        end = text.rfind("\n", 0, length)
        with suppress(ValueError):  # a part of less than one window is no error yet
            windows = token_windows(tokenizer, text[: max(end, 0)], seq_len)
            if len(windows) > wanted:
                return windows[:wanted]
        length *= 2
    return token_windows(tokenizer, text, seq_len, wanted)


def _write(writer: Any, model: Any, tokenizer: Any, source: str | os.PathLike[str], report: QuantReport) -> None:
    from . import hf
    from .checkpoint import linear_tensors, quantization_config

    started = time.perf_counter()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    stored = hf.checkpoint_names(model, packed)
    for name, module in packed.items():
        for key, tensor in linear_tensors(stored[name], module.quantized_weight()).items():
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

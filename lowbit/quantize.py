"""The one call: walk x calibrators x checkpoint.

:func:`quantize` takes a model folder to a packed folder; :func:`quantize_` does the same to a module in memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activations import build_spec, check_request, needs_text
from .arguments import check_calibration, check_counts, check_method, check_tokens, parse_ignore
from .blockwise import Calibration
from .data import check_vocabulary, load_text
from .distributed import Ranks, checksum, join
from .dtypes import parse_dtype
from .evaluate import context_length
from .experts import Experts
from .limits import engine_limits
from .linear import Int8Linear, QuantLinear
from .linearize import plan_linearized
from .modes import check_weights_can_change, own_modes
from .pack_config import FORMAT, INT_FORMAT
from .plan import Plan
from .reads import check_readers
from .report import QuantReport
from .run import ModuleStore, check_windows, run, tensor_bytes
from .spec import QuantSpec
from .walk import find_blocks
from .windows import choose_windows, enough

__all__ = ["quantize", "quantize_"]


@own_modes()
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
        model: changed in place, also when the call is interrupted half-way. A transformers model is then what
            :func:`lowbit.load` gives: ``save_pretrained`` writes a packed folder. Give the whole model, not its base.
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
    check_method(method, spec, packed)
    check_calibration(method, calibration)
    check_request(spec, method, smooth, calibrated=calibration is not None, packed=packed)
    if calibration is not None or not packed:
        check_weights_can_change(model)
    if calibration is not None:
        find_blocks(model)
        check_tokens(model, calibration)
    patterns = parse_ignore(ignore)
    plan = plan_linearized(model, spec, patterns, in_blocks=calibration is not None, allow_partial=allow_partial)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    report = QuantReport(type(model).__name__, method, spec, plan.coverage, skipped=list(plan.skipped))
    if calibration is not None:
        report.calibration = _calibration_record(
            "the tokens given", sha256(calibration.cpu().numpy().tobytes()).hexdigest(), calibration
        )
    training = {name: module.training for name, module in model.named_modules()}
    try:
        how = Calibration(spec, method, where, _model_type(model), correct)
        store = ModuleStore(model, packed)
        run(model, plan, calibration, how, store, report, progress, smooth)
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, False)
        if hasattr(model, "save_pretrained"):
            from . import hf

            hf.mark_packed(model)
    for module in (*store.modules.values(), *(m for m in model.modules() if isinstance(m, Experts))):
        module.repack()
    return report


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


@own_modes()
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

    ``out`` appears when it is complete and not before; the input is never changed. Under ``torchrun``, or where a
    process group exists, every rank makes the same call: they share the calibration (:mod:`lowbit.distributed`), each
    on the GPU of its number where there are any, rank 0 writes and prints, and all return its report.

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
        dtype: compute and scale dtype; ``auto`` is the one config.json names, to which finer tensors are rounded.
        seed: picks the windows of a hub data set; nothing else is random.
        overwrite: replace ``out``, at the end, if it is a model folder.
        allow_partial: accept that less than 90 % of the decoder's weights is covered.
        trust_remote_code: run the model folder's own Python code.
        verbose: print the plan to stderr, the summary to stdout, and show progress.

    Returns:
        The report that was also written to ``lowbit.json``.

    Raises:
        ValueError, OSError: bad input, before any work; the message names the value and what is allowed.
        ConnectionError: another rank failed, ended, or did not answer in time.
    """
    from . import hf

    spec = build_spec(bits, group_size, symmetric, activations)
    check_request(spec, method, smooth, calibrated=True, packed=True)
    if calibration is None and needs_text(spec, method, smooth):
        calibration = "wikitext2"
    check_method(method, spec, packed=True)
    check_counts(samples, seq_len)
    where = hf.parse_device(device)
    parse_dtype(dtype)
    request = _Request(
        model, out, spec, method, smooth, calibration, samples, seq_len, parse_ignore(ignore), dtype, seed, overwrite,
        allow_partial, trust_remote_code,
    )  # fmt: skip
    with join(where.type) as ranks:
        return _quantize_folder(request, _device(where, ranks), ranks, verbose and ranks.rank == 0)


@dataclass(frozen=True)
class _Request:
    """What :func:`quantize` was asked for; its arguments of these names."""

    model: str | os.PathLike[str]
    out: str | os.PathLike[str]
    spec: QuantSpec
    method: str
    smooth: float | None
    calibration: str | os.PathLike[str] | None
    samples: int | None
    seq_len: int
    ignore: tuple[str, ...]
    dtype: str
    seed: int
    overwrite: bool
    allow_partial: bool
    trust_remote_code: bool

    def facts(self) -> dict[str, str]:
        """What every rank must be given alike, and by whom. Folders may be mounted elsewhere: see :func:`_facts`."""
        from . import __version__

        facts = {"the version of lowbit": __version__, "the version of torch": str(torch.__version__)}
        facts["the version of transformers"] = version("transformers")
        shared = (f.name for f in fields(self) if f.name not in ("model", "out", "calibration", "overwrite"))
        return facts | {f"the argument {name}": repr(getattr(self, name)) for name in shared}


def _device(where: torch.device, ranks: Ranks) -> torch.device:
    """The rank's own: of the GPUs of its machine the one of its number there."""
    if ranks.count == 1 or where.type == "cpu":
        return where
    if where.index is not None:
        raise ValueError(
            f"device '{where}' names one GPU for {ranks.count} ranks; with device cuda each takes one of its own"
        )
    from . import hf

    return hf.parse_device(f"cuda:{ranks.local}")


def _quantize_folder(request: _Request, where: torch.device, ranks: Ranks, verbose: bool) -> QuantReport:
    """:func:`quantize` of arguments that are in order, by one of the ranks."""
    from . import hf
    from .checkpoint import CheckpointWriter, check_output

    ranks.agree(request.facts())
    if ranks.rank == 0:
        check_output(request.out, request.model, request.overwrite)
    started = time.perf_counter()
    report = QuantReport(os.fspath(request.model), request.method, request.spec, 0.0, out=os.fspath(request.out))
    folder, model, tokenizer, tokens = _load(request, report)
    plan = plan_linearized(model, request.spec, request.ignore, in_blocks=True, allow_partial=request.allow_partial)
    hf.check_names(model, plan.targets)
    if tokens is None:
        report.notes += check_readers(model, plan.targets)
    report.coverage, report.skipped = plan.coverage, list(plan.skipped)
    form = FORMAT if request.spec.activations is None else INT_FORMAT
    report.notes += engine_limits(_model_type(model), any(".experts." in name for name in plan.targets), form)
    if ranks.count > 1:
        ranks.agree(_facts(model, tokens, report))
        report.calibration = report.calibration and {**report.calibration, "ranks": ranks.count}
    if tokens is not None:
        check_windows(len(tokens), ranks)
    report.seconds["load"] = time.perf_counter() - started
    how = Calibration(request.spec, request.method, where, _model_type(model), ranks=ranks)
    with ExitStack() as stack:
        if ranks.rank == 0:
            writer = stack.enter_context(CheckpointWriter(request.out, overwrite=request.overwrite))
            # not at the end: by then the source may be gone, or of another revision
            hf.companion_files(folder, model, tokenizer, writer.path, trust_remote_code=request.trust_remote_code)
        ranks.collect(None)  # nobody starts before the output is known to be writable
        if verbose:
            print(_describe(report, plan, model, where), file=sys.stderr)
        run(model, plan, tokens, how, ModuleStore(model, packed=True), report, verbose, request.smooth)
        ranks.collect(None)  # nothing is written for ranks that are gone
        if ranks.rank == 0:
            _write(writer, model, report)
        report = ranks.first(lambda: report)
    if verbose:
        print(report.summary())
    return report


def _load(request: _Request, report: QuantReport) -> tuple[Path, Any, Any, Tensor | None]:
    """The model's folder, the model, its tokenizer, and the windows to calibrate on, which the report describes."""
    from . import hf

    # before the text: a mistyped model should not cost a data set's download
    folder = hf.resolve(request.model, trust_remote_code=request.trust_remote_code)
    text = None
    if request.calibration is not None:
        most = enough(request.calibration, request.samples, request.seq_len)
        text = load_text(request.calibration, "train", max_chars=most)
    model, tokenizer = hf.load_dense(folder, dtype=request.dtype, trust_remote_code=request.trust_remote_code)
    if parse_dtype(request.dtype) is None:
        report.notes += hf.rounding_notes(model, folder)
    if text is None:
        return folder, model, tokenizer, None
    seq_len = min(request.seq_len, context_length(model))
    tokens = choose_windows(tokenizer, text, request.samples, seq_len, request.seed)
    check_vocabulary(tokens, model.get_input_embeddings().num_embeddings)
    report.calibration = _calibration_record(text.name, text.sha256, tokens)
    return folder, model, tokenizer, tokens


def _facts(model: nn.Module, tokens: Tensor | None, report: QuantReport) -> dict[str, str]:
    """The text and the model, which the ranks must agree on too."""
    from . import hf

    facts = {}
    if tokens is not None and report.calibration is not None:
        facts["the calibration text"] = f"sha256 {report.calibration['sha256'][:16]}"
        facts["the calibration tokens"] = f"{list(tokens.shape)}, {checksum(tokens)}"
    config = {key: value for key, value in hf.config_dict(model).items() if not key.startswith(("_", "transformers_"))}
    facts["the model"] = type(model).__name__
    facts |= {f"the model's config.json at {key}": repr(value) for key, value in sorted(config.items())}
    facts |= {f"the model's weight {name}": checksum(tensor) for name, tensor in model.state_dict().items()}
    return facts


def _write(writer: Any, model: Any, report: QuantReport) -> None:
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
        f"{report.method} on {device}, {data}; {tensor_bytes(model) / 1e6:.1f} MB model -> {report.out}"
        + "".join(f"\nwarning: {note}" for note in report.notes)
    )

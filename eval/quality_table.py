"""Quality of models x methods x specs, as CSV and Markdown: perplexity, KL(base || quantized), top-1 agreement.

    python eval/quality_table.py --model MODEL --calibration TEXT --data TEXT [--data TEXT]... [--out PREFIX]

Every row is lowbit.quantize_(packed=False) on a copy of the model in memory, so that widths without a file format are
measured too (True with quantized activations: their integers are multiplied), and lowbit.evaluate() against the
original. PREFIX.csv is rewritten after each row. A row that it already holds is computed again only where the package's
sources or a library's version have changed since, or with --force.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cached_base import CachedBase
from peer_results import read_peers
from provenance import ROOT, command_line, cpu_name, lowbit_sources, lowbit_version, short_name, version
from quality_report import METHODS, Row, Table

import lowbit
from lowbit.data import TextSource, check_vocabulary, load_text, token_windows
from lowbit.evaluate import MAX_SEQ_LEN, EvalResult, context_length
from lowbit.hf import load_dense, parse_device
from lowbit.report import QuantReport
from lowbit.spec import ActivationSpec

_SHORT = {"w8a8dyn": "w8a8gchsym", "w8a8static": "w8a8staticgchsym"}
SPECS = "w4g128sym,w4g128asym,w3g128sym,w3g128asym,w2g64sym,w2g64asym"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; returns the exit status, 2 where the input is at fault."""
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"quality_table: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="FOLDER|HUB_ID", help="repeatable")
    add("--data", action="append", required=True, metavar="TEXT", help="text to evaluate on; repeatable")
    add("--calibration", metavar="TEXT", help="text to calibrate on; its first windows are taken")
    add("--samples", type=int, default=128, help="calibration windows (default %(default)s)")
    add("--seq-len", type=int, help="tokens per window of both texts (default: min(2048, the model's context))")
    add("--max-windows", type=int, default=100, help="evaluation windows, at most (default %(default)s)")
    add("--specs", default=SPECS, help="comma-separated (default %(default)s)")
    add("--methods", default="rtn,awq,gptq", help=f"comma-separated, of {', '.join(METHODS)} (default %(default)s)")
    add("--dtype", default="float32", help="of weights and computation (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    add("--peers", action="append", default=[], metavar="JSON", help="other tools' figures to put beside; repeatable")
    add("--cache-gb", type=float, default=4.0, help="memory for the base's logits (default %(default)s)")
    add("--out", default=str(ROOT / "eval" / "results" / "quality"), metavar="PREFIX", help="writes PREFIX.csv and .md")
    add("--force", action="store_true", help="compute rows again that are there already")
    return parser


@dataclass(frozen=True)
class _Setting:
    """What all rows of a run share."""

    specs: list[tuple[lowbit.QuantSpec, float | None]]
    methods: list[str]
    texts: list[TextSource]
    calibration: TextSource | None
    device: torch.device
    origin: dict[str, str]


def _run(options: argparse.Namespace) -> None:
    names = [short_name(model).rpartition("/")[2] for model in options.model]
    if len(set(names)) < len(names):
        raise ValueError(f"models are told apart by their folders' names, got {names}")
    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {options.samples}")
    methods = options.methods.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"--methods are of {', '.join(METHODS)}, got {', '.join(unknown)}")
    needs_text = any(method != "rtn" for method in methods)
    if needs_text and options.calibration is None:
        raise ValueError(f"--calibration is missing: of the methods {methods} only rtn works without data")
    device = parse_device(options.device)
    setting = _Setting(
        specs=[parse_request(label) for label in options.specs.split(",")],
        methods=methods,
        texts=[load_text(data, "test") for data in options.data],
        calibration=load_text(options.calibration, "train") if needs_text else None,
        device=device,
        origin=_origin(device),
    )
    table = Table(options.out, [read_peers(path) for path in options.peers], force=options.force)
    for model, name in zip(options.model, names, strict=True):
        _measure_model(model, name, setting, options, table)
    table.write()
    for reason in table.left_out():
        print(f"quality_table: {reason}", file=sys.stderr)
    print(table.markdown_path.read_text(encoding="utf-8").partition("## How")[0])
    print(f"written: {table.csv_path} {table.markdown_path}")


def parse_spec(label: str) -> lowbit.QuantSpec:
    """``w4g128asym`` to a QuantSpec, the inverse of its label(); ``w8a8dyn`` and ``w8a8static`` are short for two.

    Raises:
        ValueError: the label has another form, or names a width or group size there is none of.
    """
    match = re.fullmatch(r"w(\d+)(a8(?:static)?)?g(\d+|ch)(sym|asym)", _SHORT.get(label, label))
    if match is None:
        raise ValueError(f"a spec looks like w4g128asym, w8gchsym, w8a8dyn or w8a8static, got {label!r}")
    bits, activations, group, symmetry = match.groups()
    scheme = ActivationSpec(8, dynamic=activations == "a8") if activations else None
    return lowbit.QuantSpec(int(bits), -1 if group == "ch" else int(group), symmetry == "sym", scheme)


def parse_request(label: str) -> tuple[lowbit.QuantSpec, float | None]:
    """A spec, with ``+smooth0.5`` behind it where SmoothQuant goes first: the spec and its alpha, or None.

    Raises:
        ValueError: as for :func:`parse_spec`, or the alpha is not a number.
    """
    spec, smooth, alpha = label.partition("+smooth")
    if not smooth:
        return parse_spec(label), None
    try:
        return parse_spec(spec), float(alpha)
    except ValueError as error:
        raise ValueError(f"{label!r}: {error}") from None


def _label(spec: lowbit.QuantSpec, smooth: float | None) -> str:
    return spec.label() if smooth is None else f"{spec.label()}+smooth{smooth:g}"


def _origin(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        "lowbit": lowbit_version(),
        "lowbit_sources": lowbit_sources(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "command": command_line(),
    }


def _measure_model(path: str, name: str, setting: _Setting, options: argparse.Namespace, table: Table) -> None:
    """All rows of one model that are not in the table yet."""
    model, tokenizer = load_dense(path, dtype=options.dtype, device=str(setting.device))
    if tokenizer is not None:  # the same few texts are tokenized for every row
        tokenizer = functools.cache(tokenizer)
    seq_len = options.seq_len or min(MAX_SEQ_LEN, context_length(model))
    calibration = None
    if setting.calibration is not None:
        calibration = _calibration(tokenizer, setting.calibration, seq_len, options.samples)
        check_vocabulary(calibration, model.get_input_embeddings().num_embeddings)
    windows = [len(token_windows(tokenizer, text.text, seq_len, options.max_windows)) for text in setting.texts]
    base = CachedBase(model, int(options.cache_gb * 1e9))
    for (spec, smooth), method in itertools.product(setting.specs, setting.methods):
        used = None if method == "rtn" else setting.calibration
        shared = {
            "model": name,
            "method": method,
            "spec": _label(spec, smooth),
            "seq_len": str(seq_len),
            "dtype": options.dtype,
        }
        shared |= _calibration_columns(used, options.samples) | setting.origin
        rows = [shared | _data_columns(text, count) for text, count in zip(setting.texts, windows, strict=True)]
        todo = [(text, row) for text, row in zip(setting.texts, rows, strict=True) if not table.has(row)]
        if not todo:
            continue
        quantized = copy.deepcopy(model)
        tokens = None if used is None else calibration
        report = lowbit.quantize_(
            quantized,
            spec,
            method.partition(" ")[0],
            calibration=tokens,
            packed=spec.activations is not None,
            smooth=smooth,
        )
        for text, row in todo:
            result = lowbit.evaluate(
                quantized, tokenizer, text, base=base, seq_len=seq_len, max_windows=options.max_windows, progress=False
            )
            table.put(row | _figures(report, result))
            print(f"{name} {row['spec']} {method} {row['data']}: ppl {result.ppl:.4f} KL {result.kl:.5f}", flush=True)
        # A model's modules refer to each other: without a collection two copies would be alive for a while.
        del quantized
        gc.collect()


def _calibration(tokenizer: Any, text: TextSource, seq_len: int, samples: int) -> torch.Tensor:
    windows = token_windows(tokenizer, text.text, seq_len)
    if len(windows) < samples:
        raise ValueError(
            f"calibration text {text.name!r} holds {len(windows)} windows of {seq_len} tokens, --samples is {samples}"
        )
    return windows[:samples]


def _calibration_columns(text: TextSource | None, samples: int) -> Row:
    if text is None:
        return {"calibration": "", "calibration_sha256": "", "samples": "0"}
    return {"calibration": short_name(text.name), "calibration_sha256": text.sha256, "samples": str(samples)}


def _data_columns(text: TextSource, windows: int) -> Row:
    return {"data": short_name(text.name), "data_sha256": text.sha256, "windows": str(windows)}


def _figures(report: QuantReport, result: EvalResult) -> Row:
    return {
        "bits": f"{report.linear_bits:.4f}",
        "ppl": f"{result.ppl:.6f}",
        "base_ppl": f"{result.base_ppl:.6f}",
        "kl": f"{result.kl:.7f}",
        "top1": f"{result.top1:.6f}",
        "seconds": f"{report.seconds['quantize']:.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())

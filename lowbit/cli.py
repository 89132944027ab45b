"""The ``lowbit`` command: quantize, eval, inspect, serve, doctor, convert.

Results go to stdout; progress, logs and errors go to stderr. With ``--json`` stdout holds exactly one JSON object.
Anything the user can put right ends as one message on stderr and exit status 2, Ctrl-C as status 130. What takes
seconds to import is imported inside the commands, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Annotated, Any, Literal

import typer

import lowbit
from lowbit.activations import build_spec, check_request
from lowbit.heap import restart_without_cache

__all__ = ["app", "main"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

Method = Literal["gptq", "awq", "rtn", "awq+gptq"]
Activations = Literal["int8", "int8-static"]
Target = Literal["compressed-tensors", "gptq", "gptq-v2", "awq", "dense"]

app = typer.Typer(
    name="lowbit",
    help="Quantize a language model to low bits, keep it packed, measure what was lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or id on the Hugging Face hub.")]
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA when there is one, else CPU), cpu, cuda, cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="Compute dtype: auto (config.json's), float32, float16 or bfloat16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model; refused without this.")
]
DataHelp = "wikitext2, FILE.txt, FILE.jsonl (a 'text' field per line), or HUB_ID[:CONFIG]"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWBIT_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Options before the command; ``_fail`` reads ``debug`` from the context."""


@app.command("quantize")
def quantize_command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; it appears only when it is complete.")],
    bits: Annotated[int, typer.Option(help="Bits per weight: 2, 4 or 8 have a file format.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns sharing a scale: 32, 64, 128, or -1 for a whole row. Default: 128; with int8: -1."),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Default: symmetric from 4 bits on.")
    ] = None,
    activations: Annotated[
        Activations | None,
        typer.Option(help="W8A8, with --bits 8: a scale per token (int8), or one per layer by calibration (-static)."),
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="SmoothQuant before int8: share of the range moved into weights, e.g. 0.5."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How the codes are chosen.")] = "gptq",
    calibration: Annotated[
        str | None, typer.Option(help=f"Text to calibrate on: {DataHelp}. Default: wikitext2; rtn works without.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration windows. Default: 128, or what the text has.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window, at most the model's context.")] = 2048,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave the weights whose names match dense; repeatable.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option(help="Picks the windows of a hub data set; nothing else is random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, at the end, if it exists.")] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go on where under 90 % of the decoder's weights can be quantized.")
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL and write a packed checkpoint to OUT. Under torchrun the ranks share the calibration."""
    with _reporting(context, as_json) as emit:
        spec = build_spec(bits, group_size, symmetric, activations)  # refuses before torch is imported
        check_request(spec, method, smooth, calibrated=True, packed=True)
        from lowbit.distributed import is_first, terminable

        with terminable():
            _import_models()
            report = lowbit.quantize(
                model, out, bits, group_size=group_size, symmetric=symmetric, activations=activations, smooth=smooth,
                method=method, calibration=calibration, samples=samples, seq_len=seq_len, ignore=tuple(ignore or ()),
                device=device, dtype=dtype, seed=seed, overwrite=overwrite, allow_partial=allow_partial,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        if is_first():
            emit(report.to_dict(), None)  # quantize() has printed its summary


@app.command("eval")
def eval_command(
    context: typer.Context,
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=f"Text to evaluate on: {DataHelp}.")] = "wikitext2",
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this model: KL divergence, top-1 agreement.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window; default: min(2048, the model's context).")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows; default: all.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL's perplexity on a text, and with --base what quantization changed."""
    with _reporting(context, as_json) as emit:
        _import_models()
        from lowbit.data import check_cut, load_text
        from lowbit.dtypes import parse_dtype
        from lowbit.hf import parse_device, resolve

        # What is quick to refuse comes first: a mistyped word should cost neither a data set's download nor a minute.
        parse_dtype(dtype)
        parse_device(device)
        check_cut(2 if seq_len is None else seq_len, max_windows)
        folder = resolve(model, trust_remote_code=trust_remote_code)
        base_folder = None if base is None else resolve(base, trust_remote_code=trust_remote_code)
        text = load_text(data, "test")
        loaded, tokenizer = lowbit.load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = lowbit.evaluate(
            loaded,
            tokenizer,
            text,
            base=base_folder,
            seq_len=seq_len,
            max_windows=max_windows,
            trust_remote_code=trust_remote_code,
        )
        compared = {} if base is None else {"base": base}
        emit({"model": model, **compared, **result.to_dict()}, str(result))


@app.command("inspect")
def inspect_command(context: typer.Context, model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what a packed checkpoint holds: bits, sizes and errors per weight."""
    with _reporting(context, as_json) as emit:
        inspection = lowbit.inspect(model)
        emit(inspection.to_dict(), str(inspection))


@app.command("serve")
def serve_command(
    context: typer.Context,
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 is any free port.")] = 8000,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Answer all requests at once, not one after the other.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="Jinja chat template, in place of the tokenizer's own.")
    ] = None,
    cache_blocks: Annotated[
        int | None, typer.Option(help="Blocks of the continuous batching cache; default: what fits.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per forward pass with continuous batching; default: what fits.")
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request; larger ones are answered with 413.")] = 8 * 2**20,
    grace: Annotated[int, typer.Option(help="Seconds that running requests get after SIGTERM or Ctrl-C.")] = 30,
    log_level: Annotated[str, typer.Option(help="debug, info (a line per request), warning or error.")] = "warning",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve MODEL with OpenAI's API: chat, completions, streams. Needs lowbit[serve]. SIGTERM and Ctrl-C end it."""
    stdout = sys.stdout

    def announce(ready: dict[str, Any]) -> None:
        print(json.dumps(ready) if as_json else _how_to_ask(ready), file=stdout, flush=True)

    with _reporting(context, as_json):
        from lowbit.hf.serve import Settings, serve

        settings = Settings(
            host=host, port=port, continuous_batching=continuous_batching, device=device, dtype=dtype,
            chat_template=chat_template, cache_blocks=cache_blocks, batch_tokens=batch_tokens, max_body=max_body,
            grace=grace, log_level=log_level, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        serve(model, settings, announce)


def _how_to_ask(ready: dict[str, Any]) -> str:
    path, asked = "completions", {"prompt": "It was", "max_tokens": 32}
    if ready["chat"]:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    body = shlex.quote(json.dumps({"model": ready["model"], **asked}))
    return (
        f"{ready['model']} on {ready['device']}, {ready['dtype']}, context {ready['context']}: {ready['url']}\n"
        f"curl {ready['url']}/{path} -H 'content-type: application/json' -d {body}"
    )


@app.command("doctor")
def doctor_command(
    context: typer.Context,
    model: ModelArgument,
    as_json: JsonOption = False,
) -> None:
    """Say which engines open MODEL on which GPUs, with which kernel, and what would help. Reads headers only."""
    with _reporting(context, as_json) as emit:
        from lowbit.doctor import diagnose

        diagnosis = diagnose(model)
        emit(diagnosis.to_dict(), None if as_json else str(diagnosis))


@app.command("convert")
def convert_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="IN", help="Packed folder in any format lowbit reads, or a hub id.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; it appears only when it is complete.")],
    to: Annotated[Target, typer.Option(help="The format to write; dense is the weights expanded.")],
    dtype: Annotated[
        str, typer.Option(help="Of scales and dense tensors: auto (as they are), float32, float16 or bfloat16.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, at the end, if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the packed checkpoint IN in another format, without loss."""
    with _reporting(context, as_json) as emit:
        from lowbit.distributed import terminable

        with terminable():
            report = lowbit.convert(model, out, to, dtype=dtype, overwrite=overwrite)
        emit(report.to_dict(), str(report))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` and returns its exit status.

    None: the process's own command line. The process is then the command's own, started anew for ``quantize``, and ends
    without freeing its objects (:class:`_QuickExit`).
    """
    leave = _QuickExit()
    if argv is None:
        if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "quantize":
            restart_without_cache()
        atexit.register(leave)  # before anything else is: it runs after all others
    leave.status = _status(argv)
    return leave.status


def _status(argv: Sequence[str] | None) -> int:
    try:
        app(args=None if argv is None else list(argv), prog_name="lowbit")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


class _QuickExit:
    """Ends the process after all that others have to do at its exit, with ``status``, which is 1 until it is known.

    Freeing half a million objects one by one takes up to a second; mypy leaves this way, too.
    """

    status = 1

    def __call__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads it: there is nobody left to tell
                stream.flush()
        os._exit(self.status)


def _import_models() -> None:
    """Import what reads and runs models: half a million objects that the garbage collector need not look at again.

    Passes while they are made are a tenth of the time it takes, and one later, in the middle of the work, 0.2 s. A
    process that has imported them already is not the command's own, and is left as it is.
    """
    if "lowbit.hf" in sys.modules:
        return
    gc.disable()
    try:
        import lowbit.hf  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # where objects are freed at exit: Triton 3.9 reports those of its own that are not


class _Emitter:
    """Holds a command's result until its work is over."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] | None = None
        self.text: str | None = None

    def __call__(self, fields: dict[str, Any], text: str | None) -> None:
        self.fields, self.text = fields, text


@contextmanager
def _reporting(context: typer.Context, as_json: bool) -> Iterator[_Emitter]:
    """Runs a command's body: maps its errors to exit statuses and prints its result.

    The body hands its result to the emitter, as fields for ``--json`` and as text for people (None: already printed).
    With ``--json`` whatever the body prints goes to stderr.
    """
    emitter = _Emitter()
    try:
        if as_json:
            with redirect_stdout(sys.stderr):
                yield emitter
            if emitter.fields is not None:
                print(json.dumps(emitter.fields, allow_nan=False))
        else:
            yield emitter
            if emitter.text is not None:
                print(emitter.text)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _fail(context, str(stop) or "interrupted", getattr(stop, "status", EXIT_INTERRUPTED))
    except BrokenPipeError:
        # The reader of our stdout is gone (`| head`): nobody to report to; what is buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if not _is_the_users_to_put_right(error):
            raise
        _fail(context, _message(error), EXIT_ERROR)


def _fail(context: typer.Context, message: str, status: int) -> None:
    if context.find_root().params.get("debug"):
        traceback.print_exc()
    with suppress(OSError):  # of a terminal that was closed
        print(f"lowbit: error: {message}" if status == EXIT_ERROR else f"lowbit: {message}", file=sys.stderr)
    raise typer.Exit(status) from None


def _is_the_users_to_put_right(error: Exception) -> bool:
    """Everything else is a mistake of ours and keeps its traceback."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("lowbit")
    return isinstance(error, (ValueError, OSError, MemoryError)) or _out_of_memory(error)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return f"out of memory; fewer --samples or a shorter --seq-len need less ({str(error).strip() or 'no detail'})"
    return str(error).strip() or type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    """True for the GPU allocator's error and for the CPU allocator's, which torch raises as a bare RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)

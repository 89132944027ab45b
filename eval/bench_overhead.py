"""Host microseconds per operator call: what a layer costs the CPU however fast its kernel is.

    python eval/bench_overhead.py [--device cpu|cuda] [--calls 200] [--rounds 7] [--out results.csv]

Weights are so small (32 x 64) on the CPU, and calls so many on CUDA, that the fixed cost of a call is what is left.

| figure   | what is timed                                                                                       |
|----------|-----------------------------------------------------------------------------------------------------|
| host     | a call in a row of calls, the device not waited for: Python, dispatcher, checks, launch              |
| graph    | CUDA only: a replayed CUDA graph of the row of calls, per call, the device waited for                |
| implementation | CPU only: the function that the dispatcher calls, alone; the rest of ``host`` is dispatching   |

Each is the median over rounds of a round's mean, with the least beside it; rounds of all rows are interleaved. Decoding
a 1B-parameter model (Llama-3.2-1B: 16 blocks of 7 linears) calls an operator 112 times per token; the last column is
112 times ``host``, and how many tokens per second that alone would allow.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from provenance import command_line, cpu_name, lowbit_version, version  # noqa: E402

from lowbit import cpu, int8  # noqa: E402
from lowbit.affine import QuantizedWeight  # noqa: E402
from lowbit.linear import Int8Linear, QuantLinear, linear_class  # noqa: E402
from lowbit.spec import ActivationSpec, QuantSpec  # noqa: E402

CALLS_PER_TOKEN = 16 * 7
SPECS = (
    QuantSpec(4, 32, True),
    QuantSpec(4, 32, False),
    QuantSpec(8, -1, True),
    QuantSpec(8, -1, True, ActivationSpec()),
    QuantSpec(8, -1, True, ActivationSpec(dynamic=False)),
)


@dataclass(frozen=True)
class Row:
    """One line of the result, microseconds per call."""

    device: str
    what: str
    n: int
    k: int
    dtype: str
    figure: str
    median_us: float
    least_us: float


def module_of(spec: QuantSpec, n: int, k: int, dtype: torch.dtype, device: torch.device) -> QuantLinear | Int8Linear:
    """A module with random codes, ready to run on ``device``."""
    groups = spec.num_groups(k)
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    zeros = None if spec.symmetric else torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8)
    qw = QuantizedWeight(codes, torch.full((n, groups), 0.01, dtype=dtype), zeros, spec)
    if linear_class(spec) is QuantLinear:
        return QuantLinear.from_quantized(qw).to(device).repack()
    static = spec.activations is not None and not spec.activations.dynamic
    scale = torch.tensor([0.05]) if static else None
    return Int8Linear.from_quantized(qw, input_scale=scale).to(device).repack()


def implementation(module: QuantLinear | Int8Linear, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What the dispatcher calls on the CPU in the end, with the arguments already checked."""
    if isinstance(module, Int8Linear):
        tensors = (module.weight, module.weight_scale, module.weight_zero_point, module.input_scale, module.bias)
        return lambda: int8._linear(x, *tensors)
    tensors = (module.weight_packed, module.weight_scale, module.weight_zero_point, module.bias)
    how = {"bits": module.spec.bits, "group_size": module.spec.group_size, "layout": module._layout}
    return lambda: cpu.linear(x, *tensors, **how)


def candidates(device: torch.device, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable]]:
    """(what, figure, function of no arguments) of every row but the graphs'."""
    x = torch.randn(1, k, device=device, dtype=dtype)
    dense = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    yield "nn.Linear", "host", lambda: dense(x)
    for spec in SPECS:
        module = module_of(spec, n, k, dtype, device)
        yield f"{type(module).__name__} {spec.label()}", "host", lambda module=module: module(x)
        if device.type == "cpu":
            yield f"{type(module).__name__} {spec.label()}", "implementation", implementation(module, x)


def mean_us(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Microseconds per call of ``calls`` in a row; on CUDA without waiting for the device until they are all queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def graph_of(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """A CUDA graph of ``calls`` calls, and what replays it and waits."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def measure(device: torch.device, n: int, k: int, dtype: torch.dtype, calls: int, rounds: int) -> list[Row]:
    """Rows of one shape; every candidate is measured once in every round."""
    rows = [(what, figure, call, calls, 1) for what, figure, call in candidates(device, n, k, dtype)]
    if device.type == "cuda":
        rows += [(what, "graph", graph_of(call, calls), 1, calls) for what, _, call, _, _ in rows]
    for _, _, call, *_ in rows:
        for _ in range(10):
            call()
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds):
        for found, (_, _, call, repeat, share) in zip(times, rows, strict=True):
            found.append(mean_us(call, repeat, device) / share)
    name = str(dtype).removeprefix("torch.")
    return [
        Row(device.type, what, n, k, name, figure, round(statistics.median(found), 2), round(min(found), 2))
        for found, (what, figure, *_) in zip(times, rows, strict=True)
    ]


def show(rows: list[Row]) -> None:
    """A table, with what 112 calls come to."""
    print(
        f"{'what':34} {'shape':>12} {'figure':>15} {'median us':>10} {'least':>8} {'ms / 1B token':>14} {'tok/s <=':>9}"
    )
    for row in rows:
        token = row.median_us * CALLS_PER_TOKEN / 1e3
        shape = f"{row.n}x{row.k}"
        print(f"{row.what:34} {shape:>12} {row.figure:>15} {row.median_us:10.2f} {row.least_us:8.2f} {token:14.2f} "
              f"{1e3 / token:9.0f}")  # fmt: skip


def main() -> None:
    """Parse, measure, print, and write the CSV that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200, help="calls in a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    if options.calls < 1 or options.rounds < 1:
        parser.error(f"--calls and --rounds must be at least 1, got {options.calls} and {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: no folder {options.out.parent}")
    torch.manual_seed(0)
    device = torch.device(options.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    about = f"{hardware}; {torch.get_num_threads()} threads; torch {version('torch')}; lowbit {lowbit_version()}"
    if device.type == "cuda":
        about += f"; triton {version('triton')}; CPU {cpu_name()}"
    print(about)
    shapes = [(32, 64)] if device.type == "cpu" else [(2048, 2048), (8192, 2048)]
    dtype = torch.bfloat16
    with torch.inference_mode():
        rows = [row for n, k in shapes for row in measure(device, n, k, dtype, options.calls, options.rounds)]
    show(rows)
    if options.out is not None:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*asdict(rows[0]), "about", "command"])
            writer.writeheader()
            writer.writerows({**asdict(row), "about": about, "command": command_line()} for row in rows)


if __name__ == "__main__":
    main()

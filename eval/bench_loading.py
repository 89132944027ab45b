"""What loading costs, in time and memory, beside the bounds lowbit sets itself.

    python eval/bench_loading.py [--hidden 2048] [--layers 8] [--rounds 5] [--work FOLDER] [--out eval/results/loading]

Two folders of one random-weight Llama are made, bfloat16 and packed to 4 bits, and every figure is taken in a process
of its own, with the files in the page cache, after all imports and after the same was done to a tiny model: what the
first model of a process costs, whatever its size, is in rows of its own ("first").

| what      | measured                                                                                                |
|-----------|---------------------------------------------------------------------------------------------------------|
| read      | the baseline: every tensor of the packed file read with safetensors, every packed layer repacked        |
| load      | ``lowbit.load``, which compares every file with its sha256                                              |
| installed | ``lowbit.install()``, ``from_pretrained``, then ``generate``                                            |
| plain     | ``from_pretrained`` without lowbit, then ``generate``                                                   |
| onthefly  | ``from_pretrained(dense folder, quantization_config=LowbitConfig(4))``                                  |

Memory is the process's (VmHWM and VmRSS of Linux, pages of mapped files included) less what it had before the call, and
every weight is read once before it is taken, because a tensor that is only mapped would not count yet. Times are the
least over rounds, which are interleaved; memory is the most. CPU time says what a busy machine hides. Bounds:

    load and installed in 1.2 x read; their peak in 1.3 x the file
    onthefly: peak in the packed size + the largest dense weight that is quantized
    installed: the model after generate is no larger than the file
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from provenance import command_line, cpu_name, lowbit_sources, lowbit_version, version  # noqa: E402

TINY = 128, 1
SLOWER, LARGER = 1.2, 1.3
KINDS = ("read", "load", "installed", "plain", "onthefly")
COLUMNS = ("what", "figure", "value", "unit", "of", "ratio", "bound", "met")


def make_folders(work: Path, hidden: int, layers: int) -> tuple[Path, Path]:
    """The dense and the packed folder of one shape; what is there already is kept."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from lowbit import QuantSpec
    from lowbit.checkpoint import CheckpointWriter, quantization_config

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 128 * 128,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=32000 if hidden > TINY[0] else 256,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name != "lm_head.weight"}
    linears = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if "proj" in name}
    kept = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items() if "proj" not in name}
    dense, packed = work / f"dense-{hidden}-{layers}", work / f"packed-{hidden}-{layers}"
    if not (dense / "config.json").is_file():
        dense.mkdir(parents=True, exist_ok=True)
        weights = {f"{name}.weight": torch.randn(shape).mul_(0.02).bfloat16() for name, shape in linears.items()}
        save_file({**kept, **weights}, dense / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(dense)
    if not packed.is_dir():
        spec = QuantSpec(4, 128, True)
        with CheckpointWriter(packed) as writer:
            for name, (n, k) in linears.items():
                words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int64).to(torch.int32)
                writer.add(f"{name}.weight_packed", words)
                writer.add(f"{name}.weight_scale", torch.full((n, k // 128), 0.01, dtype=torch.bfloat16))
                writer.add(f"{name}.weight_shape", torch.tensor([n, k]))
            for name, tensor in kept.items():
                writer.add(name, tensor)
            section = quantization_config(dict.fromkeys(linears, spec), ["lm_head"])
            writer.add_json("config.json", {**config.to_diff_dict(), "quantization_config": section})
            writer.finish({"model": "random", "method": "rtn"})
    return dense, packed


def memory(field: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def read_and_repack(folder: Path) -> list[Any]:
    """The baseline; returns what it read, for it to be held as a model holds it."""
    from safetensors import safe_open

    from lowbit.ops import best_layout, from_disk

    held: list[Any] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                layer, _, part = name.rpartition(".")
                if part != "weight_packed":
                    held.append(file.get_tensor(name))
                    continue
                words, scales = file.get_tensor(name), file.get_tensor(f"{layer}.weight_scale")
                n, k = words.shape[0], words.shape[1] * 8
                how = {"bits": 4, "symmetric": True, "dtype": scales.dtype, "device": words.device}
                held.append(from_disk(words, scales, None, bits=4, k=k, layout=best_layout(n, k, **how)))
    return held


def child(kind: str, folder: Path) -> dict[str, float]:
    """Do one thing in this process, to the tiny model and then to ``folder``, and say what it cost."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - the import is not to be timed
    from transformers.utils import logging

    import lowbit

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    load, install, config = lowbit.load, lowbit.install, lowbit.LowbitConfig
    calls: dict[str, Callable[[Path], Any]] = {
        "read": read_and_repack,
        "load": lambda path: load(path, device="cpu")[0],
        "installed": AutoModelForCausalLM.from_pretrained,
        "plain": AutoModelForCausalLM.from_pretrained,
        "onthefly": lambda path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config(4)),
    }
    if kind == "installed":
        install()
    tiny = folder.parent / f"{folder.name.partition('-')[0]}-{TINY[0]}-{TINY[1]}"
    first = cost(calls[kind], tiny, generate=kind in ("installed", "plain"))
    gc.collect()
    found = cost(calls[kind], folder, generate=kind in ("installed", "plain"))
    return {**found, "first seconds": first["seconds"], "first peak": first["peak"]}


def cost(call: Callable[[Path], Any], folder: Path, generate: bool) -> dict[str, float]:
    """Seconds of one call, and what it holds and held in memory."""
    import torch

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again here
    start, cpu = time.perf_counter(), time.process_time()
    held = call(folder)
    found = {"seconds": time.perf_counter() - start, "cpu seconds": time.process_time() - cpu}
    if isinstance(held, torch.nn.Module):
        for tensor in (*held.parameters(), *held.buffers()):
            tensor.detach().flatten()[:: 2048 // tensor.element_size()].clone()  # of every page something
        found["tensors"] = tensor_bytes(held)
    found["peak"] = memory("VmHWM") - before
    if generate:
        held.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False)
        found["tensors after generate"] = tensor_bytes(held)
        found["resident after generate"] = memory("VmRSS") - before
        found["peak"] = memory("VmHWM") - before
    return found


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def measure(dense: Path, packed: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Every kind in ``rounds`` fresh processes: least seconds, most bytes."""
    results: dict[str, dict[str, float]] = {}
    for round_ in range(rounds):
        for kind in KINDS:
            if round_ and kind in ("plain", "onthefly"):
                continue  # of these only memory is reported, and it does not vary
            folder = dense if kind == "onthefly" else packed
            command = [sys.executable, __file__, "--child", kind, "--work", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            best = results.setdefault(kind, found)
            for key, value in found.items():
                best[key] = (min if key.endswith("seconds") else max)(best[key], value)
    return results


def rows_of(results: dict[str, dict[str, float]], file_bytes: int, largest: int) -> list[dict[str, Any]]:
    """The table: each figure, what it is compared with, the ratio, the bound."""

    def row(what: str, figure: str, value: float, of: str, other: float, bound: float | None) -> dict[str, Any]:
        unit = "s" if figure.endswith("time") else "MB"
        shown = round(value, 3) if unit == "s" else round(value / 1e6, 1)
        other_shown = f"{other:.3f} s" if unit == "s" else f"{other / 1e6:.1f} MB"
        ratio = round(value / other, 3)
        met = "" if bound is None else ("yes" if ratio <= bound else "NO")
        return dict(
            zip(COLUMNS, (what, figure, shown, unit, f"{of} {other_shown}", ratio, bound or "", met), strict=True)
        )

    read, load, ours = results["read"], results["load"], results["installed"]
    plain, otf = results["plain"], results["onthefly"]
    return [
        row("lowbit.load", "time", load["seconds"], "reading and repacking", read["seconds"], SLOWER),
        row("installed", "time", ours["seconds"], "reading and repacking", read["seconds"], SLOWER),
        row("lowbit.load", "CPU time", load["cpu seconds"], "reading and repacking", read["cpu seconds"], None),
        row("installed", "CPU time", ours["cpu seconds"], "reading and repacking", read["cpu seconds"], None),
        row("lowbit.load", "peak memory", load["peak"], "the file", file_bytes, LARGER),
        row("installed", "peak memory", ours["peak"], "the file", file_bytes, LARGER),
        row("LowbitConfig(4)", "peak memory", otf["peak"], "packed + largest weight", otf["tensors"] + largest, 1.0),
        row("installed", "model after generate", ours["tensors after generate"], "the file", file_bytes, 1.0),
        row("installed", "memory after generate", ours["resident after generate"], "the file", file_bytes, None),
        row("without lowbit", "model after generate", plain["tensors after generate"], "the file", file_bytes, None),
        row("without lowbit", "memory after generate", plain["resident after generate"], "the file", file_bytes, None),
        row("without lowbit", "peak memory", plain["peak"], "the file", file_bytes, None),
        row("first lowbit.load", "time", load["first seconds"], "reading and repacking", read["first seconds"], None),
        row("first installed", "time", ours["first seconds"], "reading and repacking", read["first seconds"], None),
    ]  # fmt: skip


def write(rows: list[dict[str, Any]], about: str, stem: Path) -> None:
    """``stem``.csv and ``stem``.md."""
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "about", "command"])
        writer.writeheader()
        writer.writerows({**row, "about": about, "command": command_line()} for row in rows)
    lines = ["# Loading", "", about, "", f"    {command_line()}", "", f"| {' | '.join(COLUMNS)} |"]
    lines += ["|" + "---|" * len(COLUMNS), *(f"| {' | '.join(str(row[c]) for c in COLUMNS)} |" for row in rows)]
    meaning = (__doc__ or "").split("\n\n", 2)[2].rstrip()
    stem.with_suffix(".md").write_text("\n".join([*lines, "", meaning]) + "\n", encoding="utf-8")


def main() -> int:
    """Parse, measure, print; exit code 1 when a bound is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    parser.add_argument("--out", type=Path, help="results, without suffix")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.work)))
        return 0
    if options.hidden <= TINY[0] or options.hidden % 128 or min(options.layers, options.rounds) < 1:
        parser.error(
            "--hidden must be a multiple of 128 above 128, --layers and --rounds at least 1, got "
            f"{options.hidden}, {options.layers}, {options.rounds}"
        )
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: no folder {options.out.parent}")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error("memory is read from Linux's /proc, which is not here")
    with tempfile.TemporaryDirectory() as temporary:
        make_folders(options.work or Path(temporary), *TINY)
        dense, packed = make_folders(options.work or Path(temporary), options.hidden, options.layers)
        results = measure(dense, packed, options.rounds)
        file_bytes = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    largest = 2 * options.hidden * (options.hidden * 8 // 3 // 128 * 128)
    rows = rows_of(results, file_bytes, largest)
    about = (
        f"{cpu_name()}; {os.environ.get('OMP_NUM_THREADS', 'default')} threads; packed file {file_bytes / 1e6:.1f} MB, "
        f"largest dense weight {largest / 1e6:.1f} MB; torch {version('torch')}, "
        f"transformers {version('transformers')}, safetensors {version('safetensors')}; "
        f"lowbit {lowbit_version()}, sources {lowbit_sources()}"
    )
    print(about)
    for row in rows:
        bound = f"bound {row['bound']}: {'met' if row['met'] == 'yes' else 'NOT MET'}" if row["met"] else ""
        figure = f"{row['what']:16} {row['figure']:22} {row['value']:9} {row['unit']:2}"
        print(f"{figure} = {row['ratio']:6.3f} x {row['of']:42} {bound}")
    if options.out is not None:
        write(rows, about, options.out)
    return int(any(row["met"] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

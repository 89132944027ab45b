"""Tokens per second and peak memory of prefill and decode: dense beside packed weights, through transformers.

    python eval/bench_generate.py MODEL --out eval/results/generate-cpu          a local model, on this machine
    python eval/bench_generate.py --shape llama-3-8b --weights w4 --json FILE    random weights, made on the GPU

Every kind of weight runs in a process of its own. A prompt of random tokens goes through the model at once (prefill);
then one token at a time, greedily, with transformers' StaticCache (decode). On a GPU a decoding step is captured in a
CUDA graph and replayed; on a CPU it is called as it is. W4 and W8 are lowbit's QuantLinear in every linear of the
blocks (w4: 4 bits, groups of 128, symmetric; w8: 8 bits, groups of 128; a row that 128 does not divide takes groups of
32, or the row), rounded to nearest: speed does not depend on how well the codes were chosen. The output head and the
embedding stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

KINDS = ("fp32", "bf16", "w4", "w8")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}
"""LlamaConfig's fields (Llama 3: "The Llama 3 herd of models", table 3). ``tiny`` is for the tests."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a Hugging Face causal LM")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in this shape instead of a model")
    parser.add_argument("--weights", default="bf16,w4,w8", help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--batches", default="1,16", help="comma-separated numbers of sequences")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is reported, on a CPU the least")
    parser.add_argument("--out", type=Path, help="PREFIX of PREFIX.csv and PREFIX.md")
    parser.add_argument("--json", type=Path, help="the result of one kind of weight as JSON")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.shape is None):
        parser.error("give either a model's folder or --shape")
    options.kinds = options.weights.split(",")
    if set(options.kinds) - set(KINDS):
        parser.error(f"--weights must be of {', '.join(KINDS)}, got {options.weights!r}")
    try:
        options.batch_sizes = [int(batch) for batch in options.batches.split(",")]
    except ValueError:
        parser.error(f"--batches must be numbers, got {options.batches!r}")
    if min([*options.batch_sizes, options.prompt, options.new - 1, options.rounds]) < 1:
        parser.error("batches, --prompt and --rounds must be at least 1, --new at least 2")
    if (options.out is None) == (options.json is None) or (options.json and len(options.kinds) != 1):
        parser.error("give --out PREFIX, or --json FILE and one kind of weight")
    return options


def group_size(k: int) -> int:
    """128 where it divides K, else 32, else the whole row."""
    return next((size for size in (128, 32) if k % size == 0), -1)


def load(options: argparse.Namespace, kind: str) -> Any:
    """The model, in evaluation mode on the GPU if there is one, its linears replaced for w4 and w8."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        if kind.startswith("w"):
            _pack(model, int(kind[1:]))
        return model.to(device).eval()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape], tie_word_embeddings=False)).to(dtype)
    if kind.startswith("w"):
        _replace_on_meta(model, int(kind[1:]), dtype)
    inverse_frequencies = {name for name, _ in model.named_buffers() if "inv_freq" in name}
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.random_()
    _fill_scales(model)
    if inverse_frequencies:  # buffers of the rotary embedding are computed, not loaded: computed again on the device
        rotary = type(model.model.rotary_emb)(model.config).to(device)
        model.model.rotary_emb = rotary
    return model.eval()


def _linears(model: Any) -> list[tuple[Any, str, Any]]:
    """(parent, attribute, linear) of every torch.nn.Linear but the output head."""
    import torch

    head = model.get_output_embeddings()
    found = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear and child is not head:
                found.append((parent, name, child))
    return found


def _pack(model: Any, bits: int) -> None:
    from lowbit.calib.rtn import rtn_quantize
    from lowbit.linear import QuantLinear
    from lowbit.spec import QuantSpec

    for parent, name, linear in _linears(model):
        spec = QuantSpec(bits, group_size(linear.in_features), True)
        packed = rtn_quantize(linear.weight.detach().float(), spec)
        module = QuantLinear.from_quantized(packed, linear.bias, dtype=linear.weight.dtype)
        setattr(parent, name, module.repack())


def _replace_on_meta(model: Any, bits: int, dtype: Any) -> None:
    from lowbit.linear import QuantLinear
    from lowbit.spec import QuantSpec

    for parent, name, linear in _linears(model):
        spec = QuantSpec(bits, group_size(linear.in_features), True)
        made = QuantLinear(
            linear.in_features, linear.out_features, spec, bias=linear.bias is not None, dtype=dtype, device="meta"
        )
        setattr(parent, name, made)


def _fill_scales(model: Any) -> None:
    """Small positive scales, the right shapes, and the layout that the device multiplies with."""
    import torch

    from lowbit.linear import QuantLinear

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.weight_scale.uniform_(0.001, 0.002)
                module.weight_shape.copy_(torch.tensor([module.out_features, module.in_features]))
                module.repack()


def measure(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """One row per batch size."""
    import torch

    model = load(options, kind)
    return [_measure_batch(model, batch, options, torch) for batch in options.batch_sizes]


def _measure_batch(model: Any, batch: int, options: argparse.Namespace, torch: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (batch, options.prompt), device=device)
    prefill_s, decode_s = [], []
    with torch.inference_mode():
        for number in range(options.rounds + 1):
            prefill, decode = _one_round(model, prompt, options.new, on_gpu, torch)
            if number:  # the first compiles, allocates and tunes
                prefill_s.append(prefill)
                decode_s.append(decode)
    # a CPU is shared with whatever else the machine does, which only ever adds time
    typical = statistics.median if on_gpu else min
    prefill, decode = typical(prefill_s), typical(decode_s)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "batch": batch,
        "prompt": options.prompt,
        "new": options.new,
        "prefill_tokens_per_s": batch * options.prompt / prefill,
        "decode_tokens_per_s": batch * (options.new - 1) / decode,
        "prefill_ms": prefill * 1e3,
        "decode_ms_per_token": decode * 1e3 / (options.new - 1),
        "decode_spread": f"{min(decode_s) * 1e3:.1f}..{max(decode_s) * 1e3:.1f} ms",
        "weight_bytes": weights,
        "peak_bytes": peak,
    }


def _one_round(model: Any, prompt: Any, new: int, on_gpu: bool, torch: Any) -> tuple[float, float]:
    """(seconds of prefill, seconds of the new - 1 steps after its token)."""
    from transformers import StaticCache

    batch, length = prompt.shape
    cache = StaticCache(config=model.config, max_cache_len=length + new + 8)

    def run(ids: Any, positions: Any) -> Any:
        position_ids = positions.unsqueeze(0).expand(batch, -1)
        options = {"cache_position": positions} if _takes_cache_position(model) else {}
        out = model(ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = time.perf_counter()
    token = run(prompt, torch.arange(length, device=prompt.device))
    wait()
    prefill = time.perf_counter() - start
    step = _step(run, token, length, on_gpu, torch)
    wait()
    start = time.perf_counter()
    for _ in range(new - 1):
        step()
    wait()
    return prefill, time.perf_counter() - start


def _step(run: Callable[..., Any], token: Any, length: int, on_gpu: bool, torch: Any) -> Callable[[], Any]:
    """One greedy step with its token and position in fixed tensors; on a GPU captured in a graph."""
    position = torch.full((1,), length, device=token.device)

    def step() -> None:
        token.copy_(run(token, position))
        position.add_(1)

    if not on_gpu:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _takes_cache_position(model: Any) -> bool:
    """Older releases of transformers 5 place a token by this argument, newer ones by the cache's own count."""
    import inspect

    return "cache_position" in inspect.signature(type(model.model).forward).parameters


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> None:
    """PREFIX.csv with every figure, PREFIX.md with a table and how it was made."""
    rows = [{"weights": kind, **row, **about} for kind, found in results.items() for row in found]
    with options.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    base = {row["batch"]: row for row in next(iter(results.values()))}
    kept = "median" if about["device"] == "cuda" else "fastest"
    lines = [
        f"# Generation: {about['model']} on {about['hardware']}",
        "",
        f"`{about['command']}`",
        "",
        f"{about['versions']}; {about['date']}. Prompt of {options.prompt} random tokens, {options.new} generated, "
        f"greedily, StaticCache, {kept} of {options.rounds} rounds after "
        "one to warm up; "
        + ("decoding replays a CUDA graph." if about["device"] == "cuda" else f"{about['threads']} threads, no graph."),
        "",
        "| weights | batch | prefill tok/s | decode tok/s | decode, times the first row's | weights MB | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["decode_tokens_per_s"] / base[row["batch"]]["decode_tokens_per_s"]
        lines.append(
            f"| {row['weights']} | {row['batch']} | {row['prefill_tokens_per_s']:.0f} "
            f"| {row['decode_tokens_per_s']:.1f} | {ratio:.2f}x "
            f"| {row['weight_bytes'] / 1e6:.1f} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    peak = "torch.cuda.max_memory_allocated" if about["device"] == "cuda" else "largest resident set of the process"
    lines += ["", f"Peak: {peak}, so far at that batch size. Decode: `new - 1` steps, the head included."]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def about_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, command."""
    import torch
    from provenance import command_line, cpu_name, lowbit_version, short_name, version

    on_gpu = torch.cuda.is_available()
    return {
        "model": options.shape or short_name(options.model),
        "device": "cuda" if on_gpu else "cpu",
        "hardware": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": f"lowbit {lowbit_version()}, torch {torch.__version__}, transformers {version('transformers')}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command_line(),
    }


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; the exit status."""
    options = parse(arguments)
    if options.shape == "llama-3-8b":
        import torch

        if not torch.cuda.is_available():
            print("eval/bench_generate.py: --shape llama-3-8b needs a CUDA GPU; name a model's folder", file=sys.stderr)
            return 2
    if options.json is not None:
        found = {"weights": options.kinds[0], "rows": measure(options, options.kinds[0])}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.kinds:
            path = Path(scratch) / f"{kind}.json"
            source = ["--shape", options.shape] if options.shape else [options.model]
            command = [sys.executable, __file__, *source, "--weights", kind, "--json", str(path)]
            for name in ("batches", "prompt", "new", "rounds"):
                command += [f"--{name}", str(getattr(options, name))]
            subprocess.run(command, check=True)
            results[kind] = json.loads(path.read_text(encoding="utf-8"))["rows"]
            print(f"{kind}: {results[kind]}", file=sys.stderr)
    report(options, results, about_machine(options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

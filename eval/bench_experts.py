"""A mixture of experts, packed, in common calls against expert by expert: time of a decoding step and of a prompt.

    python eval/bench_experts.py [--out eval/results/experts-cpu.md] [--rounds 15] [--device cpu|cuda] [--clock cpu]

The model is a Mixtral of four layers with 16 experts, top-2, hidden size 512 and inner size 1024, random weights: "w4"
rounded to 4 bits in groups of 128, "w8a8" to int8 with activations quantized per token, "w4+w8" to 4 bits in experts of
even number and to 8 bits in the others, which are two common calls. "experts" is one layer's experts module alone,
"model" a whole forward pass. "dense" is transformers' own module with the weights before rounding and its default
implementation (grouped_mm).

All candidates of a row run in turn in every round; figures are medians, milliseconds, of the wall's clock or, with
`--clock cpu`, of this process on its core, which other processes beside it disturb less. How far the results of the two
packed ways are apart is measured too, relative to the largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from provenance import command_line, cpu_name, lowbit_sources, lowbit_version, version  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from lowbit import QuantSpec, quantize_  # noqa: E402
from lowbit.experts import Experts  # noqa: E402
from lowbit.spec import ActivationSpec  # noqa: E402

W4, W8, W8A8 = QuantSpec(4, 128), QuantSpec(8, 128), QuantSpec(8, -1, True, ActivationSpec())
WEIGHTS = {"w4": (W4, W4), "w8a8": (W8A8, W8A8), "w4+w8": (W4, W8)}
"""Specs of experts of even and of odd number."""
LAYERS = 4
PROMPT = 256
TOKENS = (1, 4, 32, PROMPT)


def build(
    specs: tuple[QuantSpec, QuantSpec], dtype: torch.dtype, device: torch.device
) -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """The packed model and its dense twin (of the weights before rounding: only its time is of interest)."""
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    dense = MixtralForCausalLM(config).to(device, dtype).eval()
    packed = MixtralForCausalLM(config)
    packed.load_state_dict(dense.state_dict())
    packed = packed.to(device, dtype).eval()
    even, odd = specs
    quantize_(packed, even, ignore=[] if even == odd else [r"experts\.\d*[13579]\."], allow_partial=True)
    if even != odd:
        quantize_(packed, odd, allow_partial=True)
    return packed, dense


def switch(model: torch.nn.Module, *, together: bool) -> None:
    """All experts of the model into stacks, or out of them."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.repack() if together else module.take_apart()
            assert module.stacked == together, module.why_not_stackable()


def medians(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each call; they take turns, and each is called once before."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                found[name].append((clock() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(
    weights: str, dtype: torch.dtype, device: torch.device, rounds: int, clock: Callable[[], float]
) -> list[tuple[str, int, dict[str, float], float]]:
    """(what, tokens, milliseconds by candidate, difference) of every row."""
    specs = WEIGHTS[weights]
    (apart, dense), (together, _) = build(specs, dtype, device), build(specs, dtype, device)
    switch(apart, together=False)
    switch(together, together=True)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, 512, device=device, dtype=dtype)
        chosen = torch.rand(tokens, 16, device=device).argsort(1)[:, :2]
        routed = x, chosen, torch.rand(tokens, 2, device=device, dtype=dtype)
        modules = {
            "one by one": apart.model.layers[0].mlp.experts,
            "together": together.model.layers[0].mlp.experts,
            "dense": dense.model.layers[0].mlp.experts,
        }
        rows.append(("experts", tokens, *_compare(modules, routed, rounds, device, clock)))
    for tokens in (1, PROMPT):
        ids = torch.randint(1024, (1, tokens), device=device)
        models = {"one by one": apart, "together": together, "dense": dense}
        calls = {name: (lambda ids, model=model: model(ids).logits) for name, model in models.items()}
        rows.append(("model", tokens, *_compare(calls, (ids,), rounds, device, clock)))
    return rows


def _compare(
    calls: dict[str, Callable[..., torch.Tensor]],
    arguments: tuple[torch.Tensor, ...],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
) -> tuple[dict[str, float], float]:
    a, b = calls["one by one"](*arguments).float(), calls["together"](*arguments).float()
    error = float((a - b).abs().max() / a.abs().max())
    ready = {name: (lambda call=call: call(*arguments)) for name, call in calls.items()}
    return medians(ready, rounds, device, clock), error


def table(found: dict[tuple[str, str], list[tuple[str, int, dict[str, float], float]]]) -> list[str]:
    """Rows of markdown."""
    lines = [
        "| weights | dtype | what | tokens | one by one ms | together ms | ratio | dense ms | largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (weights, dtype), rows in found.items():
        for what, tokens, times, error in rows:
            ratio = times["one by one"] / times["together"]
            lines.append(
                f"| {weights} | {dtype} | {what} | {tokens} | {times['one by one']:.2f} | {times['together']:.2f} | "
                f"{ratio:.2f}x | {times['dense']:.2f} | {error:.1e} |"
            )
    return lines


def main() -> None:
    """Parse, measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu: on CUDA the device is waited for, so only the wall's clock means anything")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: no folder {options.out.parent}")
    device = torch.device(options.device)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    with torch.inference_mode():
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        found = {
            (weights, str(dtype).removeprefix("torch.")): measure(weights, dtype, device, options.rounds, clock)
            for weights in WEIGHTS
            for dtype in dtypes
        }
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    about = (
        f"{hardware}; {torch.get_num_threads()} threads; torch {version('torch')}; transformers "
        f"{version('transformers')}; lowbit {lowbit_version()}, sources {lowbit_sources()}"
    )
    assert __doc__ is not None
    purpose = __doc__.split("\n\n", 2)[2].strip()
    title = "# Packed experts: common calls against expert by expert"
    page = "\n".join((title, "", about, "", f"`{command_line()}`", "", purpose, "", *table(found), ""))
    print(page)
    if options.out is not None:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

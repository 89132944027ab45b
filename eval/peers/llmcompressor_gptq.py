"""Quantizes a model with llm-compressor and saves it packed; prints what it took as one JSON object on the last line.

    python llmcompressor_gptq.py MODEL OUT --calibration FILE [--method gptq] [--bits 4] [--group-size 128] ...

Runs in an environment of its own: torch, then llmcompressor, datasets. It needs nothing of lowbit. The calibration
windows are lowbit's (lowbit/data.py): rows joined by a blank line, one tokenizer call, the first windows of the text.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def recipe(method, bits, group_size, symmetric):
    """The modifiers of a method, on every linear but lm_head, with llm-compressor's own defaults for the rest."""
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    last = GPTQModifier(**scheme) if method.endswith("gptq") else QuantizationModifier(**scheme)
    return [AWQModifier(), last] if method.startswith("awq") else [last]


def quantize(model, windows, method, bits, group_size, symmetric):
    """Quantizes ``model`` in place; ``windows`` are token ids (windows, seq_len), rtn uses none of them."""
    if not torch.accelerator.is_available():
        # It pins memory for transfers to an accelerator, which fails where there is none.
        IntermediatesCache.pin_memory = lambda self, *arguments: None
    rows = windows.tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe(method, bits, group_size, symmetric),
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
    )


def read_text(path):
    """A .txt file as it is, or the ``text`` fields of a .jsonl file joined by a blank line."""
    text = Path(path).read_bytes().decode("utf-8")
    if not path.endswith(".jsonl"):
        return text
    return "\n\n".join(json.loads(line)["text"] for line in text.rstrip().split("\n"))


def token_windows(tokenizer, text, seq_len, samples):
    """The first ``samples`` windows of ``seq_len`` tokens, one after the other."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < samples * seq_len:
        sys.exit(f"the text has {len(ids)} tokens, {samples} windows of {seq_len} were asked for")
    return ids[: samples * seq_len].view(samples, seq_len)


def versions():
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true", default=True)
    parser.add_argument("--asymmetric", dest="symmetric", action="store_false")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()

    seconds, started = {}, time.perf_counter()
    text = read_text(options.calibration)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, text, options.seq_len, options.samples)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    seconds["load"] = time.perf_counter() - started

    started = time.perf_counter()
    quantize(model, windows, options.method, options.bits, options.group_size, options.symmetric)
    seconds["quantize"] = time.perf_counter() - started

    started = time.perf_counter()
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    seconds["write"] = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "calibration": {
            "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
            "windows": options.samples,
            "seq_len": options.seq_len,
            "tokens": windows.numel(),
        },
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

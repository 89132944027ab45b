"""Measures llm-compressor's rtn, awq and gptq the way lowbit is measured; writes what quality_table.py --peers reads.

    PYTHONPATH=. PEER/bin/python eval/peers/llmcompressor_quality.py MODEL --calibration FILE --data FILE... --out JSON

Runs in llm-compressor's environment, from lowbit's repository: windows and scores are lowbit's own, on the model that
llm-compressor leaves in memory. The file is rewritten after each case, and cases it already holds are skipped.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from cached_base import CachedBase
from llmcompressor_gptq import METHODS, quantize, token_windows, versions
from provenance import short_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.data import load_text
from lowbit.evaluate import context_length, evaluate

SPECS = "w4g128sym,w4g128asym,w3g128sym,w3g128asym,w2g64sym,w2g64asym"


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def parse_spec(label):
    bits, group_size, symmetry = re.fullmatch(r"w(\d+)g(\d+)(sym|asym)", label).groups()
    return int(bits), int(group_size), symmetry == "sym"


def write(path, results):
    part = f"{path}.part"
    Path(part).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-windows", type=int, default=100)
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--methods", default="rtn,awq,gptq", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    tokenizer = functools.cache(AutoTokenizer.from_pretrained(options.model))
    base = CachedBase(load(options.model), 4 * 10**9)
    seq_len = min(2048, context_length(base))
    calibration = token_windows(tokenizer, load_text(options.calibration, "train").text, seq_len, options.samples)
    texts = [load_text(data, "test") for data in options.data]

    def scores(model):
        found = {}
        for text in texts:
            row = evaluate(model, tokenizer, text, base=base, max_windows=options.max_windows, progress=False)
            found[short_name(text.name)] = {"ppl": row.ppl, "kl": row.kl, "top1": row.top1, "windows": row.windows}
        return found

    about = {
        "model": Path(options.model).resolve().name,
        "calibration": f"{short_name(options.calibration)}, first {options.samples} windows of {seq_len} tokens",
        "evaluation": f"first {options.max_windows} windows of {seq_len} tokens, float32",
        "versions": ", ".join(f"{package} {number}" for package, number in versions().items()),
    }
    results = {"about": about, "base": scores(base)}
    if Path(options.out).exists():
        known = json.loads(Path(options.out).read_text(encoding="utf-8"))
        if (known["about"], known["base"].keys()) != (about, results["base"].keys()):
            sys.exit(f"{options.out} holds figures of another setting: {known['about']}")
        results = known
    for label in options.specs.split(","):
        for method in options.methods.split(","):
            name = f"llmcompressor-{method}-{label}"
            if name in results:
                continue
            model, started = load(options.model), time.perf_counter()
            bits, group_size, symmetric = parse_spec(label)
            quantize(model, calibration, method, bits, group_size, symmetric)
            seconds = round(time.perf_counter() - started, 1)
            results[name] = {**scores(model), "seconds": seconds}
            print(name, results[name], flush=True)
            write(options.out, results)


if __name__ == "__main__":
    main()

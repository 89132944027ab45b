"""Runs inside the environment of scripts/check_vllm: vLLM generates from one checkpoint. Knows nothing of lowbit.

    python vllm_run.py JOB.json RESULT.json

JOB.json: ``model`` (folder), ``prompts`` (lists of token ids), ``new_tokens``, ``dtype``, and ``expand_experts`` (see
vllm_experts.py). RESULT.json: per prompt the
greedy ``tokens``, their log-probabilities and those of the prompt's own tokens; how many layers each kernel class got;
or ``error``, in vLLM's words.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        result = generate(job)
    except Exception as error:  # vLLM's own message is a result: the table shows it
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    if "error" in result:
        raise SystemExit(1)


def generate(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if job["expand_experts"]:
        from vllm_experts import use_expanded_experts

        use_expanded_experts()
    length = max(map(len, job["prompts"])) + job["new_tokens"]
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=len(job["prompts"]),
        max_num_batched_tokens=length * len(job["prompts"]),
        enable_prefix_caching=False,  # a cached prompt has no log-probabilities
    )
    kernels = engine.apply_model(linear_kernels)[0]
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, logprobs=2, prompt_logprobs=0
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    return {"kernels": kernels, "outputs": [plain(output) for output in outputs]}


def linear_kernels(model: Any) -> dict[str, int]:
    """How many modules each kernel class, or else each quantization method, was chosen for."""
    chosen: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(module, "scheme", None)
        holders = (scheme, method)
        kernel = next((holder.kernel for holder in holders if getattr(holder, "kernel", None) is not None), None)
        chosen[type(kernel or scheme or method).__name__] += 1
    return dict(chosen)


def plain(output: Any) -> dict[str, Any]:
    """One request's output as numbers only; the first token of a prompt has no log-probability."""
    prompt, tokens = output.prompt_token_ids, list(output.outputs[0].token_ids)
    steps, of_prompt = output.outputs[0].logprobs, output.prompt_logprobs
    return {
        "tokens": tokens,
        "logprobs": [step[token].logprob for step, token in zip(steps, tokens, strict=True)],
        "top2": [{str(token): entry.logprob for token, entry in step.items()} for step in steps],
        "prompt_logprobs": [of[token].logprob for of, token in zip(of_prompt[1:], prompt[1:], strict=True)],
    }


if __name__ == "__main__":
    main()

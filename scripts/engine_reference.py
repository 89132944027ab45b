"""lowbit's own answer to a checkpoint, and the comparison of an engine's with it: for check_vllm and check_sglang.

Equal tokens say something only where lowbit's own choice is decided: at an exact or near tie of the first two logits
the last bit of any rounding picks the token. So a weight-only checkpoint is continued from prompts at which lowbit is
decided, which lowbit alone finds, before any engine is started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm_cases as cases
from torch import Tensor

from lowbit.data import token_windows

__all__ = ["Reference", "decided", "greedy", "next_logits"]

TEXT = Path(__file__).resolve().parent.parent / "eval" / "data" / "books-test.txt"
BATCH = 64
"""Windows that are continued together; how many makes no difference to which are taken."""
SLACK = 0.05
"""Nats; well above what 16-bit dtypes do to the distance of two logits (float16 steps are 0.004 to 0.016 there)."""


class Reference:
    """The prompts of one checkpoint, lowbit's continuation of them, and the comparison of an engine's with it.

    Prompts are consecutive windows of the test text, in its order: for weight-only formats the first ones whose
    continuation is decided by more than twice the allowed difference (see :func:`decided`), otherwise the first.

    Attributes:
        prompts: lists of token ids.
        tokens: lowbit's greedy continuation of each.
        passed_over: windows before the last prompt that are not decided.

    Raises:
        ValueError: the text has too few such windows.
    """

    def __init__(
        self,
        case: cases.Case,
        folder: Path,
        prompts: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: str,
        limit: float,
    ) -> None:
        self.case, self.folder, self.dtype, self.limit = case, folder, dtype, limit
        model, tokenizer = cases.reference_model(case, folder, dtype)
        windows = token_windows(tokenizer, TEXT.read_text(encoding="utf-8"), prompt_tokens)
        if case.weight_only:
            exact = cases.reference_model(case, folder, "float32")[0]
            chosen, continued = decided(model, exact, windows, prompts, new_tokens, 2 * limit)
        else:
            chosen, continued = list(range(min(prompts, len(windows)))), greedy(model, windows[:prompts], new_tokens)
        if len(chosen) < prompts:
            kind = f" whose next {new_tokens} are each decided by more than {2 * limit:g}" if case.weight_only else ""
            raise ValueError(
                f"{case.name}: {TEXT.name} has {len(chosen)} windows of {prompt_tokens} tokens{kind}, {prompts} were "
                "asked for; use fewer --prompts or --new-tokens"
            )
        self.prompts: list[list[int]] = windows[chosen].tolist()
        self.tokens: list[list[int]] = continued.tolist()
        self.passed_over = chosen[-1] + 1 - prompts

    def compare(self, outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Differences in nats, how many prompts continue alike, every first token that differs, and the verdict."""
        model = cases.reference_model(self.case, self.folder, self.dtype)[0]  # kept no longer than it is needed
        texts = [p + o["tokens"] for p, o in zip(self.prompts, outputs, strict=True)]
        logits = next_logits(model, texts)
        following = torch.tensor(texts)[:, 1:, None]
        ours = logits.log_softmax(-1).gather(2, following).squeeze(2)
        theirs = torch.tensor([o["prompt_logprobs"] + o["logprobs"] for o in outputs])
        off = (theirs - ours).abs()
        parted = [
            {"prompt": i, **self.parting(i, output, logits[i], torch.finfo(model.dtype).eps)}
            for i, output in enumerate(outputs)
            if output["tokens"] != self.tokens[i]
        ]
        found = {
            "passed_over": self.passed_over,
            "alike": f"{len(outputs) - len(parted)}/{len(outputs)}",
            "largest": off.max().item(),
            "mean": off.mean().item(),
            "parted": parted,
        }
        if self.case.weight_only:
            return {**found, "verdict": "DIFFERENT" if parted or found["largest"] > self.limit else "same"}
        # Rounding activations makes a step of each small difference; lowbit shows how large, against itself.
        exact = next_logits(cases.reference_model(self.case, self.folder, "float32")[0], texts)
        own = (exact.log_softmax(-1).gather(2, following).squeeze(2) - ours).abs()
        found |= {"own_largest": own.max().item(), "own_mean": own.mean().item()}
        within = found["mean"] <= found["own_mean"]
        return {**found, "verdict": "within lowbit's own rounding" if within else "DIFFERENT"}

    def parting(self, prompt: int, output: dict[str, Any], logits: Tensor, eps: float) -> dict[str, Any]:
        """The first token that differs: how far apart the two tokens are for lowbit, and the first two for the engine.

        ``steps`` counts the former in steps of the dtype, whose machine epsilon is ``eps``.
        """
        mine, other = self.tokens[prompt], output["tokens"]
        at = next(t for t, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1])
        best, second = logits[len(self.prompts[0]) - 1 + at, [mine[at], other[at]]].tolist()
        spacing = eps * 2.0 ** (math.frexp(best)[1] - 1)
        top = sorted(output["top2"][at].values())
        steps = round((best - second) / spacing)
        return {"token": at + 1, "our_gap": best - second, "their_gap": top[-1] - top[-2], "steps": steps}


def decided(
    model: Any, exact: Any, windows: Tensor, wanted: int, new_tokens: int, margin: float
) -> tuple[list[int], Tensor]:
    """The first ``wanted`` windows, in their order, after which every greedy choice is decided.

    Decided is a choice whose logit is more than ``margin`` above the next one. With a margin of twice the difference
    that is allowed of any log-probability, differences within what is allowed cannot change the token.

    Args:
        model: ``input_ids -> logits``, a causal model of transformers in a 16-bit dtype.
        exact: the same weights in float32, which CPUs multiply several times faster: what it finds far from decided is
            not asked of ``model``.
        windows: ``(W, T)``.

    Returns:
        Which windows, fewer than ``wanted`` if there are no more, and their continuations ``(len, new_tokens)``.
    """
    chosen: list[int] = []
    continued = [windows.new_empty(0, new_tokens)]
    for start in range(0, len(windows), BATCH):
        if len(chosen) >= wanted:
            break
        batch = windows[start : start + BATCH]
        left, tokens = _while_decided(exact, batch, new_tokens, margin - SLACK)
        if len(left):
            gaps, best = _gaps(next_logits(model, torch.cat([batch[left], tokens], 1))[:, -new_tokens:])
            firm = ((gaps > margin) & (best == tokens)).all(1)
            chosen += (start + left[firm]).tolist()
            continued.append(tokens[firm])
    return chosen[:wanted], torch.cat(continued)[:wanted]


@torch.inference_mode()
def _while_decided(model: Any, windows: Tensor, new_tokens: int, margin: float) -> tuple[Tensor, Tensor]:
    """Which of the windows ``(W, T)`` stay decided to the end, and their continuations."""
    left, tokens = torch.arange(len(windows)), windows
    how: dict[str, Any] = {"past_key_values": None, "use_cache": True, "logits_to_keep": 1}
    for _ in range(new_tokens):
        out = model(input_ids=tokens if how["past_key_values"] is None else tokens[:, -1:], **how)
        gaps, best = _gaps(out.logits[:, -1].float())
        keep = (gaps > margin).nonzero().squeeze(1)
        left, tokens = left[keep], torch.cat([tokens, best[:, None]], 1)[keep]
        if not len(keep):
            return left, tokens.new_empty(0, new_tokens)
        how["past_key_values"] = out.past_key_values
        out.past_key_values.batch_select_indices(keep)
    return left, tokens[:, windows.shape[1] :]


def _gaps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits ``(..., V)`` -> the first's distance from the second, and the first."""
    top = logits.topk(2, -1)
    return top.values[..., 0] - top.values[..., 1], top.indices[..., 0]


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """prompts ``(P, T)`` -> ``(P, new_tokens)``, without a cache: what the model says and nothing else."""
    tokens = prompts
    for _ in range(new_tokens):
        best = model(input_ids=tokens).logits[:, -1].float().argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens[:, prompts.shape[1] :]


@torch.inference_mode()
def next_logits(model: Any, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """tokens ``(P, T)`` -> the logits of every next token ``(P, T - 1, V)``, numbers of the model's dtype in fp32."""
    logits: Tensor = model(input_ids=torch.as_tensor(tokens)).logits
    return logits[:, :-1].float()

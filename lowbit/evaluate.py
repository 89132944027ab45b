"""What quantization cost: perplexity, KL divergence to the original model, top-1 agreement.

Perplexity follows the GPTQ paper's protocol (Frantar et al., 2022, section 4, and the code released with it); see
:data:`DEFINITION`. The two models run side by side, window by window: nothing of size tokens x vocabulary outlives its
window.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .data import TextSource, check_cut, check_vocabulary, load_text, token_windows
from .dtypes import dtype_name
from .progress import track

__all__ = ["DEFINITION", "EvalResult", "context_length", "evaluate"]

MAX_SEQ_LEN = 2048
"""Window of the GPTQ protocol; a model with a shorter context is evaluated at its context."""

DEFINITION = (
    "ppl = exp(sum of cross-entropies / tokens). The rows of the text are joined by a blank line and tokenized in one "
    "call, cut into non-overlapping windows of seq_len tokens, the tail is dropped. Each window starts from an empty "
    "context and scores its seq_len - 1 next tokens in float32; `tokens` counts these. All windows being of one "
    "length, this equals the GPTQ paper's exp(sum of (window mean * seq_len) / (windows * seq_len)). "
    "kl = mean over these tokens of KL(base || model) in nats; top1 = share of them where both models' most likely "
    "token is the same."
)

_CONTEXT_FIELDS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
"""LED has the last two. The smallest one counts: an encoder and a decoder are given the same tokens."""

_CHUNK_ELEMENTS = 2**24
"""Logits turned into float32 log-probabilities at a time, 64 MiB per temporary: a 128k vocabulary would need 1 GiB."""


@dataclass(frozen=True)
class EvalResult:
    """Figures of one evaluation. ``base_ppl``, ``kl`` and ``top1`` are None where no base model was given.

    Attributes:
        ppl: perplexity of the model.
        tokens: scored tokens, ``windows * (seq_len - 1)``.
        windows, seq_len: number of windows and tokens in each.
        data, data_sha256: name of the text and hash of its UTF-8 bytes.
        dtype: the model's dtype ("bfloat16"); probabilities are always taken in float32.
        base_ppl: perplexity of the base model on the same windows.
        kl: mean KL(base || model) per token, in nats.
        top1: share of tokens on whose most likely value both agree, 0 to 1.
        definition: how the figures are defined.
    """

    ppl: float
    tokens: int
    windows: int
    seq_len: int
    data: str
    data_sha256: str
    dtype: str
    base_ppl: float | None = None
    kl: float | None = None
    top1: float | None = None
    definition: str = DEFINITION

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; the base model's figures are in it only where there was one."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        rows = [("perplexity", f"{self.ppl:.4f}")]
        if self.base_ppl is not None:
            rows += [
                ("base perplexity", f"{self.base_ppl:.4f}  ({100 * (self.ppl / self.base_ppl - 1):+.2f} %)"),
                ("KL(base || model)", f"{self.kl:.5f} nats per token"),
                ("top-1 agreement", f"{100 * (self.top1 or 0):.2f} %"),
            ]
        rows.append(("text", f"{self.data}  (sha256 {self.data_sha256[:12]})"))
        rows.append(("scored", f"{self.tokens} tokens in {self.windows} windows of {self.seq_len}, {self.dtype}"))
        return "\n".join(f"{label:<18} {value}" for label, value in rows) + f"\n{self.definition}"


def evaluate(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike[str] | TextSource = "wikitext2",
    *,
    base: Any = None,
    seq_len: int | None = None,
    max_windows: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> EvalResult:
    """Measures a causal language model on a text, by itself and against ``base``.

    Args:
        model: a Hugging Face causal LM, packed or dense, on any device; evaluated where it is, as it is.
        tokenizer: the tokenizer of both models.
        data: what :func:`lowbit.data.load_text` takes (of a hub data set the test split), or what it returned.
        base: the model to compare with: a folder or hub id, which is loaded on ``model``'s device in its dtype, or a
            model that is already loaded. None measures perplexity alone.
        seq_len: tokens per window; None is the smaller of 2048 and the model's context.
        max_windows: only the first windows; None is all of them.
        progress: show a bar on stderr.
        trust_remote_code: run the Python code of a ``base`` that is loaded here.

    Returns:
        :class:`EvalResult`; sums are accumulated in float64.

    Raises:
        ValueError: a model is not a causal language model, ``seq_len`` exceeds the context, the text is empty or
            shorter than one window, a token is outside the vocabulary, the models' vocabularies differ, or the logits
            are not finite.
        OSError: the text or the base model cannot be read.
    """
    _check_causal(model)
    seq_len = _window_length(model, seq_len)
    check_cut(seq_len, max_windows)
    if isinstance(base, (str, os.PathLike)):
        from .hf import resolve

        # before the text: a mistyped base should not cost a data set's download
        base = resolve(base, trust_remote_code=trust_remote_code)
    source = data if isinstance(data, TextSource) else load_text(data, "test")
    windows = token_windows(tokenizer, source.text, seq_len, max_windows)
    weight = model.get_input_embeddings().weight
    check_vocabulary(windows, weight.shape[0])
    dtype = dtype_name(weight.dtype)
    if isinstance(base, os.PathLike):
        from .hf import load

        base, _ = load(base, device=weight.device, dtype=dtype, trust_remote_code=trust_remote_code)
    if base is not None:
        _check_base(base, windows)

    sums = _score(model, base, windows, progress)
    tokens = windows.shape[0] * (seq_len - 1)
    return EvalResult(
        ppl=_perplexity(sums[0] / tokens, "model"),
        tokens=tokens,
        windows=windows.shape[0],
        seq_len=seq_len,
        data=source.name,
        data_sha256=source.sha256,
        dtype=dtype,
        base_ppl=None if base is None else _perplexity(sums[1] / tokens, "base model"),
        kl=None if base is None else sums[2] / tokens,
        top1=None if base is None else sums[3] / tokens,
    )


def _check_causal(model: Any) -> None:
    """Refuse what predicts no next token: its cross-entropy would be a number, and mean nothing."""
    config, name = getattr(model, "config", None), type(model).__name__
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder, whose text goes into the encoder"
    elif hasattr(model, "can_generate") and not model.can_generate():
        kind = "an encoder or has no language model head"
    if kind is not None:
        raise ValueError(f"perplexity is measured on causal language models; {name} is {kind}")


def _window_length(model: Any, asked: int | None) -> int:
    """Tokens per window: as asked, or the protocol's, cut to the model's context."""
    context = context_length(model)
    if asked is None:
        return min(MAX_SEQ_LEN, context)
    if type(asked) is int and asked > context:
        raise ValueError(f"seq_len {asked} exceeds the model's context of {context} tokens")
    return asked


def _check_base(base: Any, windows: torch.Tensor) -> None:
    """Refuse a base model that cannot score ``windows (windows, seq_len)``."""
    _check_causal(base)
    check_vocabulary(windows, base.get_input_embeddings().weight.shape[0])
    seq_len, context = windows.shape[1], context_length(base)
    if seq_len > context:
        raise ValueError(f"seq_len {seq_len} exceeds the base model's context of {context} tokens")


def _score(model: Any, base: Any, windows: torch.Tensor, progress: bool) -> list[float]:
    """Sums over all scored tokens of: the model's and the base's cross-entropy, KL, agreement of the top tokens."""
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        run_model = stack.enter_context(_inference(model))
        run_base = stack.enter_context(_inference(base)) if base is not None else None
        for number, row in enumerate(track(windows, "evaluating", total=len(windows), enabled=progress)):
            # No names for the logits here: one window's must be gone before the next one's are computed.
            sums += _window_sums(run_model(row), run_base(row) if run_base is not None else None, row[1:])
            if not math.isfinite(sums.sum()):
                raise ValueError(
                    f"the logits in window {number} are NaN or infinite; a larger dtype (float32) may help, or the "
                    "weights are damaged"
                )
    return [float(value) for value in sums]


def _window_sums(logits: torch.Tensor, base_logits: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """The four sums of :func:`_score` over one window, float64 ``(4,)`` on the CPU.

    Args:
        logits, base_logits: ``(seq_len, vocabulary)``, any float dtype and device.
        targets: int64 ``(seq_len - 1,)``; token t is predicted by row t of the logits.
    """
    if base_logits is not None and base_logits.shape != logits.shape:
        raise ValueError(
            f"the model predicts {logits.shape[-1]} tokens and the base model {base_logits.shape[-1]}: KL needs one "
            "vocabulary"
        )
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    targets = targets.to(logits.device)
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(targets), step):
        target = targets[start : start + step, None]
        rows = slice(start, start + len(target))
        log_q = logits[rows].float().log_softmax(-1)
        sums[0] -= log_q.gather(-1, target).double().sum().cpu()
        if base_logits is None:
            continue
        log_p = base_logits[rows].to(logits.device).float().log_softmax(-1)
        sums[1] -= log_p.gather(-1, target).double().sum().cpu()
        sums[2] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().cpu()
        agrees = base_logits[rows].argmax(-1).to(logits.device) == logits[rows].argmax(-1)
        sums[3] += agrees.sum().cpu()
    return sums


@contextmanager
def _inference(model: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Evaluation mode while it is open; yields the function from a row of token ids to its logits."""
    device = model.get_input_embeddings().weight.device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield lambda row: model(input_ids=row[None].to(device), use_cache=False).logits[0]
    finally:
        for module, was_training in training.items():
            module.training = was_training


def context_length(model: Any) -> int:
    """Tokens the model was built for; :data:`MAX_SEQ_LEN` where its config names none (no positions to run out of)."""
    config = model.config.get_text_config()
    sizes = [size for field in _CONTEXT_FIELDS if type(size := getattr(config, field, None)) is int and size > 0]
    # RoBERTa and its relatives count the rows of their table, and number positions from behind that of the padding.
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name.rpartition(".")[2] and table.padding_idx is not None:
            sizes.append(table.num_embeddings - table.padding_idx - 1)
    return min(sizes, default=MAX_SEQ_LEN)


def _perplexity(mean_nll: float, whose: str) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        raise ValueError(f"the {whose}'s mean cross-entropy is {mean_nll:.4g} nats: its perplexity overflows") from None

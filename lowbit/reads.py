"""Who reads a tensor, and who else than its own linear reads a weight: what is seen of one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .blocks import is_encoder_decoder

__all__ = ["Reads", "check_readers", "refuse_bypassed", "storage_of", "unchanged_weights"]


class Reads(TorchDispatchMode):
    """Counts operations, and remembers which one was the last to read each storage.

    Attributes:
        last: address of a storage -> count of the operations when it was last read.
        bypassed: names of linears whose weight was read outside of them.
        inside: name of the linear that is running: its hooks call :meth:`enter` and :meth:`leave`.

    Args:
        linears: those whose weights are watched.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.last: dict[int, int] = {}
        self.bypassed: list[str] = []
        self.inside: str | None = None
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        for name, linear in linears.items():
            self._weights.setdefault(storage_of(linear.weight), []).append((name, linear.weight))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                storage = storage_of(value)
                self.last[storage] = self.count
                if storage in self._weights:
                    self._watch(value, self._weights[storage])
        return func(*args, **(kwargs or {}))

    def enter(self, name: str, *_: Any) -> None:
        """The linear ``name`` begins to run."""
        self.inside = name

    def leave(self, *_: Any) -> None:
        """It has run."""
        self.inside = None

    def _watch(self, value: Tensor, weights: list[tuple[str, Tensor]]) -> None:
        """Note the weights that ``value`` is of. Those of experts share a storage, even row by row."""
        if any(name == self.inside for name, _ in weights):
            return
        for name, weight in weights:
            if name not in self.bypassed and 0 <= value.data_ptr() - weight.data_ptr() < weight.nbytes:
                self.bypassed.append(name)


def refuse_bypassed(names: Sequence[str], where: str) -> None:
    """Refuse linears whose weight is read outside of them.

    Raises:
        ValueError: there are such; ``where`` and they are named.
    """
    if names:
        raise ValueError(
            f"{where}: {', '.join(names)} cannot be packed, because the block multiplies by its weight itself instead "
            "of calling the linear; leave it out by ignore"
        )


@torch.no_grad()
def check_readers(model: Any, targets: Iterable[str]) -> list[str]:
    """Run a language model on a few tokens and refuse linears that cannot be packed; for methods that never run it.

    Args:
        model: a transformers model with input embeddings.
        targets: names of the linears to be packed.

    Returns:
        nothing, or where the model cannot be run like that a note which says so.

    Raises:
        ValueError: something else than its linear reads a weight, or the model changes one.
    """
    every = dict(model.named_modules())
    linears = {name: every[name] for name in targets}
    reads = Reads(linears)
    tokens = torch.arange(min(8, model.get_input_embeddings().num_embeddings))[None]
    decoder = {"decoder_input_ids": tokens} if is_encoder_decoder(model) else {}
    with contextlib.ExitStack() as undo:
        for name, linear in linears.items():
            undo.callback(linear.register_forward_pre_hook(partial(reads.enter, name)).remove)
            undo.callback(linear.register_forward_hook(reads.leave).remove)
        training = model.training
        undo.callback(lambda: model.train(training))
        model.eval()
        undo.enter_context(unchanged_weights(linears))
        undo.enter_context(reads)
        try:
            model(input_ids=tokens, use_cache=False, **decoder)
        except Exception as error:  # whatever a model makes of tokens without a picture, say
            return [
                f"the model could not be run on {tokens.numel()} tokens, so nobody has seen whether its blocks read "
                f"weights past their linears ({type(error).__name__}: {error})"
            ]
    refuse_bypassed(reads.bypassed, type(model).__name__)
    return []


def storage_of(tensor: Tensor) -> int:
    """Address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def unchanged_weights(linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Refuse a model that changes the weights of its linears in place while it runs, which packed ones cannot follow.

    Raises:
        ValueError: names such weights.
    """
    weights = {name: linear.weight for name, linear in linears.items() if not linear.weight.is_inference()}
    before = {name: weight._version for name, weight in weights.items()}
    yield
    changed = [name for name, weight in weights.items() if weight._version != before[name]]
    if changed:
        raise ValueError(
            f"the model changes weights in place when it runs ({changed[:3]}, {len(changed)} in all), which it cannot "
            "do to packed ones; switch that off in its config.json (RWKV: rescale_every 0)"
        )

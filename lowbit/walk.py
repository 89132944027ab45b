"""Which weights, in what order, with which inputs. No algorithm lives here.

Decoder blocks are found by structure, not by class name; what a block is called with is caught by replacing the
blocks' ``forward`` for one pass and replayed verbatim, so nothing is guessed about positions, masks or caches. Inside
a block the linears are discovered by running it: those that are handed the same tensor form one group and share one
Hessian, and groups come in execution order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Block", "BlockInputs", "LinearGroup", "capture_block_inputs", "find_blocks", "linears", "linear_groups"]

Args = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """One decoder block: its dotted name in the model and the module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class LinearGroup:
    """Names, relative to the block, of linears that read the same tensor, in execution order."""

    names: tuple[str, ...]


@dataclass
class BlockInputs:
    """Everything the blocks are called with, batch by batch.

    Attributes:
        hidden: per batch, the hidden states entering the current block, ``(B, T, D)``, on the storage device.
        arguments: ``arguments[block][batch]``: the other positional and keyword arguments, hidden states taken out.
            Equal arguments of different batches are one object.
        keyword: whether a block takes its hidden states as the keyword ``hidden_states``.
    """

    hidden: list[Tensor]
    arguments: list[list[Args]]
    keyword: bool = False
    tokens: int = field(default=0)


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks, in order: the children of the outermost ``ModuleList`` holding the most linear weights.

    Raises:
        ValueError: the model has no ``ModuleList`` with linear layers in it; lists what it has.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
            if size and (best is None or size > best[0]):  # a nested list is never larger than the one around it
                best = (size, name, module)
    if best is None:
        children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
        raise ValueError(f"{type(model).__name__}: found no ModuleList of decoder blocks; its children are {children}")
    return [Block(f"{best[1]}.{i}", child) for i, child in enumerate(best[2])]


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` below ``module`` by dotted name, in definition order; a shared module appears once."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


class _Stop(Exception):
    """Leaves a forward as soon as the wanted input was seen."""


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Tensor, Args, bool]:
    if args and _is_hidden(args[0]):
        return args[0], (args[1:], kwargs), False
    if _is_hidden(kwargs.get("hidden_states")):
        return kwargs["hidden_states"], (args, {k: v for k, v in kwargs.items() if k != "hidden_states"}), True
    shown = [type(a).__name__ for a in args] + sorted(kwargs)
    raise ValueError(f"{name}: its first argument is not a hidden-states tensor; it was called with {shown}")


def first_output(output: Any) -> Tensor:
    """Hidden states of a block's output: the tensor itself, or the first item of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise ValueError(f"a decoder block must return a tensor or a tuple starting with one, got {type(hidden).__name__}")
    return hidden


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, (int, float, str, bool, type(None))) and type(a) is type(b) and bool(a == b)


@torch.no_grad()
def capture_block_inputs(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> BlockInputs:
    """Run the model around its blocks and record what each block is called with.

    For the pass every block hands its hidden states through unchanged, so it costs the embeddings and the masks only;
    a block class is run for real once, to learn whether it returns a tensor or a tuple.

    Args:
        model: a causal LM, in eval mode, callable as ``model(input_ids, use_cache=False)``.
        batches: token ids, each ``(B, T)`` int64, on the device of the embeddings.

    Raises:
        ValueError: a block is not called exactly once per forward, or not with hidden states first.
    """
    caught = BlockInputs([], [[] for _ in blocks])
    originals = [block.module.forward for block in blocks]
    as_tuple: dict[type, bool] = {}

    def recorder(index: int) -> Callable[..., Any]:
        block, original = blocks[index], originals[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, caught.keyword = _split_hidden(args, kwargs, block.name)
            if len(caught.arguments[index]) != len(caught.hidden) - (index > 0):
                raise ValueError(f"{block.name}: decoder blocks must run once each, in order, in one forward pass")
            if index == 0:
                caught.hidden.append(hidden)
            seen = caught.arguments[index]
            seen.append(seen[0] if seen and _same(seen[0], rest) else rest)
            kind = type(block.module)
            if kind not in as_tuple:
                as_tuple[kind] = isinstance(original(*args, **kwargs), (tuple, list))
            return (hidden,) if as_tuple[kind] else hidden

        return forward

    with contextlib.ExitStack() as undo:
        for index, block in enumerate(blocks):
            block.module.forward = recorder(index)  # type: ignore[method-assign]
            undo.callback(_restore_forward, block.module)
        for batch in batches:
            model(batch, use_cache=False)
            caught.tokens += batch.numel()
    for block, seen in zip(blocks, caught.arguments, strict=True):
        if len(seen) != len(batches):
            raise ValueError(f"{block.name}: was called {len(seen)} times in {len(batches)} forward passes")
    return caught


def _restore_forward(module: nn.Module) -> None:
    del module.forward  # the instance attribute; the class's forward shows again


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in nested tuples, lists and dicts moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


def call_block(module: nn.Module, hidden: Tensor, rest: Args, keyword: bool, device: torch.device) -> Tensor:
    """Run a block as the model would have, on ``device``; returns its hidden states."""
    args, kwargs = to_device(rest, device)
    hidden = hidden.to(device)
    output = module(*args, hidden_states=hidden, **kwargs) if keyword else module(hidden, *args, **kwargs)
    return first_output(output)


@torch.no_grad()
def linear_groups(block: Block, inputs: BlockInputs, index: int, device: torch.device) -> list[LinearGroup]:
    """Which linears of a block read the same tensor, in execution order, found by running it on the first batch.

    A linear that was not reached (a starved expert) is not in any group.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    kept: list[Tensor] = []  # no input may be freed while its address is a key

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            kept.append(x)
            names = groups.setdefault((x.data_ptr(), x.numel(), x._version), [])
            if not any(name in g for g in groups.values()):
                names.append(name)

        return record

    with contextlib.ExitStack() as undo:
        for name, linear in linears(block.module).items():
            undo.callback(linear.register_forward_pre_hook(hook(name)).remove)
        call_block(block.module, inputs.hidden[0], inputs.arguments[index][0], inputs.keyword, device)
    return [LinearGroup(tuple(names)) for names in groups.values() if names]


@torch.no_grad()
def group_inputs(
    block: Block, inputs: BlockInputs, index: int, names: Sequence[str], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """For every batch, the inputs of the named linears, each flattened to ``(tokens, K)``.

    The block runs only up to the last of the named linears. A linear called several times in one forward has its
    inputs concatenated; one that was not called is missing from the dict.
    """
    modules = linears(block.module)
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            if len(names) == 1 or len(seen) == len(names):
                raise _Stop

        return record

    with contextlib.ExitStack() as undo:
        for name in names:
            undo.callback(modules[name].register_forward_pre_hook(hook(name)).remove)
        for hidden, rest in zip(inputs.hidden, inputs.arguments[index], strict=True):
            seen.clear()
            with contextlib.suppress(_Stop):
                call_block(block.module, hidden, rest, inputs.keyword, device)
            yield {name: torch.cat(xs) if len(xs) > 1 else xs[0] for name, xs in seen.items()}


@torch.no_grad()
def advance(block: Block, inputs: BlockInputs, index: int, device: torch.device) -> None:
    """Replace the hidden states by the block's outputs, batch by batch, in place and on the storage device."""
    for i, (hidden, rest) in enumerate(zip(inputs.hidden, inputs.arguments[index], strict=True)):
        inputs.hidden[i] = call_block(block.module, hidden, rest, inputs.keyword, device).to(hidden.device)

"""Which weights, in what order, with which inputs. No algorithm lives here.

Decoder blocks are found by structure, not by class name; what a block is called with is caught by replacing the
blocks' ``forward`` for one pass and replayed verbatim, so nothing is guessed about positions, masks or caches. Inside
a block the linears are discovered by running it: those that are handed the same tensor form one group and share one
Hessian, and groups come in execution order.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .blocks import Block, block_stacks, find_blocks, is_encoder_decoder, linears
from .cpu_forward import CpuForward
from .reads import Reads, refuse_bypassed, storage_of, unchanged_weights

__all__ = [
    "Block",
    "BlockInputs",
    "BlockRun",
    "LinearGroup",
    "block_stacks",
    "call_block",
    "capture_block_inputs",
    "find_blocks",
    "first_output",
    "linear_groups",
    "linears",
    "to_device",
]

QUERY, HIDDEN = "(query)", "(hidden)"  # no module is called that
Args = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same tensor.

    Attributes:
        names: relative to the block, in execution order.
        unread: names of earlier linears whose inputs nothing reads any more once this group's are known; with
            :data:`QUERY` and :data:`HIDDEN` where that is so of the attention's queries and the block's own input.
    """

    names: tuple[str, ...]
    unread: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass
class BlockInputs:
    """Everything the blocks are called with, batch by batch.

    Attributes:
        hidden: per batch, the hidden states entering the current block, ``(B, T, D)``, on the storage device. One
            NaN, expanded, while a :class:`BlockRun` that was told so no longer needs them, and after one that is not
            finished.
        arguments: ``arguments[block][batch]``: the other positional and keyword arguments, hidden states taken out.
            Equal arguments of different batches are one object.
        keyword: whether a block takes its hidden states as the keyword ``hidden_states``.
    """

    hidden: list[Tensor]
    arguments: list[list[Args]]
    keyword: bool = False


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
        raise ValueError(
            f"a decoder block must return a tensor or a tuple starting with one, got {type(hidden).__name__}"
        )
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


class _AllCaught(Exception):
    """The last block was reached: the head, often as costly as a block, need not run."""


@torch.no_grad()
def capture_block_inputs(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> BlockInputs:
    """Run the model around its blocks and record what each block is called with.

    For the pass every block hands its hidden states through unchanged, and all batches but the first end at the last
    block, so it costs the embeddings and the masks only; a block class is run for real once, to learn whether it
    returns a tensor or a tuple. Blocks that return more than their hidden states (T5's position bias) run each time.

    Args:
        model: a language model, in eval mode, callable as ``model(input_ids, use_cache=False)``; an encoder-decoder's
            decoder is given the same tokens.
        blocks: one stack of them.
        batches: token ids, each ``(B, T)`` int64, on the device of the embeddings.

    Raises:
        ValueError: a block is not called exactly once per forward, or not with hidden states first, or the model
            changes its weights.
    """
    caught = BlockInputs([], [[] for _ in blocks])
    originals = [block.module.forward for block in blocks]
    as_tuple: dict[type, int] = {}  # items of the tuple a block returns, 0 for a tensor
    both = is_encoder_decoder(model)

    def recorder(index: int) -> Callable[..., Any]:
        """What stands for block ``index``'s forward during the pass."""
        block, original = blocks[index], originals[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            """Remember the arguments; return the hidden states as they came, in the form the block returns them in."""
            hidden, rest, caught.keyword = _split_hidden(args, kwargs, block.name)
            if len(caught.arguments[index]) != len(caught.hidden) - (index > 0):
                raise ValueError(f"{block.name}: decoder blocks must run once each, in order, in one forward pass")
            if index == 0:
                caught.hidden.append(hidden)
            seen = caught.arguments[index]
            seen.append(seen[0] if seen and _same(seen[0], rest) else rest)
            kind = type(block.module)
            others: tuple[Any, ...] = ()
            if as_tuple.get(kind, 2) > 1:
                output = original(*args, **kwargs)
                as_tuple[kind] = len(output) if isinstance(output, (tuple, list)) else 0
                others = tuple(output[1:]) if as_tuple[kind] else ()
            if index == len(blocks) - 1 and len(seen) > 1:
                raise _AllCaught
            return (hidden, *others) if as_tuple[kind] else hidden

        return forward

    held = {f"{block.name}.{name}": linear for block in blocks for name, linear in linears(block.module).items()}
    with contextlib.ExitStack() as undo:
        undo.enter_context(unchanged_weights(held))
        for index, block in enumerate(blocks):
            block.module.forward = recorder(index)
            undo.callback(_restore_forward, block.module)
        for batch in batches:
            with contextlib.suppress(_AllCaught):
                model(batch, use_cache=False, **({"decoder_input_ids": batch} if both else {}))
    for block, seen in zip(blocks, caught.arguments, strict=True):
        if len(seen) != len(batches):
            raise ValueError(f"{block.name}: was called {len(seen)} times in {len(batches)} forward passes")
    for number, states in enumerate(caught.hidden):  # the blocks' other arguments must outlive them
        others = tree_leaves([seen[number] for seen in caught.arguments])
        if storage_of(states) in {storage_of(other) for other in others if isinstance(other, Tensor)}:
            caught.hidden[number] = states.clone()
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
def linear_groups(
    block: Block, inputs: BlockInputs, index: int, device: torch.device, wanted: Collection[str] | None = None
) -> list[LinearGroup]:
    """Which linears of a block read the same tensor, in execution order, found by running it on the first batch.

    A linear that was not reached is not in any group. One that was reached by no token (an expert) is.

    Args:
        wanted: names of the linears that matter, relative to the block; None is all.

    Raises:
        ValueError: a linear runs more than once in one forward pass of the block, or its weight is read by something
            else than itself.
    """
    modules = {name: linear for name, linear in linears(block.module).items() if wanted is None or name in wanted}
    groups: dict[tuple[int, ...], list[str]] = {}
    starts: list[int] = []
    kept: list[Tensor] = []  # no tensor may be freed while its address is a key
    seen: set[str] = set()
    reads = Reads(modules)
    queries: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """What puts the linear ``name`` with those that were handed the same tensor."""

        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            """Note who reads ``args[0]``, and when."""
            reads.enter(name)
            if name in seen:
                raise ValueError(f"{block.name}.{name} runs more than once in one forward pass; leave it out by ignore")
            seen.add(name)
            # Empty tensors all have the address 0; readers of one are handed the same object.
            place = args[0].data_ptr() if args[0].numel() else id(args[0])
            key = (place, args[0].numel(), args[0]._version)
            if key not in groups:
                kept.append(args[0])
                starts.append(reads.count)
            groups.setdefault(key, []).append(name)

        return record

    with contextlib.ExitStack() as undo:
        for name, linear in modules.items():
            undo.callback(linear.register_forward_pre_hook(hook(name)).remove)
            undo.callback(linear.register_forward_hook(reads.leave).remove)
        undo.enter_context(reads)
        undo.enter_context(CpuForward(queries.append))
        call_block(block.module, inputs.hidden[0], inputs.arguments[index][0], inputs.keyword, device)
    refuse_bypassed(reads.bypassed, block.name)
    given = (inputs.hidden[0], inputs.arguments[index][0])  # not the block's to empty: T5's encoder states, for one
    entered = {storage_of(value) for value in tree_leaves(given) if isinstance(value, Tensor)}
    ends = [reads.last[storage_of(x)] if storage_of(x) not in entered else reads.count for x in kept]
    entered |= {storage_of(tensor) for tensor in (*block.module.parameters(), *block.module.buffers())}
    ends_of = {frozenset(names): end for names, end in zip(groups.values(), ends, strict=True)}
    ends_of[frozenset([HIDDEN])] = reads.last.get(storage_of(inputs.hidden[0]), reads.count)
    asked = [reads.last[storage_of(q)] if storage_of(q) not in entered else reads.count for q in queries]
    ends_of[frozenset([QUERY])] = max(asked, default=reads.count)
    return [
        LinearGroup(tuple(names), frozenset().union(*(these for these, end in ends_of.items() if end <= start)))
        for names, start in zip(groups.values(), starts, strict=True)
    ]


class BlockRun:
    """All batches on their way through one block, halted wherever the inputs of a group of linears are known.

    True-sequential calibration quantizes q, k and v before o sees its inputs, so a block has to be run in stages. Each
    batch is a greenlet that stops in a hook on the group's first linear. With ``keep`` it stays halted there and goes
    on from there, so the block runs once per batch, at the price of the half-done batches' memory; without, every
    stage runs the block anew up to its linears.

    Args:
        module: the block, on ``device``.
        inputs: as caught by :func:`capture_block_inputs`; :meth:`finish` replaces its hidden states.
        stops: names, relative to the block, of one linear per stage, in execution order.
        batches: which batches to run; all when None.
        unread: per stage, the :attr:`LinearGroup.unread` of its group: halted frames still refer to those tensors, so
            with ``keep`` their memory is taken from them. After that the run must be finished, not started again.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: BlockInputs,
        index: int,
        stops: Sequence[str],
        device: torch.device,
        *,
        keep: bool,
        batches: Sequence[int] | None = None,
        unread: Sequence[Set[str]] = (),
    ) -> None:
        self._module, self._inputs, self._index, self._device, self._keep = module, inputs, index, device, keep
        self._stops, self._unread = stops, unread if keep else ()
        self._read: dict[int, dict[str, weakref.ref[Tensor]]] = {}
        self.batches = range(len(inputs.hidden)) if batches is None else batches
        self._halted: dict[int, greenlet] = {}
        self._running: set[greenlet] = set()
        self._finished: set[int] = set()
        modules = linears(module)
        self._hooks = [modules[name].register_forward_pre_hook(self._hook(i)) for i, name in enumerate(stops)]

    def __enter__(self) -> BlockRun:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._halted.values():
            run.throw(GreenletExit)
        self._halted.clear()
        self._running.clear()
        for hook in self._hooks:
            hook.remove()

    def _hook(self, stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def halt(_: nn.Module, args: tuple[Any, ...]) -> None:
            run = getcurrent()
            if run in self._running:
                run.parent.switch((stage, args[0]))

        return halt

    def _start(self, batch: int) -> greenlet:
        hidden, rest = self._inputs.hidden[batch], self._inputs.arguments[self._index][batch]
        run = greenlet(lambda: call_block(self._module, hidden, rest, self._inputs.keyword, self._device))
        self._running.add(run)
        self._read[batch] = {HIDDEN: weakref.ref(hidden)}
        return run

    def _resume(self, batch: int, run: greenlet) -> Any:
        def see(query: Tensor) -> None:
            self._read[batch][QUERY] = weakref.ref(query)

        # Not around the whole run: it would sit in the way of the calibrators' small operations.
        with CpuForward(see):
            return run.switch()

    def _release(self, stage: int, batch: int, x: Tensor) -> None:
        """Give back what this batch will not read again but for its shape; should the trace be wrong, NaN shows it."""
        read = self._read[batch]
        for name in read.keys() & self._unread[stage]:
            tensor = read.pop(name)()
            if tensor is not None:
                tensor.data = tensor.new_full((), torch.nan).expand(tensor.shape)
        read[self._stops[stage]] = weakref.ref(x)

    def inputs(self, stage: int, batch: int) -> Tensor:
        """Inputs ``(tokens, K)`` of the stage's linears for one batch; stages must be asked for in increasing order."""
        run = self._halted.pop(batch) if batch in self._halted else self._start(batch)
        while True:
            reached = self._resume(batch, run)
            if run.dead:
                raise RuntimeError(f"block {self._index} ended before its stage {stage}: it runs other than as traced")
            if reached[0] >= stage:
                break
        if self._keep:
            self._halted[batch] = run
            if self._unread:
                self._release(reached[0], batch, reached[1])
        else:
            run.throw(GreenletExit)
            self._running.discard(run)
        x: Tensor = reached[1]
        return x.reshape(-1, x.shape[-1])

    def finish(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Run each unfinished batch to the block's end, store its outputs as hidden states, and call ``after_each``."""
        for batch in self.batches:
            if batch not in self._finished:
                self.finish_batch(batch)
                after_each()

    def finish_batch(self, batch: int) -> None:
        """:meth:`finish` for one batch."""
        run = self._halted.pop(batch) if batch in self._halted else self._start(batch)
        output = None
        while not run.dead:
            output = self._resume(batch, run)
        self._running.discard(run)
        assert isinstance(output, Tensor)
        hidden = self._inputs.hidden[batch]
        if hidden.untyped_storage().nbytes() >= hidden.nbytes:
            hidden.copy_(output)  # in place: new tensors for every block fragment the heap
        else:  # given back on the way
            output = output.to(hidden)
            hidden.data = output if output.untyped_storage().nbytes() == output.nbytes else output.clone()
        self._finished.add(batch)

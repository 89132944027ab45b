"""Where a model keeps its decoder blocks. Found by structure, not by class name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Block", "block_stacks", "find_blocks", "is_encoder_decoder", "linears"]


@dataclass(frozen=True)
class Block:
    """One decoder block: its dotted name in the model and the module."""

    name: str
    module: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks, in order: the children of the outermost ``ModuleList`` holding the most linear weights.

    Of a vision-language model those of its ``language_model``; of an encoder-decoder the encoder's and then the
    decoder's, which :func:`block_stacks` tells apart.

    Raises:
        ValueError: the model has no ``ModuleList`` with linear layers in it; lists what it has.
    """
    names = [name for name, _ in model.named_modules()]
    towers = [name for name in names if name.rpartition(".")[2] == "language_model"]
    if towers:  # a vision-language model: the text tower is the decoder, however large the rest is
        return [Block(f"{towers[0]}.{b.name}", b.module) for b in find_blocks(model.get_submodule(towers[0]))]
    stacks = [f"{name}." for name in names if name.rpartition(".")[2] in ("encoder", "decoder")]
    if is_encoder_decoder(model) and len(stacks) >= 2:
        return [
            Block(f"{stack}{block.name}", block.module)
            for stack in stacks
            if not any(stack.startswith(other) for other in stacks if other != stack)
            for block in find_blocks(model.get_submodule(stack[:-1]))
        ]
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


def block_stacks(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks by the list they are in: each stack runs from its own first inputs to its last block."""
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(block.name.rpartition(".")[0], []).append(block)
    return list(stacks.values())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's configuration says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` below ``module`` by dotted name, in definition order; a shared module appears once."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}

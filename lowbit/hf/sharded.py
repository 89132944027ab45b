"""Tensor parallel loading: each rank gets its rows or columns of every packed layer, and never the rest.

With ``distributed_config=DistributedConfig(tp_size=..., tp_plan="auto")`` under ``torchrun``, transformers makes
DTensors of a model's parameters, cut column-wise along N or row-wise along K, reads of each file what this rank holds,
and puts the communication around the modules' forwards. Packed layers fit into that as they are on disk, as long as
every cut falls between words and between groups, which is checked before anything is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..experts import Experts
from ..linear import Int8Linear, QuantLinear, linear_class
from ..spec import QuantSpec

__all__ = ["ShardedLinear", "settle_shards", "sharded", "tp_size"]

_SPLITS = {
    "colwise": "rows", "colwise_rep": "rows", "colwise_gather_output": "rows",
    "rowwise": "columns", "rowwise_rep": "columns", "rowwise_split_input": "columns",
    "replicate": "nothing", "mla_kv_a_proj": "nothing",
}  # fmt: skip
"""transformers' styles, and what of a weight (N, K) they share out."""

_LARGEST_HINT = 64


def tp_size(model: PreTrainedModel) -> int:
    """Ranks that share each layer of a model that is being loaded; 1 without tensor parallelism."""
    config = getattr(model.config, "distributed_config", None)
    return getattr(config, "tp_size", None) or 1


def sharded(
    model: PreTrainedModel,
    name: str,
    n: int,
    k: int,
    spec: QuantSpec,
    *,
    bias: bool,
    dtype: torch.dtype,
    reordered: bool = False,
) -> ShardedLinear:
    """The module for the packed linear ``name`` of a model that is loaded by several ranks, on meta.

    Raises:
        ValueError: the model's plan cuts the layer where it cannot be cut, or its columns are reordered (act-order).
    """
    if reordered:
        raise ValueError(f"{name}: columns reordered by act-order (g_idx) cannot be shared out; load it by one rank")
    split, ranks = _split_of(model, name), tp_size(model)
    _check_split(name, split, n, k, spec, ranks)
    return ShardedLinear(k, n, spec, bias=bias, dtype=dtype, device="meta", split=split)


def settle_shards(model: nn.Module) -> None:
    """:meth:`ShardedLinear.settle` for all of a model."""
    for name, module in model.named_modules():
        if isinstance(module, ShardedLinear):
            try:
                module.settle()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _split_of(model: PreTrainedModel, name: str) -> str:
    """What the model's plan shares out of the linear ``name``: ``rows``, ``columns`` or ``nothing``."""
    parents = name.split(".")
    if any(isinstance(model.get_submodule(".".join(parents[:i])), Experts) for i in range(1, len(parents))):
        raise ValueError(f"{name} is a packed expert, which cannot be loaded by several ranks yet; load it by one")
    own = model.config.distributed_config.tp_plan
    plan = {**model.tp_plan, **own} if isinstance(own, dict) else model.tp_plan
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = plan.get(pattern, "replicate")
    if style not in _SPLITS:
        raise ValueError(
            f"{name} is packed, and the tensor parallel style {style!r} cannot split it; styles that can: "
            f"{', '.join(_SPLITS)}. DistributedConfig(tp_plan={{{pattern!r}: ...}}) chooses another"
        )
    return _SPLITS[style]


def _check_split(name: str, split: str, n: int, k: int, spec: QuantSpec, ranks: int) -> None:
    """Refuse a cut through a word or a group, naming the layer, what does not divide, and what would do."""
    if split == "nothing":
        return
    size, unit = (n, _row_unit(spec)) if split == "rows" else (k, _column_unit(spec))
    if size % (unit * ranks) == 0:
        return
    fitting = [count for count in range(1, _LARGEST_HINT + 1) if size % (unit * count) == 0]
    raise ValueError(
        f"{name}: its {size} {split} cannot be shared out over tp_size {ranks}, because {spec.label()} can be cut at "
        f"multiples of {unit} only; for this layer tp_size may be {fitting or [1]}"
    )


def _row_unit(spec: QuantSpec) -> int:
    """Zero points of consecutive rows share a word."""
    return 1 if spec.symmetric or spec.activations is not None else 32 // spec.bits


def _column_unit(spec: QuantSpec) -> int:
    """Codes of consecutive columns share a word, and those of a group their scale."""
    if spec.activations is not None:
        return 1
    return math.lcm(32 // spec.bits, max(1, spec.group_size))


class ShardedLinear(nn.Module):
    """One rank's part of a :class:`~lowbit.linear.QuantLinear` or :class:`~lowbit.linear.Int8Linear`.

    Until it is loaded it has the parameters of the whole layer, for transformers to make DTensors of; what every rank
    needs whole is a buffer, which transformers leaves alone. :meth:`settle` then makes an ordinary packed linear of the
    local tensors. The bias stays where transformers looks for it. ``state_dict`` has DTensors again, of which
    ``save_pretrained`` gathers the whole layer.

    Args:
        in_features, out_features, spec, bias, dtype, device: of the whole layer, as for the two classes.
        split: ``rows``, ``columns`` or ``nothing``, whatever the model's plan shares out.
    """

    _hf_quantized_needs_local_tp = True  # forward is called with this rank's tensors instead of DTensors

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        split: str = "nothing",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec, self.split = in_features, out_features, spec, split
        whole = linear_class(spec)(in_features, out_features, spec, bias=bias, dtype=dtype, device=device)
        for name, tensor in whole.named_parameters():
            per_row = split == "columns" and name != "bias" and tensor.shape[-1] == 1
            if per_row or name in ("weight_shape", "input_scale"):
                self.register_buffer(name, tensor.data)
            else:
                self.register_parameter(name, nn.Parameter(tensor.data, requires_grad=False))
        if not bias:
            self.register_parameter("bias", None)
        self._cuts: dict[str, tuple[Any, ...]] = {}  # mesh, placements, shape and stride of what was a DTensor
        self._part: list[QuantLinear | Int8Linear] = []  # in a list: a submodule would lengthen the names

    @property
    def part(self) -> QuantLinear | Int8Linear:
        """This rank's rows and columns as a linear of their own, without the bias."""
        if not self._part:
            raise RuntimeError("a ShardedLinear has its part only after settle()")
        return self._part[0]

    def settle(self) -> None:
        """Once loaded, take the local tensors over and put them into the layout this device is fastest with.

        Raises:
            ValueError: scales that were finite and not zero in the file are not in the dtype they were loaded in.
        """
        local: dict[str, Tensor] = {}
        for tensors in (self._parameters, self._buffers):
            for name in [name for name, tensor in tensors.items() if tensor is not None and name != "bias"]:
                tensor = tensors.pop(name)
                assert tensor is not None
                if isinstance(tensor, DTensor):
                    self._cuts[name] = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
                    tensor = tensor.to_local()
                local[name] = tensor.detach()
        scales = local["weight_scale"]
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise ValueError(f"its scales do not fit into {scales.dtype}; load it with dtype auto or float32")
        n, k = self._local_shape(local)
        part = linear_class(self.spec)(k, n, self.spec, bias=False, dtype=scales.dtype, device="meta")
        local["weight_shape"] = torch.tensor([n, k], device=scales.device)
        for name, expected in list(part.named_parameters()):
            assert local[name].shape == expected.shape, f"{name} {tuple(local[name].shape)}, {tuple(expected.shape)}"
            setattr(part, name, nn.Parameter(local[name].contiguous(), requires_grad=False))
        self._part = [part.repack()]
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _local_shape(self, local: dict[str, Tensor]) -> tuple[int, int]:
        key = "weight" if self.spec.activations is not None else "weight_packed"
        ranks = self._cuts[key][0].size() if key in self._cuts else 1
        return local[key].shape[0], self.in_features // (ranks if self.split == "columns" else 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., K)`` of this rank's K -> ``(..., N)`` of its N, in x's dtype; of columns, a sum's summand."""
        return self.part.product(x, self.bias)

    def extra_repr(self) -> str:
        """Sizes of the whole layer and what of it is shared out."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.spec.label()}, sharing out {self.split}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in self._part:
            part._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part in self._part:
            for name, tensor in part.state_dict().items():
                if name == "weight_shape":
                    tensor = torch.tensor([self.out_features, self.in_features], device=tensor.device)
                elif name in self._cuts:
                    mesh, placements, shape, stride = self._cuts[name]
                    tensor = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)
                destination[prefix + name] = tensor

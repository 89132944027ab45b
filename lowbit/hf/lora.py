"""LoRA adapters of PEFT on packed layers. Imports peft, so it is imported only where that is installed.

PEFT chooses the LoRA layer for a module in a chain of functions, the last of which knows torch's own layers. A packed
layer is none of them, so :func:`install` puts a function of ours before that last one. :data:`LORA_LAYERS` does
the same for a single LoraConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import model as peft_lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..linear import Int8Linear, QuantLinear

__all__ = ["LORA_LAYERS", "PackedLoraLinear", "install", "uninstall"]

_PACKED = (QuantLinear, Int8Linear)
_theirs: Callable[..., Any] = peft_lora.dispatch_default


def install() -> None:
    """Let PEFT put LoRA adapters on packed layers. Idempotent."""
    peft_lora.dispatch_default = _dispatch


def uninstall() -> None:
    """Undo :func:`install`; adapters that exist keep working."""
    peft_lora.dispatch_default = _theirs


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, _PACKED) and options.get("parameter_name") is None:
        return PackedLoraLinear(target, adapter_name, config, **options)
    module: nn.Module | None = _theirs(target, adapter_name, config=config, **options)
    return module


class PackedLoraLinear(nn.Module, LoraLayer):
    """A packed layer, frozen, and the sum of its active adapters: ``base(x) + B(A(dropout(x))) * scaling``.

    Args:
        base_layer: a QuantLinear or an Int8Linear.
        adapter_name: of the first adapter.
        config: its LoraConfig.
        r: rank.
        lora_alpha: numerator of the scaling.
        options: of PEFT, not used.

    Raises:
        ValueError: a kind of LoRA that needs the dense weight: DoRA, VeLoRA, or an initialisation from the weight.
    """

    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        """Add an adapter; see the class for what is refused."""
        if config.use_dora or getattr(config, "velora_config", None) is not None:
            raise ValueError(f"adapter {adapter_name!r}: DoRA and VeLoRA need a dense weight, a packed layer has none")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"adapter {adapter_name!r}: on a packed layer init_lora_weights must be True, False or 'gaussian', "
                f"got {config.init_lora_weights!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x (..., K)`` -> ``(..., N)`` in the base layer's dtype."""
        layer: Any = self  # LoraLayer has no annotations, and a module's attributes are taken for tensors
        layer._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:  # another adapter for each sample
            mixed: Tensor = layer._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
            return mixed
        result: Tensor = layer.base_layer(x)
        if layer.disable_adapters:
            return result
        dtype = result.dtype
        for name in layer.active_adapters:
            if name in layer.lora_A:
                down, up = layer.lora_A[name], layer.lora_B[name]
                cast = layer._cast_input_dtype(x, down.weight.dtype)
                result = result + up(down(layer.lora_dropout[name](cast))) * layer.scaling[name]
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what an adapter adds is smaller than the steps of the packed grid.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "adapters cannot be merged into packed weights without losing them to rounding; run them unmerged, or "
            "merge into the dense model of `lowbit convert IN OUT --to dense` and quantize that"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, _PACKED)
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        assert isinstance(base_layer, _PACKED)
        return base_layer.weight_scale.device, base_layer.weight_scale.dtype

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


LORA_LAYERS: dict[type[nn.Module], type[nn.Module]] = dict.fromkeys(_PACKED, PackedLoraLinear)
"""For PEFT's own extension point, one LoraConfig at a time: ``config._register_custom_module(LORA_LAYERS)``. PEFT does
not keep it with a saved adapter, which is why :func:`install` exists."""

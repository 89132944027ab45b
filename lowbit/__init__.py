"""lowbit: quantize a language model in one call, keep its weights packed, measure what was lost.

Importing this package imports nothing heavy: the public names below load their modules on first use.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .affine import QuantizedWeight
    from .convert import convert
    from .evaluate import evaluate
    from .hf import LowbitConfig, install, load, uninstall
    from .inspection import inspect_checkpoint as inspect
    from .linear import Int8Linear, QuantLinear
    from .ops import set_batch_invariant
    from .quantize import quantize, quantize_
    from .spec import ActivationSpec, QuantSpec

__all__ = [
    "ActivationSpec",
    "Int8Linear",
    "LowbitConfig",
    "QuantLinear",
    "QuantSpec",
    "QuantizedWeight",
    "__version__",
    "convert",
    "evaluate",
    "inspect",
    "install",
    "load",
    "quantize",
    "quantize_",
    "set_batch_invariant",
    "uninstall",
]

__version__ = "0.1.0"

_HOME = {
    "ActivationSpec": ("spec", "ActivationSpec"),
    "Int8Linear": ("linear", "Int8Linear"),
    "LowbitConfig": ("hf", "LowbitConfig"),
    "QuantLinear": ("linear", "QuantLinear"),
    "QuantSpec": ("spec", "QuantSpec"),
    "QuantizedWeight": ("affine", "QuantizedWeight"),
    "convert": ("convert", "convert"),
    "evaluate": ("evaluate", "evaluate"),
    "inspect": ("inspection", "inspect_checkpoint"),
    "install": ("hf", "install"),
    "load": ("hf", "load"),
    "quantize": ("quantize", "quantize"),
    "quantize_": ("quantize", "quantize_"),
    "set_batch_invariant": ("ops", "set_batch_invariant"),
    "uninstall": ("hf", "uninstall"),
}


class _Package(types.ModuleType):
    """Keeps ``lowbit.quantize`` and ``lowbit.evaluate`` the functions, whoever imports their modules first.

    The import system binds a submodule in its package under the submodule's name. Here that name is the public
    function's; the module stays reachable as ``from lowbit.evaluate import ...`` and through ``sys.modules``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        home, attribute = _HOME.get(name, (None, ""))
        if isinstance(value, types.ModuleType) and value.__name__ == f"{__name__}.{home}":
            value = getattr(value, attribute)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    home, attribute = _HOME[name]
    value = getattr(importlib.import_module(f"{__name__}.{home}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

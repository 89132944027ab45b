"""The caller's modes and defaults of torch, which must not change what lowbit computes and reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["check_weights_can_change", "own_modes"]

_COUNTING = threading.Lock()
_inside = 0
_callers_dtype = torch.float32


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave autocast, inference mode, and a default dtype or device of the caller's while open; also a decorator.

    Autocast would compute the sums of calibration in half precision. Tensors made in inference mode keep no count of
    their changes, which calibration reads where blocks share what they compute. A default dtype is that of every tensor
    made without one. safetensors reads files onto the default device.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # not otherwise: it would switch gradients on under torch.no_grad
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":  # not otherwise: it makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_own_default_dtype())
        yield


@contextmanager
def _own_default_dtype() -> Iterator[None]:
    """The default dtype is the process's, and transformers changes it while it loads: a thread that comes meanwhile
    would take that for the caller's, and leave it behind. So the first thread in sets it and the last one out sets it
    back."""
    global _inside, _callers_dtype
    with _COUNTING:
        if _inside == 0:
            _callers_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        yield
    finally:
        with _COUNTING:
            _inside -= 1
            if _inside == 0 and _callers_dtype != torch.float32:  # what another thread may have set meanwhile stays
                torch.set_default_dtype(_callers_dtype)


def check_weights_can_change(model: nn.Module) -> None:
    """ValueError: a weight was made under ``torch.inference_mode``, outside of which it cannot be changed."""
    for name, weight in model.named_parameters():
        if weight.is_inference():
            raise ValueError(
                f"the model's weight {name} was made under torch.inference_mode, where tensors cannot be changed; "
                f"make or load the model outside of it"
            )

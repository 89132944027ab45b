"""The caller's modes and defaults of torch, which must not change what lowbit computes and reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["check_weights_can_change", "own_modes"]


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave autocast, inference mode, and a default dtype or device of the caller's while open; also a decorator.

    Autocast would compute the sums of calibration in half precision. Tensors made in inference mode keep no count of
    their changes, which calibration reads where blocks share what they compute. A default dtype is that of every tensor
    made without one; it is the process's and not a thread's. safetensors reads files onto the default device.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # not otherwise: it would switch gradients on under torch.no_grad
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":  # not otherwise: it makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def check_weights_can_change(model: nn.Module) -> None:
    """ValueError: a weight was made under ``torch.inference_mode``, outside of which it cannot be changed."""
    for name, weight in model.named_parameters():
        if weight.is_inference():
            raise ValueError(
                f"the model's weight {name} was made under torch.inference_mode, where tensors cannot be changed; "
                f"make or load the model outside of it"
            )

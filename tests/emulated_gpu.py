"""The GPU of fake_gpu.py with the compiled kernels run: every launch's PTX, instruction by instruction, on the CPU.

    with emulated_gpu(arch=90, seed=0, late=True):
        out = packed(x, tile=tile)               # host code, Triton's compiler, and the kernel itself

What this shows and a GPU need not be asked: that the kernel computes what it should, in bfloat16 and with its inline
assembly, that it stays inside its tensors, that no two warps meet in shared memory without a barrier, that every copy
and product is waited for, that nothing deadlocks. What it does not show: what ptxas makes of the PTX, races between
programs in global memory (they run one after the other, in a random order), and speed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from fake_gpu import FakeGpu, fake_gpu
from ptx_machine import Machine
from ptx_memory import GlobalMemory, TensorMap

__all__ = ["EmulatedGpu", "emulated_gpu"]

COMPILED = Path(__file__).parent.parent / ".compile_cache" / "triton"
_compile = triton.compile
_machines: dict[str, tuple[Machine, Any]] = {}


class EmulatedGpu(FakeGpu):
    """Runs launches on :class:`ptx_machine.Machine`.

    Attributes:
        order: decides which warp and which program goes on.
        late: whether copies and products happen as late as they may.
        counts: by kernel and kind of access to shared memory, passes over its banks and how few could do.
    """

    def __init__(self, arch: int, seed: int, late: bool) -> None:
        super().__init__(arch, "emulated")
        self.order, self.late = random.Random(seed), late
        self.counts: dict[str, dict[str, tuple[int, int]]] = {}

    def lower(self, src: Any, target: Any, backend: Any, parsed: Any) -> None:
        """Nothing: a launch compiles."""

    def act(self, src: Any, options: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        """Compile the launch's kernel and run its programs."""
        machine, metadata = self._machine(src, options)
        memory, extents, parameters = GlobalMemory(), [], []
        maps = iter(metadata.tensordesc_meta or ())
        for name, kind in src.signature.items():
            value = arguments[name]
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                extents.append(_extent(value.base))
                parameters += [_tensor_map(value, next(maps)), *value.shape, *value.strides]
            elif kind.startswith("*"):
                extents.append(_extent(value))
                parameters.append(value.data_ptr())
            else:
                parameters.append(int(value))
        memory.allow(extents)
        counts = self.counts.setdefault(src.fn.__name__, {})
        machine.run(grid, parameters, memory, order=self.order, late=self.late, counts=counts)

    def _machine(self, src: Any, options: Any) -> tuple[Machine, Any]:
        target = GPUTarget("cuda", self.arch, 32)
        key = f"{src.hash()} {self.arch} {options.hash()}"
        if key not in _machines:
            # only the PTX is wanted; what the assembler says to it is the compile gate's business
            with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):
                triton.knobs.cache.dir = str(COMPILED)
                compiled = _compile(src, target=target, options=options.__dict__)
            _machines[key] = Machine(compiled.asm["ptx"], compiled.metadata.shared), compiled.metadata
        return _machines[key]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from a tensor's first to behind its last element."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensor_map(descriptor: Any, metadata: dict[str, Any]) -> TensorMap:
    swizzle = (0, 32, 64, 128)[metadata["swizzle"]]
    return TensorMap(
        descriptor.base.data_ptr(), descriptor.shape, descriptor.strides, metadata["block_size"],
        metadata["elem_size"], swizzle,
    )  # fmt: skip


@contextlib.contextmanager
def emulated_gpu(arch: int = 90, seed: int = 0, late: bool = True) -> Iterator[EmulatedGpu]:
    """As :func:`fake_gpu.fake_gpu`, with the kernels run."""
    with fake_gpu(arch, f"emulated sm_{arch}", gpu=EmulatedGpu(arch, seed, late)) as gpu:
        assert isinstance(gpu, EmulatedGpu)
        yield gpu


def main() -> int:
    """scripts/gpu_check's correctness suite on the emulated GPU: ``python tests/emulated_gpu.py [--arch 90] ...``."""
    import argparse
    import sys

    sys.path[:0] = [
        str(Path(__file__).parent.parent / "eval" / "gpu_check"),
        str(Path(__file__).parent.parent / "eval"),
    ]
    import check_correct
    import check_machinery
    import check_main

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, default=90, choices=(80, 86, 89, 90, 120))
    parser.add_argument("--seed", type=int, default=0, help="decides which warp goes on when several can")
    parser.add_argument("--early", action="store_true", help="copies and products at once, not as late as they may")
    parser.add_argument("--runs", type=int, default=2, help="of each case whose runs must agree bit for bit")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="gpu_check's; what is there is not done again")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulated_gpu(options.arch, options.seed, not options.early))
        stack.enter_context(mock.patch.object(check_machinery, "compiled_fullgraph", lambda *_: 0.0))
        stack.enter_context(mock.patch.object(check_correct, "RUNS", options.runs))
        return check_main.main(["--tiny", "--out", options.out, "--peers", "none", "--parts", "correct"])


if __name__ == "__main__":
    raise SystemExit(main())

"""A GPU made of CPU memory: host code written for CUDA runs on it, launches included, where there is no GPU.

    with fake_gpu() as gpu:
        out = weight_only_matmul(torch.randn(m, k, device="cuda"), ...)
        gpu.launches                      # what was launched: kernel, grid, types of the arguments, constants, options

Tensors "on cuda" are CPU tensors that claim another device (:class:`GpuTensor`). Triton's own runtime binds and
specialises the arguments of a launch, and the kernel's source is lowered with exactly these to Triton's IR, where a
wrong argument, constant or type shows. Then the launch is not run but *acted*: its arguments are checked as the driver
would check them, and a few lines of plain torch write what the kernel is documented to write (fake_kernels.py). So
arguments that are swapped, missing or too small give a wrong result or an error here as well.

It shows nothing about the kernels themselves; emulated_gpu.py runs what they were compiled to.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler

from fake_kernels import act
from lowbit_kernels.releases import release

__all__ = ["FakeGpu", "GpuTensor", "Launch", "fake_gpu"]

GPU = torch.device("cuda", 0)
TARGETED = release() >= (3, 5)
"""Whether lowering is told the target, as from Triton 3.5 on."""
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)
"""CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""
MOST_PROGRAMS = 2**31 - 1
"""Triton's launcher multiplies the sizes of the grid in an int, and launches nothing where that is not positive."""


class GpuTensor(torch.Tensor):
    """A CPU tensor that says it is on cuda:0. Whatever torch computes of it is one too."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


def _is_gpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


class _Placing(TorchFunctionMode):
    """Makes tensors where they are asked for, refuses operators between two devices, calls lowbit's for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "lowbit" and isinstance(args[0], GpuTensor):
            with self:  # what it calls is Python again, and torch takes a mode away while that handles a call
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        if name in ("cuda", "cpu"):
            return self._moved(func, args[0], name == "cuda")
        if name == "to" and (_is_gpu(kwargs.get("device")) or any(map(_is_gpu, args[1:]))):
            args = tuple(torch.device("cpu") if _is_gpu(value) else value for value in args)
            kwargs = {key: torch.device("cpu") if _is_gpu(value) else value for key, value in kwargs.items()}
            return self._moved(func, args[0], True, *args[1:], **kwargs)
        if _is_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(GpuTensor)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        mixed = len({isinstance(tensor, GpuTensor) for tensor in tensors if tensor.ndim}) > 1
        if mixed and name != "copy_" and not name.startswith("_"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        return func(*args, **kwargs)

    @staticmethod
    def _moved(func: Any, tensor: torch.Tensor, to_gpu: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = tensor.as_subclass(torch.Tensor)
        out = func(plain, *args, **kwargs) if args or kwargs else plain
        out = out.clone() if isinstance(tensor, GpuTensor) is not to_gpu and out is plain else out
        return out.as_subclass(GpuTensor) if to_gpu else out


@dataclass(frozen=True)
class Launch:
    """One launch: ``types`` as Triton specialised them, ``constants`` by name, ``options`` of the compiler."""

    kernel: str
    grid: tuple[int, int, int]
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    options: dict[str, Any]


class FakeGpu:
    """What stands for the driver: Triton asks it for the device, and launches end here.

    Attributes:
        arch: 10 * major + minor.
        launches: in order.
        lowered: how many different kernels were lowered to Triton's IR.
    """

    def __init__(self, arch: int, name: str) -> None:
        self.arch, self.name = arch, name
        self.launches: list[Launch] = []
        self.kernels: set[Any] = set()
        self.lowered = 0
        self.capture: list[Callable[[], None]] | None = None
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232_448})

    def act(self, src: Any, options: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        """What a launch writes; emulated_gpu.py runs the compiled kernel instead."""
        act(src.fn.__name__, grid, arguments)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def compile(self, src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> Any:
        """Parse the options and lower; what comes back can be launched."""
        backend = compiler.make_backend(target)
        parsed = backend.parse_options(dict(options or {}, **src.parse_options()))
        self.lower(src, target, backend, parsed)
        self.kernels.add(src.fn)
        self.lowered += 1
        return _Lowered(self, src, parsed)

    def lower(self, src: Any, target: Any, backend: Any, parsed: Any) -> None:
        """To Triton's IR (Gluon's: to its GPU dialect), and no further."""
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        known = (target,) if TARGETED else ()
        with _no_modes():
            src.make_ir(*known, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


class _Lowered:
    """A kernel that Triton's runtime can launch."""

    function = packed_metadata = None

    def __init__(self, gpu: FakeGpu, src: Any, options: Any) -> None:
        self.gpu, self.src, self.options = gpu, src, options
        names = src.fn.arg_names
        self.constants = {names[path[0]]: value for path, value in src.constants.items()}
        self.aligned = frozenset(names[path[0]] for path, attrs in src.attrs.items() if attrs)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        grid, arguments = (x, y, z), dict(zip(self.src.fn.arg_names, rest[6:], strict=True))
        _check_grid(self.src.fn.__name__, grid)
        _check_arguments(self.src, arguments)
        self.gpu.launches.append(
            Launch(
                self.src.fn.__name__, grid, dict(self.src.signature), self.constants, self.aligned,
                {name: getattr(self.options, name) for name in ("num_warps", "num_stages", "launch_pdl")},
            )
        )  # fmt: skip
        with _no_modes():
            self.gpu.act(self.src, self.options, grid, arguments)
        if self.gpu.capture is not None:
            self.gpu.capture.append(lambda: self.gpu.act(self.src, self.options, grid, arguments))


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Without the placing of tensors and the capture: what is acted is the GPU's business."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        yield


def _check_grid(kernel: str, grid: tuple[int, int, int]) -> None:
    for size, most in zip(grid, LARGEST_GRID, strict=True):
        if type(size) is not int or not 1 <= size <= most:
            raise AssertionError(f"{kernel}: the grid {grid} is not of integers from 1 to {LARGEST_GRID}")
    if grid[0] * grid[1] * grid[2] > MOST_PROGRAMS:
        raise AssertionError(f"{kernel}: a grid of {grid} is launched as nothing")


def _check_arguments(src: Any, arguments: dict[str, Any]) -> None:
    for name, kind in src.signature.items():
        value = arguments[name]
        if isinstance(kind, str) and kind.startswith("*") and not isinstance(value, GpuTensor):
            raise AssertionError(f"{src.fn.__name__}: {name} is not on the GPU")
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            _check_descriptor(f"{src.fn.__name__}: {name}", value)


def _check_descriptor(where: str, descriptor: Any) -> None:
    """CUDA Driver API, cuTensorMapEncodeTiled, for tiles without interleaving."""
    base, size = descriptor.base, descriptor.base.element_size()
    swizzle = descriptor.layout.swizzle_byte_width
    if not isinstance(base, GpuTensor) or base.data_ptr() % 16 or not 1 <= base.ndim <= 5:
        raise AssertionError(f"{where} must be on the GPU, at 16 bytes, with 1 to 5 dimensions")
    if any(not 1 <= extent <= 2**32 for extent in base.shape):
        raise AssertionError(f"{where}: extents {tuple(base.shape)} must be 1 to 2**32")
    strides = tuple(descriptor.strides)
    if any(stride * size % 16 or stride * size >= 2**40 for stride in strides[:-1]) or strides[-1] != 1:
        raise AssertionError(f"{where}: strides {strides} must be multiples of 16 bytes below 2**40, the last 1")
    for extent, own, stride in zip(base.shape, base.stride(), strides, strict=True):
        if extent > 1 and own != stride:
            raise AssertionError(f"{where}: strides {strides} of a tensor whose are {base.stride()}")
    if tuple(descriptor.shape) != tuple(base.shape):
        raise AssertionError(f"{where}: shape {descriptor.shape} of a tensor of {tuple(base.shape)}")
    inner = descriptor.block_shape[-1] * size
    if inner % 16 or any(extent > 256 for extent in descriptor.block_shape):
        raise AssertionError(f"{where}: box {descriptor.block_shape} must be at most 256 wide and of 16-byte rows")
    if not swizzle and inner % 128:
        raise AssertionError(f"{where}: boxes of {inner} bytes, one after the other, do not all begin at 128 bytes")


# --- torch.cuda


class _Graph:
    """Replays what was launched and computed while it was captured, into the same tensors."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def replay(self) -> None:
        with _no_modes():
            for step in self.steps:
                step()


class _Recording(TorchDispatchMode):
    def __init__(self, steps: list[Callable[[], None]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device, which a graph cannot capture")
        out = func(*args, **kwargs)
        views = any(argument.alias_info is not None for argument in func._schema.arguments)
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
        elif isinstance(out, torch.Tensor) and not views and "empty" not in func.__name__:
            self.steps.append(lambda: out.copy_(func(*args, **kwargs)))
        return out


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: _Event) -> float:
        return max(1e-6, 1e3 * (other.at - self.at))


@contextlib.contextmanager
def fake_gpu(
    arch: int = 90, name: str = "NVIDIA H200", memory: int = 64 << 20, gpu: FakeGpu | None = None
) -> Iterator[FakeGpu]:
    """Within it torch.cuda is available and Triton launches on a :class:`FakeGpu`; caches of both are left clean."""
    gpu = gpu or FakeGpu(arch, name)

    @contextlib.contextmanager
    def graph(target: _Graph, **_: Any) -> Iterator[None]:
        gpu.capture = target.steps
        try:
            with _Recording(target.steps):
                yield
        finally:
            gpu.capture = None

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: divmod(arch, 10),
        "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132, name=name),
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (memory, memory),
        "is_current_stream_capturing": lambda: gpu.capture is not None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "CUDAGraph": _Graph,
        "graph": graph,
        "Event": _Event,
        "Stream": mock.MagicMock,
        "current_stream": lambda device=None: mock.MagicMock(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for attribute, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, answer))
        stack.enter_context(mock.patch.object(triton.compiler, "compile", gpu.compile))
        stack.callback(_clean, gpu)
        _clean(gpu)
        triton.runtime.driver.set_active(gpu)
        stack.callback(triton.runtime.driver.set_active, None)
        stack.enter_context(_Placing())
        yield gpu


def _clean(gpu: FakeGpu) -> None:
    """Forget what lowbit_kernels cached of a device (answers, counters), and Triton (kernels that can be launched)."""
    from lowbit_kernels import epilogue, scaled, weight_only

    for function in (weight_only.device_arch, weight_only.gpu_name, scaled.multiprocessors):
        function.cache_clear()
    epilogue._counters.clear()
    epilogue._next.clear()
    for kernel in gpu.kernels:
        kernel.device_caches.clear()

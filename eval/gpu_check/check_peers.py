"""Other libraries' kernels for the same layer, where they are installed, each with a weight in its own layout.

A peer makes one callable per copy of the weight, x -> result. Its weight is random too: the peers are timed, and how
well they round is not judged here. ``Unavailable`` says why one is not measured; the report repeats it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.tiles import Problem

__all__ = ["PEERS", "Unavailable", "peer_version", "prepare"]

Call = Callable[[Tensor], Tensor]


class Unavailable(RuntimeError):
    """The peer cannot run here, or not this problem."""


def aten_int4(problem: Problem, copies: int) -> list[Call]:
    """``aten._weight_int4pack_mm`` (tinygemm): bf16, groups of 32 to 256."""
    if problem.bits != 4 or problem.dtype != torch.bfloat16 or problem.group_size == -1:
        raise Unavailable("4 bits, bfloat16 and groups only")
    if problem.m > 256:
        raise Unavailable("made for few tokens; left out above 256, where it takes many times the dense layer's time")

    def make() -> Call:
        codes = torch.randint(0, 256, (problem.n, problem.k // 2), dtype=torch.uint8, device="cuda")
        weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        groups = problem.k // problem.group_size
        scales = torch.rand(groups, problem.n, 2, device="cuda").to(torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, problem.group_size, scales)

    return [make() for _ in range(copies)]


def aten_int8(problem: Problem, copies: int) -> list[Call]:
    """``aten._weight_int8pack_mm``: one scale per row."""
    if problem.bits != 8 or problem.dtype != torch.bfloat16:
        raise Unavailable("8 bits and bfloat16 only")
    if problem.m > 64:
        raise Unavailable("made for few tokens; left out above 64")

    def make() -> Call:
        weight = torch.randint(-128, 128, (problem.n, problem.k), dtype=torch.int8, device="cuda")
        scales = torch.rand(problem.n, device="cuda").to(torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scales)

    return [make() for _ in range(copies)]


def humming(problem: Problem, copies: int) -> list[Call]:
    """humming-kernels' HummingLayer, weight-only, its own heuristics (PyPI humming-kernels, README)."""
    module = _import("humming.layer", "humming-kernels")

    def make() -> Call:
        config: dict[str, Any] = {"dtype": f"uint{problem.bits}"}
        if problem.group_size != -1:
            config["group_size"] = problem.group_size
        layer = module.HummingLayer(
            shape_n=problem.n, shape_k=problem.k, weight_config=config, torch_dtype=problem.dtype
        ).cuda()
        layer.load_from_unquantized(torch.randn(problem.n, problem.k, device="cuda").to(problem.dtype))
        layer.transform()
        return lambda x: layer(x)

    return [make() for _ in range(copies)]


def gemlite(problem: Problem, copies: int) -> list[Call]:
    """gemlite's GemLiteLinear; it autotunes each shape at its first call, which takes tens of seconds."""
    module = _import("gemlite", "gemlite")
    kind = {torch.bfloat16: module.DType.BF16, torch.float16: module.DType.FP16}[problem.dtype]
    group = problem.k if problem.group_size == -1 else problem.group_size

    def make() -> Call:
        layer = module.GemLiteLinear(
            problem.bits,
            group_size=group,
            in_features=problem.k,
            out_features=problem.n,
            input_dtype=kind,
            output_dtype=kind,
        )
        codes = torch.randint(0, 2**problem.bits, (problem.n, problem.k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(problem.n * problem.k // group, 1, device="cuda").to(problem.dtype)
        layer.pack(codes, scales, torch.full_like(scales, 2 ** (problem.bits - 1)), None)
        return lambda x: layer.forward(x)

    return [make() for _ in range(copies)]


def marlin(problem: Problem, copies: int) -> list[Call]:
    """IST-DASLab/marlin, fp16, built from the checkout that LOWBIT_MARLIN names."""
    if problem.bits != 4 or problem.group_size not in (-1, 128) or problem.n % 256 or problem.k % 128:
        raise Unavailable("4 bits, groups of 128 or the row, N a multiple of 256 and K of 128 only")
    module = _built_marlin()
    groups = 1 if problem.group_size == -1 else problem.k // 128
    half = torch.randn(problem.m, problem.k, device="cuda").half()  # a conversion in each call would be timed

    def make() -> Call:
        shape = (problem.k // 16, problem.n * 2)
        weight = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")
        scales = torch.rand(groups, problem.n, device="cuda").half()
        workspace = torch.zeros(problem.n // 128 * 16, dtype=torch.int32, device="cuda")

        def call(_: Tensor) -> Tensor:
            out = torch.empty(problem.m, problem.n, dtype=torch.float16, device="cuda")
            module.mul(half, weight, out, scales, workspace, -1, -1, -1, 16)
            return out

        return call

    return [make() for _ in range(copies)]


PEERS: dict[str, Callable[[Problem, int], list[Call]]] = {
    "aten int4": aten_int4,
    "aten int8": aten_int8,
    "humming": humming,
    "gemlite": gemlite,
    "marlin": marlin,
}
"""By the name in the report. Marlin is given fp16 activations of its own, whatever the others get."""


def prepare(names: Iterable[str]) -> None:
    """Build ahead what takes minutes to build, and is no case's fault."""
    if "marlin" in names:
        with contextlib.suppress(Unavailable):
            _built_marlin()


def peer_version(name: str) -> str:
    """Version of the library behind a peer."""
    package = {"humming": "humming-kernels", "gemlite": "gemlite"}.get(name)
    if package is None:
        return f"torch {torch.__version__}" if name.startswith("aten") else os.environ.get("LOWBIT_MARLIN", "")
    return importlib.metadata.version(package)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


def _built_marlin() -> Any:
    found = _marlin_or_why_not()
    if isinstance(found, Unavailable):
        raise found
    return found


@lru_cache(maxsize=1)  # what does not build is not built again for every case
def _marlin_or_why_not() -> Any:
    folder = os.environ.get("LOWBIT_MARLIN")
    if not folder:
        return Unavailable("LOWBIT_MARLIN names no checkout of IST-DASLab/marlin")
    from torch.utils.cpp_extension import load

    sources = [str(path) for path in sorted(Path(folder, "marlin").glob("*.c*"))]
    if not sources:
        return Unavailable(f"{folder}/marlin holds no sources")
    try:
        return load("marlin_cuda", sources, extra_cuda_cflags=["-O3", "--expt-relaxed-constexpr"])
    except Exception as error:  # no compiler, no ninja, another CUDA: whatever it is, the report says it
        return Unavailable(f"Marlin does not build: {str(error)[-200:]}")

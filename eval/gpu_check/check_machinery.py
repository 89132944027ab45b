"""Checks that need a GPU: CUDA graphs, torch.compile, tensors of more than 2**31 elements, the sanitizer."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from check_layers import random_packed, reference, relative_rms

from lowbit_kernels.int8_tiles import HOPPER_TILES
from lowbit_kernels.tiles import FAMILIES, HOPPER, Tile

if TYPE_CHECKING:
    from check_correct import Check  # which uses this module

__all__ = ["captured", "compiled_fullgraph", "far_offsets", "sanitize", "sanitized_checks", "sanitized_launches"]

SANITIZE_S = 100


class _Wrong(AssertionError):
    pass


def captured(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> float:
    """A captured call gives the same bits as a plain one, on replay after replay and with new input."""
    worst, size = 0.0, 256 if tiny else 4096
    for m in (1, 64, 1000):
        packed = random_packed(size, size, 4, 128, dtype, device, asymmetric=True)
        x = torch.randn(m, size, device=device).to(dtype)
        packed(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packed(x)
        for _ in range(3):
            x.normal_()
            out.fill_(float("nan"))
            graph.replay()
            if not torch.equal(out, packed(x)):
                raise _Wrong(f"M = {m}: a replayed graph gave other bits than the call")
        worst = max(worst, relative_rms(out, reference(x, packed)))
    return worst


def compiled_fullgraph(device: torch.device, dtype: torch.dtype) -> float:
    """A module of QuantLinears compiles without a graph break and gives what it gives eagerly."""
    from lowbit.affine import QuantizedWeight
    from lowbit.linear import QuantLinear
    from lowbit.spec import QuantSpec

    def linear(n: int, k: int) -> QuantLinear:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = (0.005 + 0.01 * torch.rand(n, k // 128)).to(dtype)
        return (
            QuantLinear.from_quantized(QuantizedWeight(codes, scales, None, QuantSpec(4, 128, True)))
            .to(device)
            .repack()
        )

    model = torch.nn.Sequential(linear(1024, 512), torch.nn.GELU(), linear(512, 1024))
    compiled = torch.compile(model, fullgraph=True)
    worst = 0.0
    with torch.inference_mode():
        for m in (1, 16, 33):
            x = torch.randn(m, 512, device=device).to(dtype)
            expected = model(x).double()
            error = relative_rms(compiled(x), expected)
            if not error <= 1e-2:  # the compiler may keep GELU's result wider than its eager kernel does
                raise _Wrong(f"M = {m}: the compiled model differs from the eager one by {error:.2e}")
            worst = max(worst, error)
    return worst


def far_offsets(device: torch.device, dtype: torch.dtype) -> float:
    """Rows of x and of the result that lie more than 2**31 elements in."""
    m, n, k = 70_001, 32_768, 64
    needed = 3 * m * n * 2
    if torch.cuda.mem_get_info()[0] < needed:
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB of free GPU memory: not checked")
    packed = random_packed(n, k, 4, 64, dtype, device)
    x = torch.randn(m, k, device=device).to(dtype)
    expected, worst = reference(x[-7:], packed), 0.0
    # what the dispatcher takes, cuBLAS for so many tokens, and a fused one
    for tile in (None, Tile("triton", 16, 64, 1, 4, 3)):
        error = relative_rms(packed(x, tile=tile)[-7:], expected)
        if not error <= 3e-3:  # wrong offsets are off by more than everything; roundings are judged elsewhere
            raise _Wrong(f"{tile}: the last rows of a result of {m * n} elements are off by {error:.2e}")
        worst = max(worst, error)
    return worst


def sanitize(tool: str, without: Sequence[str] = (), seconds: float = SANITIZE_S) -> tuple[bool, str]:
    """Run small launches under compute-sanitizer: whether it reports no error, and a sentence about the outcome.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``seconds``.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return True, "compute-sanitizer is not installed: not run"
    main = Path(__file__).with_name("check_main.py")
    # torch's probing for entry points of the driver that are not there is no error of anybody's
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [program, "--tool", tool, "--error-exitcode", "66", *quiet]
    command += [sys.executable, str(main), "--sanitized-launches"]
    command += [f"--without={','.join(without)}"] if without else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ.copy())
    text = done.stdout + done.stderr
    if done.returncode == 66 or ("ERROR SUMMARY: 0 errors" not in text and "ERROR SUMMARY" in text):
        return False, f"{tool}: {text[-1500:]}"
    if done.returncode != 0:
        return True, f"{tool}: could not run here (exit {done.returncode}): {text.strip()[-200:]}"
    return True, f"{tool}: no errors"


def sanitized_checks(device: torch.device, arch: int, without: Sequence[str] = ()) -> list[Check]:
    """The first tiny check of the experts, of W8A8 (each of its tiles in Gluon), and of overlapping launches each."""
    from check_correct import HALF
    from check_grouped import grouped_checks
    from check_int8 import int8_checks, int8_hopper_checks
    from check_overlap import overlap_checks

    found = [*itertools.islice(grouped_checks(device, (HALF,), arch, tiny=True), 1)]
    found += itertools.islice(int8_checks(device, (HALF,), tiny=True), 1)
    if arch == 90 and "gluon" not in without:
        found += itertools.islice(int8_hopper_checks(device, (HALF,), tiny=True), len(HOPPER_TILES))
    chains = overlap_checks(device, HALF, arch, tiny=True, without=without)
    return found + [chain for chain in chains if chain.name.endswith("M = 3")]


def sanitized_launches(without: Sequence[str] = ()) -> int:
    """What runs under the sanitizer: every family on one small, odd shape, and :func:`sanitized_checks`."""
    from check_correct import family_tile

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    arch, launched = 10 * major + minor, 0
    for bits, asymmetric in ((4, True), (8, False)):
        packed = random_packed(200, 512, bits, 128, torch.float16, device, asymmetric=asymmetric)
        for family in FAMILIES:
            if family in without or (family in HOPPER and major != 9):
                continue
            for m in (1, 20):
                tile = family_tile(family, packed.problem(m), arch)
                if tile is not None:
                    packed(torch.randn(m, 512, device=device).half(), tile=tile)
                    launched += 1
    for check in sanitized_checks(device, arch, without):
        check.run()
        launched += 1
    torch.cuda.synchronize()
    print(f"{launched} launches")
    return 0

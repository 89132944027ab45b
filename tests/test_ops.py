"""lowbit::packed_linear: results against float64 in every dtype and layout, its registration, and its errors."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from helpers import MATMUL_CASES, Case, assert_close, random_quantized, tolerance
from lowbit import cpu, ops
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.cpu import CPU_INT4, CPU_INT8, DISK
from lowbit.ops import CUDA_TILES, best_layout, from_disk, packed_linear, to_disk
from lowbit.packing import pack_codes
from lowbit.spec import QuantSpec

# the disk layout on CUDA is right, and says that it is slow
pytestmark = pytest.mark.filterwarnings("ignore:a packed weight in the disk layout is unpacked:UserWarning")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Shapes that fill the blocks of aten's layouts, each from one token to past the switch to the chunked matmul.
REPACKED_CASES = [
    Case(m, n, k, bits, group, symmetric, bias)
    for bits, group, symmetric, bias, n, k in [
        (4, 128, True, False, 128, 256),
        (4, 32, False, True, 64, 160),
        (4, -1, False, False, 192, 96),
        (4, -1, True, True, 64, 512),
        (8, 64, True, True, 33, 192),
        (8, -1, True, False, 5, 96),
    ]
    for m in (1, 9, 40)
]


def disk_tensors(qw):
    zeros = None if qw.zeros is None else pack_codes(qw.zeros, qw.spec.bits, dim=0)
    return pack_codes(qw.codes, qw.spec.bits), qw.scales, zeros


def product(x, qw, bias):
    out = x.double() @ dequantize(qw, torch.float64).t()
    return out if bias is None else out + bias.double()


def arguments(case, dtype, device="cpu", scale_dtype=None):
    qw = random_quantized(case.n, case.k, case.spec, scale_dtype or dtype, device)
    x = torch.randn(case.m, case.k).to(device, dtype)
    bias = torch.randn(case.n).to(device, dtype) if case.bias else None
    return x, qw, bias


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", MATMUL_CASES, ids=str)
def test_matches_float64_in_the_disk_layout(case, dtype, device):
    x, qw, bias = arguments(case, dtype, device)
    out = packed_linear(x, *disk_tensors(qw), bias, bits=case.bits, group_size=case.group_size)
    assert out.dtype == dtype and out.device.type == device.type
    # bf16 above a few tokens also rounds the weights, once each
    assert_close(out, product(x, qw, bias), **tolerance(dtype, roundings=2, k=case.k))


def has_layout(case, dtype):
    return best_layout(
        case.n, case.k, bits=case.bits, symmetric=case.symmetric, dtype=dtype, device=torch.device("cpu")
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", REPACKED_CASES, ids=str)
def test_matches_float64_in_the_cpu_layouts(case, dtype):
    """Scales are bf16 there, activations may be anything."""
    layout = has_layout(case, torch.bfloat16)
    if layout == DISK:
        pytest.skip(
            f"torch has no fast {case.bits}-bit operator on this CPU ({torch.backends.cpu.get_cpu_capability()})"
        )
    x, qw, bias = arguments(case, dtype, scale_dtype=torch.bfloat16)
    tensors = from_disk(*disk_tensors(qw), bits=case.bits, k=case.k, layout=layout)
    out = packed_linear(x, *tensors, bias, bits=case.bits, group_size=case.group_size, layout=layout)
    # aten's 8-bit operator rounds every group's sum to bf16, then the result is rounded
    assert_close(out, product(x, qw, bias), **tolerance(dtype, roundings=2 + (layout == CPU_INT8), k=case.k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", MATMUL_CASES, ids=str)
def test_matches_float64_in_the_gpu_layout(case, dtype, device, monkeypatch):
    """The kernels on CUDA; for fp32 there, and for every dtype on the CPU, unpacked in chunks, here of a few rows."""
    monkeypatch.setattr(ops, "_CHUNK", 48 * case.k)
    x, qw, bias = arguments(case, dtype, device)
    tensors = from_disk(*disk_tensors(qw), bits=case.bits, k=case.k, layout=CUDA_TILES)
    out = packed_linear(x, *tensors, bias, bits=case.bits, group_size=case.group_size, layout=CUDA_TILES)
    assert out.dtype == dtype and out.device.type == device.type
    assert_close(out, product(x, qw, bias), **tolerance(dtype, roundings=2, k=case.k))


def test_a_mean_in_x_costs_no_accuracy():
    """(8 - zero) * scale is no bf16 number; rounding it would shift whole groups, which a mean in x adds up.

    Here zero is 3, codes are spread evenly around it, and x has mean 4: rounding 5 * scale to bf16 errs by about
    5 * 2**-10 * 128 * 4 = 2.5 scales in each of 8 groups, against a result of sqrt(1024) * 2 * 4.1 = 262 scales, which
    is 3 %. What is left is the rounding of weights and result.
    """
    case = Case(8, 64, 1024, 4, 128, False)
    scales = (0.01 + 0.02 * torch.rand(case.n, 8)).to(torch.bfloat16)
    codes = torch.randint(0, 7, (case.n, case.k), dtype=torch.uint8)
    qw = QuantizedWeight(codes, scales, torch.full((case.n, 8), 3, dtype=torch.uint8), case.spec)
    x = (4 + torch.randn(case.m, case.k)).to(torch.bfloat16)
    for layout in {DISK, has_layout(case, torch.bfloat16)}:
        tensors = from_disk(*disk_tensors(qw), bits=4, k=case.k, layout=layout)
        out = packed_linear(x, *tensors, None, bits=4, group_size=128, layout=layout)
        assert_close(out, product(x, qw, None), **tolerance(torch.bfloat16, roundings=2, k=case.k))


def test_float32_is_exact_to_float32(device):
    """The issue's figure for the packed path is 1e-3; fp32 activations stay at fp32's own rounding."""
    for case in (Case(4, 96, 1024, 4, 128, False), Case(4, 96, 1024, 8, -1, True), Case(40, 96, 1024, 2, 64, False)):
        x, qw, bias = arguments(case, torch.float32, device, scale_dtype=torch.bfloat16)
        out = packed_linear(x, *disk_tensors(qw), bias, bits=case.bits, group_size=case.group_size)
        assert_close(out, product(x, qw, bias), rms=1e-5, peak=1e-4)


@pytest.mark.parametrize("case", [c for c in REPACKED_CASES if c.m == 1], ids=str)
def test_layouts_are_undone_bit_for_bit(case):
    qw = random_quantized(case.n, case.k, case.spec, torch.bfloat16)
    disk = disk_tensors(qw)
    for layout in {has_layout(case, torch.bfloat16), CUDA_TILES}:
        moved = from_disk(*disk, bits=case.bits, k=case.k, layout=layout)
        back = to_disk(*moved, bits=case.bits, k=case.k, layout=layout)
        for a, b in zip(disk, back, strict=True):
            assert (a is None) == (b is None) and (a is None or (torch.equal(a, b) and b.is_contiguous()))


def test_the_gpu_layout_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from lowbit.ops import CUDA_TILES, from_disk, to_disk
words = torch.arange(40, dtype=torch.int32).view(5, 8)
moved = from_disk(words, torch.ones(5, 2), None, bits=4, k=64, layout=CUDA_TILES)
assert moved[0].shape == (1, 1, 16, 16) and moved[1].shape == (2, 5)
assert torch.equal(to_disk(*moved, bits=4, k=64, layout=CUDA_TILES)[0], words)
"""
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_gpu_takes_its_layout_for_16_bit_models_where_the_kernels_run(monkeypatch):
    weight_only = pytest.importorskip("lowbit_kernels.weight_only")
    cuda = torch.device("cuda", 0)
    for arch, dtypes in ((90, {torch.float16, torch.bfloat16}), (75, {torch.float16}), (70, set())):
        monkeypatch.setattr(weight_only, "device_arch", lambda device, arch=arch: arch)
        for dtype in FLOATS:
            layout = best_layout(64, 64, bits=2, symmetric=False, dtype=dtype, device=cuda)
            assert layout == (CUDA_TILES if dtype in dtypes else DISK), (arch, dtype)


def test_an_unknown_int4_layout_stays_on_disk_and_says_so_once(monkeypatch):
    if has_layout(REPACKED_CASES[0], torch.bfloat16) == DISK:
        pytest.skip(f"torch has no fast 4-bit operator on this CPU ({torch.backends.cpu.get_cpu_capability()})")
    cpu._lane_order.cache_clear()
    try:
        monkeypatch.setattr(cpu, "_aten_pack", lambda codes: torch.zeros(256, 128, dtype=torch.uint8))
        with pytest.warns(UserWarning, match="4-bit layers stay as on disk"):
            assert has_layout(REPACKED_CASES[0], torch.bfloat16) == DISK
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert has_layout(REPACKED_CASES[0], torch.bfloat16) == DISK
    finally:
        cpu._lane_order.cache_clear()


def test_any_leading_shape_and_any_strides(device):
    qw = random_quantized(16, 64, QuantSpec(4, 32, False), device=device)
    x = torch.randn(2, 3, 64, device=device)
    args = {"bits": 4, "group_size": 32}
    flat = packed_linear(x.view(6, 64), *disk_tensors(qw), None, **args)
    assert torch.equal(packed_linear(x, *disk_tensors(qw), None, **args), flat.view(2, 3, 16))
    assert_close(packed_linear(x[0, 0], *disk_tensors(qw), None, **args), flat[0], rms=1e-6, peak=1e-5)
    strided = x.transpose(0, 1)
    out = packed_linear(strided, *disk_tensors(qw), None, **args)
    assert_close(out, flat.view(2, 3, 16).transpose(0, 1), rms=1e-6, peak=1e-5)
    assert packed_linear(x[:0], *disk_tensors(qw), None, **args).shape == (0, 3, 16)


def test_the_same_input_gives_the_same_bits(device):
    for dtype, case in ((torch.float32, Case(3, 96, 512)), (torch.bfloat16, Case(64, 96, 512, symmetric=False))):
        x, qw, bias = arguments(case, dtype, device)
        outs = [packed_linear(x, *disk_tensors(qw), bias, bits=4, group_size=128) for _ in range(3)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    "case", [Case(3, 64, 64, 4, 32, False, True), Case(2, 64, 64, 8, -1), Case(5, 9, 13, 2, -1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype, device):
    """Schema, fake implementation, autograd registration, and tracing with static and dynamic shapes."""
    if device.type == "cuda" and dtype == torch.float32:
        dtype = torch.float16
    x, qw, bias = arguments(case, dtype, device)
    for layout in {has_layout(case, dtype) if device.type == "cpu" else DISK, CUDA_TILES}:
        tensors = from_disk(*disk_tensors(qw), bits=case.bits, k=case.k, layout=layout)
        args = (x, *tensors, bias, case.bits, case.group_size, layout)
        torch.library.opcheck(torch.ops.lowbit.packed_linear.default, args)


GOOD = {
    "x": torch.zeros(2, 96),
    "weight": torch.zeros(8, 12, dtype=torch.int32),
    "scales": torch.ones(8, 3),
    "zeros": torch.zeros(1, 3, dtype=torch.int32),
    "bias": torch.zeros(8),
    "bits": 4,
    "group_size": 32,
}


TILES = {"layout": CUDA_TILES, "weight": torch.zeros(1, 1, 16, 16, dtype=torch.int32), "scales": torch.ones(3, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"packed widths are \(2, 4, 8\) bits, got 3"),
        ({"group_size": 48}, r"group_size must be one of \(32, 64, 128, -1\), got 48"),
        ({"group_size": 64}, r"x is \(..., 96\), but group_size 64 does not divide"),
        ({"layout": "fast"}, r"layout must be one of .* got 'fast'"),
        ({"layout": CPU_INT8}, "got 'cpu_int8' for 4 bits"),
        ({"layout": CPU_INT4}, r"weight must be \(8, 48\)"),
        ({"layout": CUDA_TILES}, r"weight must be \(1, 1, 16, 16\) for x \(2, 96\), got \(8, 12\)"),
        ({"layout": CUDA_TILES, "scales": torch.ones(8)}, r"scales must be \(G, N\), got \(8,\)"),
        ({**TILES, "scales": torch.ones(2, 8)}, r"scales must be \(3, 8\)"),
        ({**TILES, "zeros": torch.zeros(1, 3, dtype=torch.int32)}, r"zeros must be \(3, 8\)"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, r"x must be .* got \(2, 96\) torch.float64"),
        ({"x": torch.tensor(1.0)}, r"x must be \(..., K\)"),
        ({"x": torch.zeros(2, 128)}, r"weight must be \(8, 16\) for x \(2, 128\), got \(8, 12\)"),
        ({"weight": torch.zeros(8, 12, dtype=torch.int64)}, "weight must be one of .*int32.* got torch.int64"),
        ({"scales": torch.ones(8)}, r"scales must be \(N, G\), got \(8,\)"),
        ({"scales": torch.ones(8, 2)}, r"scales must be \(8, 3\)"),
        ({"scales": torch.ones(8, 3, dtype=torch.int32)}, "scales must be one of"),
        ({"zeros": torch.zeros(8, 3, dtype=torch.int32)}, r"zeros must be \(1, 3\)"),
        ({"bias": torch.zeros(9)}, r"bias must be \(8,\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta, but x is on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    assert packed_linear(**GOOD).shape == (2, 8)
    with pytest.raises(ValueError, match=message):
        packed_linear(**{**GOOD, **change})


def test_symmetric_only_layouts_refuse_zeros():
    weight, zeros = torch.zeros(1, 8, 32, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="holds symmetric weights"):
        packed_linear(torch.zeros(1, 32), weight, torch.ones(8, 1), zeros, None, bits=8, group_size=-1, layout=CPU_INT8)


# --- rows that do not depend on the batch


def test_batch_invariance_is_refused_where_nothing_gives_it():
    """On a CPU: neither torch's packed operators nor its matmul promise it."""
    x, qw, bias = arguments(Case(3, 48, 128), torch.float32)
    args, options = (x, *disk_tensors(qw), bias), {"bits": 4, "group_size": qw.spec.group_size}
    expected = packed_linear(*args, **options)
    ops.set_batch_invariant(True)
    try:
        with pytest.raises(
            RuntimeError, match=r"only float16 and bfloat16 layers on a CUDA device have, not torch.float32 on cpu"
        ):
            packed_linear(*args, **options)
    finally:
        ops.set_batch_invariant(False)
    assert torch.equal(packed_linear(*args, **options), expected)

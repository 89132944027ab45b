"""The Triton kernels' own code against float64, run by Triton's interpreter on the CPU.

Triton decides at import whether to interpret, so these tests run in a process of their own. fp16 and fp32 only: bf16 is
silently wrong in the interpreter (it truncates and computes on the bits).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import MATMUL_CASES, assert_close, random_quantized, tolerance
from lowbit.affine import dequantize
from lowbit.packing import pack_codes
from lowbit.spec import QuantSpec

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_an_interpreting_process():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

else:
    from lowbit_kernels import Tile, fits, packed_matmul, packed_matmul_reference

    def tensors(case, dtype):
        qw = random_quantized(case.n, case.k, case.spec, dtype)
        zeros = None if qw.zeros is None else pack_codes(qw.zeros, case.bits, dim=0)
        bias = torch.randn(case.n, dtype=dtype) if case.bias else None
        x = torch.randn(case.m, case.k).to(dtype)
        return qw, (x, pack_codes(qw.codes, case.bits), qw.scales, zeros, bias)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    @pytest.mark.parametrize("case", MATMUL_CASES, ids=str)
    def test_matches_float64(case, dtype):
        qw, args = tensors(case, dtype)
        expected = args[0].double() @ dequantize(qw, torch.float64).t()
        if case.bias:
            expected += args[4].double()
        actual = packed_matmul(*args, bits=case.bits, group_size=case.group_size)
        assert actual.dtype == dtype
        assert_close(actual, expected, **tolerance(dtype, k=case.k))

    @pytest.mark.parametrize("case", MATMUL_CASES, ids=str)
    def test_the_reference_is_the_formula(case):
        qw, args = tensors(case, torch.float32)
        expected = args[0].double() @ dequantize(qw, torch.float64).t()
        if case.bias:
            expected += args[4].double()
        actual = packed_matmul_reference(*args, bits=case.bits, group_size=case.group_size)
        assert_close(actual, expected, **tolerance(torch.float64, k=1))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_every_code_unpacks_exactly(bits):
        """A one-hot x reads single codes: the result is code - zero, an integer, in every position of a word."""
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(-(-512 // 2**bits))[:512].view(4, 128)
        codes[1::2] = codes[1::2].flip(1)
        zeros = torch.tensor([[0], [1], [2 ** (bits - 1)], [2**bits - 1]], dtype=torch.uint8)
        args = pack_codes(codes, bits), torch.ones(4, 1, dtype=torch.float16), pack_codes(zeros, bits, dim=0), None
        out = packed_matmul(torch.eye(128, dtype=torch.float16), *args, bits=bits, group_size=128)
        assert torch.equal(out.t(), codes.half() - zeros.half())

    @pytest.mark.parametrize(
        "tile", [Tile(16, 16, 32, 4, 1), Tile(32, 64, 64, 4, 2), Tile(16, 128, 128, 8, 1)], ids=str
    )
    def test_every_tile_gives_the_result(tile):
        case = next(c for c in MATMUL_CASES if c.m == 131)
        qw, args = tensors(case, torch.float16)
        expected = args[0].double() @ dequantize(qw, torch.float64).t() + args[4].double()
        actual = packed_matmul(*args, bits=case.bits, group_size=case.group_size, tile=tile)
        assert_close(actual, expected, **tolerance(torch.float16, k=case.k))

    def test_strides_do_not_matter():
        case = next(c for c in MATMUL_CASES if c.k == 192 and c.bits == 4)
        _, (x, words, scales, zeros, bias) = tensors(case, torch.float16)
        by_column = [t.t().contiguous().t() for t in (x, scales, zeros)]
        moved = packed_matmul(by_column[0], words, by_column[1], by_column[2], bias, bits=4, group_size=64)
        assert torch.equal(moved, packed_matmul(x, words, scales, zeros, bias, bits=4, group_size=64))

    def test_a_mean_in_x_costs_no_accuracy():
        """Group sums are subtracted in fp32; with x around 10 they are far larger than the result."""
        spec = QuantSpec(4, 64, False)
        qw = random_quantized(32, 256, spec, torch.float32)
        x = 10 + torch.randn(4, 256)
        zeros = pack_codes(qw.zeros, 4, dim=0)
        out = packed_matmul(x, pack_codes(qw.codes, 4), qw.scales, zeros, None, bits=4, group_size=64)
        expected = x.double() @ dequantize(qw, torch.float64).t()
        sums = 8 * x.sum(1).abs().max() * qw.scales.max() / expected.square().mean().sqrt()
        assert_close(out, expected, rms=float(sums) * 2**-22, peak=float(sums) * 2**-20)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
            ({"group_size": 48}, "group_size must be 32, 64, 128 or -1, got 48"),
            ({"group_size": 128}, "group_size 128 does not divide K = 192"),
            ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "x must be"),
            ({"words": torch.zeros(8, 23, dtype=torch.int32)}, r"words must be \(8, 24\)"),
            ({"words": torch.zeros(8, 48, dtype=torch.int32)[:, ::2]}, "contiguous"),
            ({"scales": torch.ones(8, 2)}, r"scales must be \(8, 3\)"),
            ({"zeros": torch.zeros(8, 3, dtype=torch.int32)}, r"zeros must be \(1, 3\)"),
            ({"bias": torch.zeros(7)}, r"bias must be \(8,\)"),
            ({"tile": Tile(16, 16, 128, 4, 1)}, "does not fit 4 bits in groups of 64"),
        ],
    )
    def test_bad_arguments_are_named(change, message):
        good = {
            "x": torch.zeros(2, 192),
            "words": torch.zeros(8, 24, dtype=torch.int32),
            "scales": torch.ones(8, 3),
            "zeros": torch.zeros(1, 3, dtype=torch.int32),
            "bias": None,
            "bits": 4,
            "group_size": 64,
        }
        packed_matmul(**good)
        with pytest.raises(ValueError, match=message):
            packed_matmul(**{**good, **change})

    def test_fits_rejects_what_the_kernel_cannot_run():
        assert fits(Tile(16, 32, 64, 4, 3), 4, 64)
        for bad in (Tile(8, 32, 64, 4, 3), Tile(16, 48, 64, 4, 3), Tile(16, 32, 16, 4, 3), Tile(16, 32, 64, 3, 3)):
            assert not fits(bad, 4, 64)
        assert not fits(Tile(16, 32, 128, 4, 3), 4, 64)
        assert not fits(Tile(128, 128, 128, 8, 4), 4, 128)  # shared memory

"""bf16 activations through float16 (lowbit_kernels/halves.py), run by Triton's interpreter, which has no bf16: the
kernels take fp16 and fp32 activations here, with the magnitudes that only bf16 has where fp32 can hold them.

The arithmetic of bf16 itself is emulated by torch at the end: the figures that the README states.
"""

import pytest
import torch

from helpers import Case, assert_close, random_quantized, tolerance
from interpreted import INTERPRETING, assert_passes_interpreted
from lowbit.affine import dequantize
from lowbit.packing import pack_codes

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

if not INTERPRETING:

    def test_in_an_interpreting_process():
        assert_passes_interpreted(__file__)

else:
    from lowbit_kernels import prefill
    from lowbit_kernels.halves import PADDING, to_halves, widen
    from lowbit_kernels.layout import to_tiles

    def multiply(case, x, scale=1.0, bias=None, chunk=None, monkeypatch=None):
        qw = random_quantized(case.n, case.k, case.spec, torch.float32)
        qw = type(qw)(qw.codes, (qw.scales * scale).to(torch.float32), qw.zeros, qw.spec)
        zeros = None if qw.zeros is None else pack_codes(qw.zeros, case.bits, dim=0)
        tiles, scales, zeros = to_tiles(pack_codes(qw.codes, case.bits), qw.scales, zeros, case.bits, case.k)
        out = torch.empty(len(x), case.n, dtype=torch.float16)
        prefill._through_halves(out, x, tiles, scales, zeros, bias, bits=case.bits, group_size=case.group_size)
        expected = x.double() @ dequantize(qw, torch.float64).t()
        return out, expected if bias is None else expected + bias.double()

    @pytest.mark.parametrize("case", [
        Case(9, 130, 256, 4, 64, False, bias=True), Case(3, 33, 200, 8, -1), Case(1, 16, 256, 2, 64, False),
    ], ids=str)  # fmt: skip
    def test_matches_float64(case, monkeypatch):
        """In several chunks of rows, with a bias that is added before the only rounding but float16's own two."""
        monkeypatch.setattr(prefill, "CHUNK_BYTES", 2 * 128 * case.k)
        bias = torch.randn(case.n) if case.bias else None
        actual, expected = multiply(case, torch.randn(case.m, case.k).half(), bias=bias)
        assert_close(actual, expected, **tolerance(torch.float16, 3, k=case.k))

    @pytest.mark.parametrize("fp32_sums", [False, True])
    def test_tokens_and_rows_of_any_magnitude(fp32_sums):
        """Each token and each row has its own: what would overflow float16, or vanish in it, does not."""
        case = Case(6, 40, 256, 4, 64)
        x = torch.randn(6, 256) * torch.tensor([1e-30, 1e-5, 1.0, 1e3, 1e10, 1e30])[:, None]
        x[2, 7] = 3000.0
        weights = 10.0 ** torch.linspace(-20, 20, 40)
        qw = random_quantized(40, 256, case.spec, torch.float32)
        scales = qw.scales * weights[:, None]
        tiles, scales_gn, _ = to_tiles(pack_codes(qw.codes, 4), scales, None, 4, 256)
        x16, tokens, rows = to_halves(x, scales_gn, 4, fp32_sums=fp32_sums)
        wide = torch.empty(40, 256, dtype=torch.float16)
        prefill.dequantize_rows(wide, tiles, scales_gn, None, 0, bits=4, group_size=64, factors=rows[0])
        assert tokens.shape == (2, PADDING) and rows.shape == (2, 40)
        assert torch.equal(tokens[0, :6] * tokens[1, :6], torch.ones(6))
        assert torch.equal(rows[0] * rows[1], torch.ones(40))
        assert x16.isfinite().all() and wide.isfinite().all()
        sums = x16.double() @ wide.double().t()
        if fp32_sums:
            assert x16.abs().amax(1).min() >= 2**14 and x16.abs().max() < 2**15 and wide.abs().max() < 2**15
        else:
            assert sums.abs().max() <= 2**15 and (256 * x16.abs().max().double() * wide.abs().max().double()) <= 2**15
        weight = dequantize(type(qw)(qw.codes, scales.double(), None, qw.spec), torch.float64)
        found = sums * tokens[1, :6].double()[:, None] * rows[1].double()
        # a sum may cancel; against the lengths of its token and its row every element is right
        error = (found - x.double() @ weight.t()) / (x.double().norm(dim=1)[:, None] * weight.norm(dim=1))
        assert error.abs().max() < 2**-11

    @pytest.mark.parametrize(("k", "groups"), [(2049, 3), (40000, 1), (128, 300)])
    def test_tokens_and_scales_of_any_number(k, groups, monkeypatch):
        """Longer than a block, and more groups than one: the largest is found wherever it is."""
        from lowbit_kernels import halves

        monkeypatch.setattr(halves, "LONGEST", 1 << 14)
        x, scales = torch.randn(3, k).clamp(-4, 4), torch.rand(groups, 17)
        x[torch.arange(3), torch.tensor([0, k // 2, k - 1])] = torch.tensor([5.0, -70.0, 900.0])
        scales[groups - 1, 5], scales[groups // 2, 16] = 3.0, 40.0
        x16, tokens, rows = to_halves(x, scales, 8, fp32_sums=True)
        for top, factor in ((x.abs().amax(1), tokens[0, :3]), (scales.amax(0) * 256, rows[0])):
            assert ((top * factor >= 2**14) & (top * factor < 2**15)).all()
        assert torch.equal(x16, (x * tokens[0, :3, None]).half())

    def test_rows_alone():
        x16, tokens, rows = to_halves(None, torch.ones(2, 5), 4, fp32_sums=True)
        assert x16 is None and tokens is None and torch.equal(rows[0], torch.full((5,), 2.0**10))

    def test_what_is_not_a_number_stays_in_its_row():
        x = torch.randn(6, 256).half()
        torch.manual_seed(5)
        clean, _ = multiply(Case(6, 40, 256), x)
        x[1, 3], x[4, 9], x[2] = float("nan"), float("inf"), 0.0
        torch.manual_seed(5)
        out, _ = multiply(Case(6, 40, 256), x)
        assert not out[[1, 4]].isfinite().any() and torch.equal(out[2], torch.zeros(40).half())
        assert torch.equal(out[[0, 3, 5]], clean[[0, 3, 5]])

    def test_a_part_of_the_result_is_widened_where_it_lies():
        whole = torch.randn(5, 300).half()
        part, tokens, rows = whole[:, 7:107], 2.0 ** torch.arange(5), 2.0 ** -torch.arange(100.0)
        expected = (part.float() * tokens[:, None] * rows).half()
        before = whole.clone()
        widen(part, part, tokens, rows, None)
        assert torch.equal(whole[:, 7:107], expected)
        assert torch.equal(whole[:, :7], before[:, :7]) and torch.equal(whole[:, 107:], before[:, 107:])


def roundings(bits, symmetric, through_halves):
    """Relative RMS error of x @ W.T in bf16: of weights rounded to bf16, or to fp16 with the powers of two."""
    torch.manual_seed(bits)
    n, k, m, group = 512, 2048, 64, 128
    codes = torch.randint(0, 2**bits, (n, k)).double()
    zeros = torch.full((n, k // group), 2.0 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, (n, k // group))
    scales = (0.01 + 0.02 * torch.rand(n, k // group)).to(torch.bfloat16).double()
    weight = (codes - zeros.double().repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    x = torch.randn(m, k).to(torch.bfloat16).double()
    exact = x @ weight.t()
    if through_halves:  # powers of two change no rounding here; the sums' own to fp16 is one more
        found = (x @ weight.half().double().t()).half().to(torch.bfloat16).double()
    else:
        found = (x @ weight.to(torch.bfloat16).double().t()).to(torch.bfloat16).double()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (2, False)])
def test_bf16_results_keep_to_the_goal_only_with_float16_weights(bits, symmetric):
    """Issue 3's 2e-3. One rounding of the result alone is 1.66e-3 (2**-8 / sqrt(3) over a mantissa of any size)."""
    assert roundings(bits, symmetric, through_halves=True) < 1.75e-3
    if bits > 2:  # code times scale of so few bits is often exact
        assert 2.0e-3 < roundings(bits, symmetric, through_halves=False) < 2.5e-3

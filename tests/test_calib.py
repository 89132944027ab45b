"""The calibrators as pure functions: what they minimise, against float64 references and exhaustive searches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.affine import dequantize, minmax_grid, quantize_to_grid, round_scales
from lowbit.calib import gptq, hessian
from lowbit.calib.gptq import DAMP_LADDER, factorize, gptq_quantize
from lowbit.calib.hessian import CrossMoment, Hessian, all_finite, corrected_target, output_loss
from lowbit.calib.rtn import rtn_quantize, search_grid, search_grids
from lowbit.spec import BITS, QuantSpec

SPECS = [QuantSpec(bits, 32, symmetric) for bits in BITS for symmetric in (True, False)]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)


def _inputs(tokens=512, k=64, seed=0):
    """Correlated inputs with channels of very different size, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return x * torch.logspace(-1.5, 0.5, k)[torch.randperm(k, generator=generator)]


def _weight(n=24, k=64, seed=1):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1


def _hessian(x):
    moment = Hessian(x.shape[1])
    moment.add(x)
    return moment.mean()


# ------------------------------------------------------------------ Hessian


@pytest.mark.parametrize("k", [1, 7, 64, 200, 1024, 1500])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls", [[[13], [1], [26]], [[14, 26]], [[13, 1], [], [20, 6]]])
def test_the_hessian_is_the_mean_outer_product(k, dtype, products, calls):
    """Chunks, given together or not, and stripes are an implementation matter. fp32 sums of 40 terms: 40 eps of theirs.

    bfloat16 products: half a unit in the last place of every chunk's sum on top, and of both factors if they had more.
    """
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    moment, rounding = Hessian(k, products=products), torch.zeros(k, k, dtype=torch.float64)
    chunks = iter(x.split([tokens for call in calls for tokens in call]))
    for call in calls:
        given = [next(chunks) for _ in call]
        moment.add(*given)
        rounding += sum(2**-8 * (chunk.double().t() @ chunk.double()).abs() for chunk in given)
    exact, absolute = x.double().t() @ x.double() / 40, x.double().abs().t() @ x.double().abs() / 40
    bound = 40 * torch.finfo(torch.float32).eps * absolute
    if products == torch.bfloat16:
        factors = 2 * 2**-8 if dtype == torch.float32 else 0.0
        # 1.01: the sum that is rounded is itself off by what its factors and its fp32 terms lost
        bound = 1.01 * (bound + rounding / 40 + factors * absolute)
    assert moment.tokens == 40
    assert bool(((moment.mean() - exact).abs() <= bound).all())
    assert torch.equal(moment.mean(), moment.mean().t())


@pytest.mark.parametrize("chunks", [1, 3])
def test_hessians_too_wide_for_float64_are_summed_in_float32(monkeypatch, chunks):
    monkeypatch.setattr(hessian, "_WIDEST_FLOAT64", 63)
    x, moment = _inputs(120), Hessian(64)
    moment.add(*x.chunk(chunks))
    bound = 120 * torch.finfo(torch.float32).eps * (x.double().abs().t() @ x.double().abs()) / 120
    assert moment.sums[0].dtype == torch.float32
    assert bool(((moment.mean() - x.double().t() @ x.double() / 120).abs() <= bound).all())


def test_products_in_bfloat16_are_far_more_exact_than_the_hessian_itself():
    """In units of each feature's spread: what two halves of the same text differ by, and what the rounding changes."""
    x = _inputs(4096)
    exact, rounded = (Hessian(64, products=dtype) for dtype in (torch.float32, torch.bfloat16))
    for chunk in x.split(512):
        exact.add(chunk)
        rounded.add(chunk)
    spread = exact.mean().diagonal().sqrt()
    lost, half = ((h - exact.mean()) / spread / spread.unsqueeze(1) for h in (rounded.mean(), _hessian(x[:2048])))
    assert float(torch.linalg.matrix_norm(lost, 2)) < 0.01 < 0.1 * float(torch.linalg.matrix_norm(half, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_finite_sees_one_bad_value_and_takes_no_large_ones_for_it(dtype):
    x = torch.full((300, 70), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x), "though the sum of these is infinite in float32"
    for bad in (float("nan"), float("inf"), float("-inf")):
        one, two = x.clone(), x.clone()
        one[17, 3] = two[17, 3] = bad
        two[18, 3] = -bad
        assert not all_finite(one) and not all_finite(two)
    assert all_finite(torch.empty(0, 4))


def test_merged_hessians_count_all_tokens():
    x = _inputs(100)
    first, second = Hessian(64), Hessian(64)
    first.add(x[:30])
    second.add(x[30:])
    torch.testing.assert_close(first.merge_(second).mean(), _hessian(x))


def test_a_hessian_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="seen no tokens"):
        Hessian(8).mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(bad):
    moment = Hessian(2)
    moment.add(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        moment.mean()


def test_inputs_of_a_wrong_width_are_an_error():
    with pytest.raises(ValueError, match=r"expected inputs \(tokens, 8\), got \(3, 7\)"):
        Hessian(8).add(torch.ones(3, 7))


def test_output_loss_is_the_squared_output_error():
    x, w = _inputs().double(), _weight().double()
    q = w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5)).double()
    expected = ((x @ q.t() - x @ w.t()) ** 2).mean(0)
    torch.testing.assert_close(output_loss(q, w, x.t() @ x / len(x)), expected)


@pytest.mark.parametrize("rows", [24, 100])
def test_the_corrected_target_is_the_least_squares_weight(rows):
    """T y ~ W x over the tokens, with fewer rows than columns or more; undamped it solves the normal equation."""
    x = _inputs()
    y = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    w = _weight(rows)
    moments = CrossMoment(64)
    for a, b in zip(x.split(100), y.split(100), strict=True):
        moments.add(a, b)
    cross, hessian = (x - y).t() @ y / len(x), y.t() @ y / len(x)
    target = corrected_target(w, cross, hessian, damp_frac=0.0)
    expected = torch.linalg.lstsq(y.double(), x.double() @ w.double().t()).solution.t()
    torch.testing.assert_close(target.double(), expected, rtol=2e-3, atol=2e-4)
    damped = moments.target(w)
    torch.testing.assert_close(
        damped, corrected_target(w, cross, hessian, damp_frac=2 * 64 / 512), rtol=1e-3, atol=1e-5
    )
    error = [float(((y @ t.t() - x @ w.t()) ** 2).mean()) for t in (w, damped, target)]
    assert error[2] <= error[1] < error[0]


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_streams_or_products_give_nearly_the_float32_target(dtype, products):
    """A channel of 300 over 2,048 tokens sums beyond float16's 65,504. The streams themselves are rounded first."""
    x = (_inputs(2048) + torch.nn.functional.one_hot(torch.tensor(5), 64) * 300).to(dtype)
    y = (x.float() + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).to(dtype)
    targets = []
    for a, b, factors in ((x, y, products), (x.float(), y.float(), torch.float32)):
        moments = CrossMoment(64, products=factors)
        moments.add(a, b)
        targets.append(moments.target(_weight()))
    change = float((targets[1] - _weight()).norm())
    assert float((targets[0] - targets[1]).norm()) < 0.05 * change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [511, 512, 513, 1300])
def test_the_cross_moment_is_that_of_all_tokens(tokens, dtype):
    """In whatever pieces they are converted. ``n`` float32 additions of exact products: ``n`` eps of the absolute sum;
    of float32 inputs the difference and the product are rounded too.
    """
    original, quantized = (_inputs(tokens, seed=seed).to(dtype) for seed in (0, 1))
    moments = CrossMoment(64)
    moments.add(original, quantized)
    drift, other = original.double() - quantized.double(), quantized.double()
    bound = (tokens + 3) * torch.finfo(torch.float32).eps * (drift.abs().t() @ other.abs())
    assert moments.tokens == tokens
    assert bool(((moments.sums[0] - drift.t() @ other).abs() <= bound).all())
    assert torch.equal(moments.hessian.mean(), moments.hessian.mean().t())


def test_equal_streams_need_no_correction():
    x, w = _inputs(), _weight()
    moments = CrossMoment(64)
    moments.add(x, x)
    assert torch.equal(moments.target(w), w)


# ------------------------------------------------------------------ round to nearest


def _grid_error(weight, scales, zeros, spec, importance):
    error = dequantize(quantize_to_grid(weight, scales, zeros, spec)) - weight
    return (error.square() * importance).reshape(weight.shape[0], scales.shape[1], -1).sum(-1)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_searched_grid_is_never_worse_than_min_max_in_any_group(spec, dtype):
    weight, importance = _weight(), _inputs().square().mean(0)
    scales, zeros = search_grid(weight, spec, importance, scale_dtype=dtype)
    widest, widest_zeros = minmax_grid(weight, spec)
    found = _grid_error(weight, scales, zeros, spec, importance)
    assert scales.dtype == dtype
    assert bool(
        (found <= _grid_error(weight, round_scales(widest, dtype), widest_zeros, spec, importance) * (1 + 1e-5)).all()
    )


@pytest.mark.parametrize("spec", [QuantSpec(2, -1, True), QuantSpec(2, -1, False)], ids=QuantSpec.label)
def test_the_searched_grid_comes_close_to_an_exhaustive_one(spec):
    """2 bits: every zero and 4,000 scales. The search may miss the optimum, by 2 % in the mean over 64 groups."""
    weight = _weight(64, 16)
    scales, zeros = search_grid(weight, spec)
    found = _grid_error(weight, scales, zeros, spec, torch.ones(16)).squeeze(1)
    best = torch.full((64,), torch.inf)
    span = weight.abs().amax(1, keepdim=True)
    for zero in [2] if spec.symmetric else range(4):
        for factor in torch.linspace(0.05, 1.0, 4000):
            z = None if spec.symmetric else torch.full((64, 1), zero, dtype=torch.uint8)
            best = torch.minimum(best, _grid_error(weight, span * factor, z, spec, torch.ones(16)).squeeze(1))
    assert float(found.mean()) <= 1.02 * float(best.mean())


@every_spec
def test_degenerate_groups_survive(spec):
    """All zero, one constant, one spike: positive finite scales, and the first two are exact when asymmetric."""
    weight = torch.zeros(4, 32)
    weight[1], weight[2, 5], weight[3] = 0.75, 100.0, -0.75
    qw = rtn_quantize(weight, spec)
    assert bool((torch.isfinite(qw.scales) & (qw.scales > 0)).all())
    assert torch.equal(dequantize(qw)[0], weight[0])
    torch.testing.assert_close(dequantize(qw)[[1, 3]], weight[[1, 3]], rtol=1e-5 if not spec.symmetric else 0.5, atol=0)


@settings(max_examples=60)
@given(st.data())
def test_rounding_is_deterministic_and_in_range(data):
    spec = data.draw(st.sampled_from(SPECS))
    rows, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    scale = 10.0 ** data.draw(st.integers(-20, 20))
    weight = _weight(rows, groups * 32, seed=data.draw(st.integers(0, 99))) * scale
    qw = rtn_quantize(weight, spec)
    again = rtn_quantize(weight, spec)
    assert torch.equal(qw.codes, again.codes)
    assert torch.equal(qw.scales, again.scales)
    assert int(qw.codes.max()) <= spec.max_code


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_searched_together_are_those_searched_apart(bits, symmetric):
    weight, spec = _weight(n=40, k=256), QuantSpec(bits, 64, symmetric=symmetric)
    importances = (None, torch.rand(256), torch.rand(256) ** 4)
    together = search_grids(weight, spec, importances, scale_dtype=torch.bfloat16)
    for (scales, zeros), importance in zip(together, importances, strict=True):
        expected_scales, expected_zeros = search_grid(weight, spec, importance, scale_dtype=torch.bfloat16)
        assert torch.equal(scales, expected_scales)
        assert (zeros is None and expected_zeros is None) or torch.equal(zeros, expected_zeros)


def test_importance_of_a_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"importance must be \(64,\), got \(63,\)"):
        search_grid(_weight(), QuantSpec(4, 32), torch.ones(63))


# ------------------------------------------------------------------ GPTQ


def _paper(weight, hessian, scales, zeros, spec, order):
    """Algorithm 1, one column at a time, in float64: (codes, loss as the paper sums it)."""
    W = weight.double()[:, order].clone()
    U = torch.linalg.cholesky(torch.linalg.inv(hessian.double()[order][:, order]), upper=True)
    size = weight.shape[1] // scales.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    loss = torch.zeros(len(W), dtype=torch.float64)
    for j, column in enumerate(order.tolist()):
        s = scales.double()[:, column // size]
        z = spec.mid_code if zeros is None else zeros.double()[:, column // size]
        code = (W[:, j] / s + z).round().clamp(0, spec.max_code)
        codes[:, column] = code.to(torch.uint8)
        error = (W[:, j] - (code - z) * s) / U[j, j]
        loss += error.square()
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return codes, loss


@every_spec
def test_lazy_blocks_give_the_papers_codes(spec):
    """K = 192 spans two blocks. fp32 against float64 may flip a tie: at most 1 code in 1,000, by one level."""
    x, weight = _inputs(2048, 192), _weight(16, 192)
    factor = factorize(_hessian(x))
    scales, zeros = search_grid(weight, spec)
    codes = gptq._round_columns(weight, gptq._Grid(scales, zeros, spec, 192), factor)
    expected, paper_loss = _paper(weight, factor.hessian, scales, zeros, spec, factor.order)
    different = codes != expected
    assert float(different.float().mean()) <= 1e-3 * (1 + 20 * (spec.bits == 8))
    assert int((codes.int() - expected.int()).abs().max()) <= 1 + 3 * (spec.bits == 8)
    q = dequantize(quantize_to_grid(weight, scales, zeros, spec).__class__(codes, scales, zeros, spec), torch.float64)
    torch.testing.assert_close(output_loss(q, weight.double(), factor.hessian.double()), paper_loss, rtol=2e-2, atol=0)


@every_spec
def test_every_refinement_lowers_the_damped_loss_of_every_row(spec):
    x, weight = _inputs(), _weight()
    factor = factorize(_hessian(x))
    scales, zeros = search_grid(weight, spec)
    grid = gptq._Grid(scales, zeros, spec, 64)
    codes = gptq._round_columns(weight, grid, factor)

    def loss(codes, grid):
        q = (grid.steps(codes) * grid.scale.unsqueeze(-1)).reshape(weight.shape)
        return output_loss(q.double(), weight.double(), factor.hessian.double())

    before = loss(codes, grid)
    descended = gptq._descend(codes, weight, grid, factor, 2)
    after = loss(descended, grid)
    assert bool((after <= before * (1 + 1e-4)).all())
    refitted = gptq._refit_scales(descended, weight, grid, factor)
    assert bool((loss(descended, refitted) <= after * (1 + 1e-3)).all())


def test_descent_ends_where_no_single_code_can_improve():
    spec, weight = QuantSpec(2, 32, False), _weight(4, 32)
    factor = factorize(_hessian(_inputs(k=32)))
    scales, zeros = search_grid(weight, spec)
    grid = gptq._Grid(scales, zeros, spec, 32)
    codes = gptq._descend(gptq._round_columns(weight, grid, factor), weight, grid, factor, 50)

    def loss(codes):
        q = (grid.steps(codes) * grid.scale.unsqueeze(-1)).reshape(weight.shape)
        return output_loss(q.double(), weight.double(), factor.hessian.double())

    best = loss(codes)
    for column, code in itertools.product(range(32), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert bool((loss(other) >= best * (1 - 1e-5)).all())


@every_spec
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_is_never_worse_than_round_to_nearest(spec, group_size):
    spec = QuantSpec(spec.bits, group_size, spec.symmetric)
    x, weight = _inputs(), _weight()
    result = gptq_quantize(weight, _hessian(x), spec, scale_dtype=torch.bfloat16)
    exact = ((x.double() @ (dequantize(result.weight, torch.float64) - weight.double()).t()) ** 2).mean(0).sum()
    assert result.method == "gptq"
    assert bool((result.loss <= result.rtn_loss).all())
    assert float(result.loss.sum()) < 0.9 * float(result.rtn_loss.sum())
    assert float(result.loss.sum()) == pytest.approx(float(exact), rel=1e-3)
    assert result.weight.scales.dtype == torch.bfloat16
    assert not any(t.is_inference() for t in (result.weight.codes, result.weight.scales, result.loss))
    assert result.damp_frac == DAMP_LADDER[0]
    assert result.notes == ()


def test_a_target_is_what_gets_approached():
    weight = _weight()
    target = weight + 0.02 * _weight(seed=9)
    result = gptq_quantize(weight, _hessian(_inputs()), QuantSpec(4, 32), target=target)
    plain = gptq_quantize(weight, _hessian(_inputs()), QuantSpec(4, 32))
    hessian = _hessian(_inputs())
    toward = [float(output_loss(dequantize(r.weight), target, hessian).sum()) for r in (result, plain)]
    assert toward[0] < toward[1]
    assert float(result.loss.sum()) == pytest.approx(toward[0], rel=1e-5)


def test_dead_channels_are_reported_and_keep_their_nearest_code():
    x = _inputs()
    x[:, [3, 40]] = 0
    result = gptq_quantize(_weight(), _hessian(x), QuantSpec(4, 32, False))
    assert result.notes == ("2 of 64 input channels are always zero",)
    error = (dequantize(result.weight) - _weight())[:, [3, 40]].abs()
    assert bool((error <= 1.01 * result.weight.scales.float().max()).all())


@pytest.mark.parametrize("kind", ["constant", "duplicate", "few tokens"])
def test_singular_hessians_are_damped_not_refused(kind):
    x = _inputs()
    if kind == "constant":
        x[:] = x[:1]
    elif kind == "duplicate":
        x[:, 32:] = x[:, :32]
    else:
        x = x[:5]
    result = gptq_quantize(_weight(), _hessian(x), QuantSpec(4, 32, False))
    assert bool((result.loss <= result.rtn_loss).all())
    assert bool(torch.isfinite(result.weight.scales.float()).all())


def test_round_to_nearest_is_kept_where_it_is_better_and_the_report_says_so():
    """Errors compensated along a factor that does not belong to the inputs only grow."""
    wrong = factorize(_hessian(_inputs(seed=7)).flip(0, 1))
    result = gptq_quantize(_weight(), _hessian(_inputs()), QuantSpec(4, 32), factor=wrong)
    (part,) = result.split([24])
    kept = int(result.rtn_rows.sum())
    assert kept > 0
    assert part.notes == (f"{kept} of 24 rows kept round to nearest, whose loss was lower",)
    expected = rtn_quantize(_weight(), QuantSpec(4, 32), _hessian(_inputs()).diagonal())
    assert torch.equal(result.weight.codes[result.rtn_rows], expected.codes[result.rtn_rows])
    assert torch.equal(result.loss[result.rtn_rows], result.rtn_loss[result.rtn_rows])


@every_spec
def test_stacked_weights_give_what_each_gives_alone(spec):
    """Bit for bit up to the order of a matrix product's sums: at most 1 code in 500 may differ."""
    hessian = _hessian(_inputs())
    parts = [_weight(8, seed=1), _weight(40, seed=2), _weight(16, seed=3)]
    together = gptq_quantize(torch.cat(parts), hessian, spec).split([8, 40, 16])
    for part, found in zip(parts, together, strict=True):
        alone = gptq_quantize(part, hessian, spec)
        assert float((found.weight.codes != alone.weight.codes).float().mean()) <= 2e-3 * (1 + 10 * (spec.bits == 8))
        torch.testing.assert_close(found.loss, alone.loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.ones(4, 32), torch.ones(32), r"hessian must be \(K, K\), got \(32,\)"),
        (torch.ones(4, 32), torch.eye(16), r"\(4, 32\) and hessian \(16, 16\) do not match"),
        (torch.full((4, 32), torch.nan), torch.eye(32), "weight contains NaN"),
        (torch.ones(4, 32), torch.eye(32) * torch.inf, "hessian contains NaN"),
    ],
)
def test_bad_input_is_named(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        gptq_quantize(weight, hessian, QuantSpec(4, 32))

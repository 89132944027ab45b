"""The AWQ searches: exact losses, never worse than round to nearest, and the best where the answer is known."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.affine import dequantize, minmax_grid, quantize_to_grid
from lowbit.calib import awq, clip
from lowbit.calib.awq import awq_quantize, scale_hessian, search_clip, search_scales
from lowbit.calib.hessian import output_loss
from lowbit.spec import QuantSpec

SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits, group in ((2, 32), (3, 64), (4, 32), (4, -1), (8, 64))
    for symmetric in (True, False)
]


def outlier_problem(n: int = 24, k: int = 128, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight, inputs and Hessian in float64; some channels are loud, and all share a common component."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=rng, dtype=torch.float64)
    loud = torch.where(torch.rand(k, generator=rng, dtype=torch.float64) < 0.05, 20.0, 1.0).double()
    x = (torch.randn(tokens, k, generator=rng, dtype=torch.float64) + 0.5) * loud
    return weight, x, x.T @ x / tokens


def rtn(weight: Tensor, spec: QuantSpec) -> Tensor:
    return dequantize(quantize_to_grid(weight, *minmax_grid(weight, spec), spec), weight.dtype)


def minmax(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    return minmax_grid(weight, spec)


def ids(spec: QuantSpec) -> str:
    return spec.label()


def test_scaled_hessian_is_the_hessian_of_the_scaled_input() -> None:
    _, x, hessian = outlier_problem()
    scales = torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    y = x / scales
    torch.testing.assert_close(scale_hessian(hessian, scales), y.T @ y / len(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("grid_fn", [minmax, awq.quick_clip], ids=["minmax", "clip"])
def test_reported_losses_are_the_true_output_errors(spec: QuantSpec, grid_fn: awq.GridFn) -> None:
    weight, x, hessian = outlier_problem()
    found = search_scales([weight[:9], weight[9:]], hessian, spec, grid=5, grid_fn=grid_fn)

    def error(scales: Tensor) -> float:
        scaled, inputs = weight * scales, x / scales
        grid = grid_fn(scaled, inputs.T @ inputs / len(inputs), spec)
        out = inputs @ dequantize(quantize_to_grid(scaled, *grid, spec), scaled.dtype).T
        return float((out - x @ weight.T).square().sum(1).mean())

    assert math.isclose(found.loss, error(found.scales), rel_tol=1e-9)
    assert math.isclose(found.rtn_loss, error(torch.ones_like(found.scales)), rel_tol=1e-9)
    assert found.loss <= found.rtn_loss


def test_loud_channels_make_scaling_win() -> None:
    weight, _, hessian = outlier_problem()
    found = search_scales([weight], hessian, QuantSpec(4, 128, True), grid_fn=minmax)
    assert found.alpha > 0
    assert found.loss < 0.7 * found.rtn_loss
    loud = hessian.diagonal() > 50
    assert found.scales[loud].log().mean() > found.scales[~loud].log().mean() + 0.2


def test_no_candidate_of_the_grid_is_better_than_the_one_returned() -> None:
    weight, _, hessian = outlier_problem()
    spec = QuantSpec(3, 32, False)
    found = search_scales([weight], hessian, spec, grid=4, grid_fn=minmax)
    act = hessian.diagonal().sqrt()
    groups = weight.abs().reshape(24, 4, 32)
    wgt = (groups / groups.amax(-1, keepdim=True)).reshape(24, 128).mean(0)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        for scales in (act**alpha, act**alpha / wgt ** (1 - alpha)):
            loss = output_loss(rtn(weight * scales, spec) / scales, weight, hessian).sum()
            assert found.loss <= float(loss) * (1 + 1e-6)


def test_scales_are_normalised_and_identity_when_nothing_is_to_gain() -> None:
    weight, _, hessian = outlier_problem()
    scales = search_scales([weight], hessian, QuantSpec(4, 128, True), grid_fn=minmax).scales
    assert math.isclose(float(scales.max() * scales.min()), 1.0, rel_tol=1e-9)
    exact = torch.randint(0, 16, (4, 32), generator=torch.Generator().manual_seed(0)).double() - 8
    exact[:, 0], exact[:, 1] = -8, 7
    found = search_scales([exact], torch.eye(32, dtype=torch.float64), QuantSpec(4, 32, False), grid_fn=minmax)
    assert found.loss == found.rtn_loss == 0.0
    assert torch.equal(found.scales, torch.ones(32, dtype=torch.float64)) and found.alpha == 0.0 and not found.duo


def test_columns_of_one_channel_get_one_scale() -> None:
    weight, _, hessian = outlier_problem()
    channels = torch.arange(32).repeat(4)
    found = search_scales([weight], hessian, QuantSpec(4, 32, False), channels=channels, grid_fn=minmax)
    assert found.alpha > 0
    assert torch.equal(found.scales.reshape(4, 32), found.scales[:32].expand(4, 32))


def test_dead_channels_and_given_magnitudes() -> None:
    weight, x, _ = outlier_problem()
    x[:, 5] = 0
    hessian = x.T @ x / len(x)
    spec = QuantSpec(4, 64, True)
    by_rms = search_scales([weight], hessian, spec, grid_fn=minmax)
    by_mean = search_scales([weight], hessian, spec, act_magnitude=x.abs().mean(0), grid_fn=minmax)
    for found in (by_rms, by_mean):
        assert torch.isfinite(found.scales).all() and (found.scales > 0).all() and found.loss < found.rtn_loss
    assert not torch.equal(by_rms.scales, by_mean.scales)
    silent = search_scales([weight], torch.zeros_like(hessian), spec)
    assert torch.equal(silent.scales, torch.ones(128, dtype=torch.float64))


def test_loss_weights_decide_whose_error_counts() -> None:
    first, _, hessian = outlier_problem(seed=0)
    second = first * torch.linspace(0.05, 3, 128, dtype=torch.float64)
    spec = QuantSpec(3, 128, True)
    alone = search_scales([second], hessian, spec, grid_fn=minmax)
    both = search_scales([first, second], hessian, spec, loss_weights=[0.0, 1.0], grid_fn=minmax)
    assert both.loss <= both.rtn_loss and math.isclose(both.rtn_loss, alone.rtn_loss, rel_tol=1e-12)


def block_loss(weight: Tensor, grid: tuple[Tensor, Tensor | None], hessian: Tensor, spec: QuantSpec) -> Tensor:
    """``(N, G)`` by explicit loops over groups."""
    error = dequantize(quantize_to_grid(weight, *grid, spec), weight.dtype) - weight
    width = weight.shape[1] // spec.num_groups(weight.shape[1])
    parts = [slice(i, i + width) for i in range(0, weight.shape[1], width)]
    return torch.stack([((error[:, p] @ hessian[p, p]) * error[:, p]).sum(1) for p in parts], 1)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_no_group_is_clipped_to_a_higher_loss_than_its_minmax_grid(spec: QuantSpec) -> None:
    weight, _, hessian = outlier_problem()
    clipped = block_loss(weight, search_clip(weight, hessian, spec), hessian, spec)
    covering = block_loss(weight, minmax_grid(weight, spec), hessian, spec)
    assert (clipped <= covering * (1 + 1e-9)).all()
    assert clipped.sum() < (0.95 if spec.bits < 8 else 1.0) * covering.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_finds_the_grid_a_clipped_weight_came_from(symmetric: bool) -> None:
    """A weight on a grid plus one far outlier that the Hessian does not see: only the grid without it is exact."""
    rng = torch.Generator().manual_seed(0)
    spec = QuantSpec(4, 32, symmetric)
    weight = (torch.randint(0, 16, (7, 32), generator=rng).double() - 8) * 0.1
    weight[:, 1], weight[:, 2] = -0.8, 0.7
    weight[:, 0] = 1.0
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[0, 0] = 1e-9
    scales, zeros = search_clip(weight, hessian, spec, steps=60, rounds=3)
    loss = block_loss(weight, (scales, zeros), hessian, spec).sum()
    assert loss < 1e-2 * block_loss(weight, minmax_grid(weight, spec), hessian, spec).sum()
    torch.testing.assert_close(scales, torch.full_like(scales, 0.1), rtol=1e-2, atol=0)


def test_rows_are_independent_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessian = outlier_problem()
    spec = QuantSpec(3, 32, False)
    whole, alone = awq_quantize(weight, hessian, spec), awq_quantize(weight[5:6], hessian, spec)
    torch.testing.assert_close(whole.scales[5:6], alone.scales, rtol=1e-9, atol=0)
    monkeypatch.setattr(clip, "_CHUNK_ELEMENTS", 5 * 128)
    chunked = awq_quantize(weight, hessian, spec)
    torch.testing.assert_close(whole.scales, chunked.scales, rtol=1e-9, atol=0)
    assert (whole.codes != chunked.codes).float().mean() < 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_is_worse_than_round_to_nearest(spec: QuantSpec, scale_dtype: torch.dtype) -> None:
    weight, _, hessian = outlier_problem()
    qw = awq_quantize(weight, hessian, spec, scale_dtype)
    assert qw.scales.dtype == scale_dtype and qw.spec == spec
    scales, zeros = minmax_grid(weight, spec)
    plain = quantize_to_grid(weight, scales.to(scale_dtype), zeros, spec)
    ours = output_loss(dequantize(qw, weight.dtype), weight, hessian)
    theirs = output_loss(dequantize(plain, weight.dtype), weight, hessian)
    assert (ours <= theirs * (1 + 1e-9)).all()
    assert ours.sum() < (0.8 if spec.bits < 8 else 1.0) * theirs.sum()


def test_refitted_scales_solve_the_least_squares_problem() -> None:
    weight, x, hessian = outlier_problem(n=6)
    spec = QuantSpec(3, 32, False)
    start = quantize_to_grid(weight, *minmax_grid(weight, spec), spec)
    fitted = awq._refit_scales(weight, start, hessian)
    unit = (start.codes.double().reshape(6, 4, 32) - start.zeros.double().unsqueeze(-1)).reshape(6, 128)
    for row in range(6):
        columns = torch.stack([x[:, g * 32 : (g + 1) * 32] @ unit[row, g * 32 : (g + 1) * 32] for g in range(4)], 1)
        want = torch.linalg.lstsq(columns, x @ weight[row]).solution
        torch.testing.assert_close(fitted[row], want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_and_groups_of_zeros_stay_zero(rows: int) -> None:
    weight, _, hessian = outlier_problem()
    weight[rows] = 0
    weight[1, 32:64] = 0
    qw = awq_quantize(weight, hessian, QuantSpec(4, 32, False), torch.bfloat16)
    assert torch.isfinite(qw.scales).all() and (qw.scales > 0).all()
    out = dequantize(qw)
    assert (out[rows] == 0).all() and (out[1, 32:64] == 0).all()


def test_float32_problem_reaches_the_float64_loss() -> None:
    weight, _, hessian = outlier_problem()
    spec = QuantSpec(4, 32, False)
    losses = [
        output_loss(dequantize(awq_quantize(weight.to(t), hessian.to(t), spec), torch.float64), weight, hessian).sum()
        for t in (torch.float32, torch.float64)
    ]
    assert math.isclose(float(losses[0]), float(losses[1]), rel_tol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "at least one"),
        ({"weights": [torch.zeros(4, 96)]}, r"\(4, 96\)"),
        ({"weights": [torch.zeros(0, 128)]}, r"\(0, 128\)"),
        ({"hessian": torch.zeros(128, 127)}, r"\(128, 127\)"),
        ({"hessian": torch.full((128, 128), float("inf"))}, "not finite"),
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"channels": torch.zeros(64, dtype=torch.int64)}, "channels"),
        ({"act_magnitude": torch.ones(64)}, "act_magnitude"),
        ({"loss_weights": [1.0, 2.0]}, "one factor per weight"),
    ],
)
def test_bad_input_names_what_is_wrong(change: dict, message: str) -> None:
    given = {"weights": [torch.ones(4, 128)], "hessian": torch.eye(128), **change}
    with pytest.raises(ValueError, match=message):
        search_scales(given.pop("weights"), given.pop("hessian"), QuantSpec(4, 64, True), **given)


def test_group_size_that_does_not_divide_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match="would work"):
        awq_quantize(torch.ones(2, 96), torch.eye(96), QuantSpec(4, 64, True))

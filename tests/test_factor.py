"""GPTQ's factor of a Hessian: the upper triangle of its inverse, and what is added until there is one."""

from __future__ import annotations

import pytest
import torch

from lowbit.calib.gptq import DAMP_LADDER, factorize


def _correlated(k, tokens):
    """A Hessian of features of very different size, as language models have them."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    x *= torch.logspace(-1.5, 0.5, k)[torch.randperm(k, generator=generator)]
    return x.t() @ x / tokens


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 255, 256, 257, 513, 700])
def test_the_factor_is_the_upper_triangle_of_the_inverse(k, act_order):
    """``U^T U H = I`` in visiting order, H in float64 as it was damped; widths around the halving's smallest block.

    Rounding errors of sums of k terms are of the order of sqrt(k) eps. Conditioning does not magnify them here: what
    makes H ill-conditioned is the features' sizes, and rows and columns are rounded in proportion to theirs.
    """
    factor = factorize(_correlated(k, 4 * k), act_order=act_order)
    assert factor.damp_frac == DAMP_LADDER[0] and factor.notes == ()
    order, upper = factor.order, factor.upper.double()
    assert torch.equal(order.sort().values, torch.arange(k))
    assert act_order or torch.equal(order, torch.arange(k))
    assert torch.equal(factor.upper, factor.upper.triu()) and bool((upper.diagonal() > 0).all())
    hessian = factor.hessian.double()[order][:, order]
    exact = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    error = float((upper - exact).norm() / exact.norm())
    assert error <= 2 * k**0.5 * torch.finfo(torch.float32).eps


def test_columns_are_visited_by_decreasing_diagonal_and_their_cost_is_kept_in_place():
    hessian = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    factor = factorize(hessian)
    assert factor.order.tolist() == [1, 3, 2, 0]
    # Nothing compensates for a column of a diagonal Hessian: its error costs its own curvature.
    torch.testing.assert_close(factor.column_cost, factor.hessian.diagonal())


def _indefinite(strength):
    hessian = torch.eye(64) * 2
    hessian[0, 1] = hessian[1, 0] = 2 * (1 + strength)
    return hessian


@pytest.mark.parametrize(("strength", "held"), [(0.005, 0.01), (0.02, 0.03), (0.09, 0.1), (0.2, 0.3), (0.9, 1.0)])
def test_the_ladder_is_climbed_until_the_factorization_holds(strength, held):
    factor = factorize(_indefinite(strength))
    assert factor.damp_frac == held
    assert len(factor.notes) == DAMP_LADDER.index(held)
    torch.testing.assert_close(factor.hessian.diagonal().mean(), torch.tensor(2 * (1 + held)))


def test_at_the_ladders_end_is_the_diagonal_and_the_report_says_so():
    factor = factorize(_indefinite(3.0))
    assert factor.damp_frac is None
    assert len(factor.notes) == len(DAMP_LADDER) + 1
    assert "diagonal" in factor.notes[-1]
    assert torch.equal(factor.hessian, torch.diag(factor.hessian.diagonal()))

"""GPTQ (Frantar et al., 2022, arXiv 2210.17323) on a fixed grid, followed by exact refinement of grid and codes.

The letters are the paper's: W the weight, H the Hessian, U the upper Cholesky factor of H^-1, Q the quantized weight,
E the scaled errors of a block. Differences from algorithm 1, each of which only lowers the layer's loss:

* The grid is fixed before the first column is rounded, from the original weights (Two-Stage Grid Optimization,
  arXiv 2602.02126, stage 1): a grid read off weights that already carry other columns' errors is too wide. The
  rounding error of column k costs ``1 / U_kk^2`` once later columns have compensated for it, so that is its weight in
  the search.
* Columns are visited by decreasing ``H_kk`` while their groups stay where they are ("act-order" with static groups),
  so nothing is permuted at run time.
* With the codes fixed the loss is quadratic in a row's scales, with the scales fixed it is quadratic in each code:
  both are solved exactly, in turn (stage 2 of the paper above; coordinate descent as in QuIP's LDLQ analysis).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import QuantizedWeight, dequantize, quantize_to_grid, round_scales
from ..spec import QuantSpec
from .hessian import all_finite, output_loss
from .rtn import search_grids

__all__ = ["DAMP_LADDER", "Factor", "GptqResult", "factorize", "gptq_quantize"]

DAMP_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Fractions of the mean diagonal added to the diagonal, tried in order until the Cholesky factorization succeeds."""

_BLOCK = 64
_SUBSTITUTED = 256  # rows up to which a triangular matrix is inverted by substitution


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian, computed once for all linears that share it.

    Attributes:
        hessian: ``(K, K)`` float32, damped, dead channels given the mean diagonal.
        upper: ``(K, K)`` upper Cholesky factor of the inverse of ``hessian``, rows and columns in visiting order.
        order: ``(K,)`` column indices in visiting order.
        damp_frac: the rung of the ladder that held; None when only the diagonal could be used.
        notes: what happened, for the report; empty when the first rung held.
    """

    hessian: Tensor
    upper: Tensor
    order: Tensor
    damp_frac: float | None
    notes: tuple[str, ...]

    @property
    def column_cost(self) -> Tensor:
        """``1 / U_kk^2`` per column in original order: the cost of a squared rounding error after compensation."""
        cost = torch.empty_like(self.upper.diagonal())
        cost[self.order] = self.upper.diagonal().square().reciprocal()
        return cost


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight and what it costs, row by row.

    Attributes:
        weight: the better of GPTQ and round to nearest in every row.
        loss, rtn_loss: ``(N,)`` float32, ``E |Q x - T x|^2`` of what was kept and of round to nearest.
        rtn_rows: ``(N,)`` bool, rows that kept round to nearest.
        damp_frac, notes: of the Hessian's factor.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    rtn_rows: Tensor
    damp_frac: float | None
    notes: tuple[str, ...]

    @property
    def method(self) -> str:
        """``gptq``, or ``rtn`` when no row was better off with GPTQ."""
        return "rtn" if bool(self.rtn_rows.all()) else "gptq"

    def split(self, rows: list[int]) -> list[GptqResult]:
        """Parts of ``rows`` rows each, for weights that were stacked because they share their input."""
        qw = self.weight
        zeros: list[Tensor | None] = [None] * len(rows) if qw.zeros is None else list(qw.zeros.split(rows))
        weights = [
            QuantizedWeight(codes, scales, zero, qw.spec)
            for codes, scales, zero in zip(qw.codes.split(rows), qw.scales.split(rows), zeros, strict=True)
        ]
        losses = zip(self.loss.split(rows), self.rtn_loss.split(rows), self.rtn_rows.split(rows), strict=True)
        return [
            GptqResult(weight, *parts, self.damp_frac, self.notes + _rtn_note(parts[2]))
            for weight, parts in zip(weights, losses, strict=True)
        ]


def _rtn_note(rtn_rows: Tensor) -> tuple[str, ...]:
    count = int(rtn_rows.sum())
    return (f"{count} of {len(rtn_rows)} rows kept round to nearest, whose loss was lower",) if count else ()


def _inverse_upper(hessian: Tensor, order: Tensor) -> Tensor | None:
    """U of ``H^-1 = U^T U``, H with rows and columns in ``order``; None when it is not positive definite.

    With rows and columns in the opposite order ``H = L L^T``, so U is ``L^-1`` with its own put back: one
    factorization, and none of H^-1, in which H's rounding has grown with its condition number.
    """
    order = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(hessian[order][:, order])
    if int(failed):
        return None
    _invert_lower(lower)
    upper = lower.flip(0, 1)
    return upper if all_finite(upper) else None


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: as matrix products, which are faster than substitution."""
    k = len(lower)
    if k <= _SUBSTITUTED:
        identity = torch.eye(k, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = k // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    torch.mm(last, below @ first, out=below).neg_()


def factorize(hessian: Tensor, *, damp_fracs: tuple[float, ...] = DAMP_LADDER, act_order: bool = True) -> Factor:
    """Damp and factorize a Hessian, climbing the ladder until it works and ending at its diagonal.

    Args:
        hessian: ``(K, K)`` float32, symmetric, finite.
        damp_fracs: fractions of the mean diagonal to add, increasing.
        act_order: visit columns by decreasing diagonal.

    Raises:
        ValueError: not square, or not finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be (K, K), got {tuple(hessian.shape)}")
    if not all_finite(hessian):
        raise ValueError("hessian contains NaN or infinite values")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    notes = []
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    if bool(dead.any()):
        notes.append(f"{int(dead.sum())} of {dead.numel()} input channels are always zero")
        diagonal[dead] = mean
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(hessian.device)
    damped = 0.0
    for frac in damp_fracs:
        diagonal += (frac - damped) * mean
        damped = frac
        upper = _inverse_upper(hessian, order)
        if upper is not None:
            return Factor(hessian, upper, order, frac, tuple(notes))
        notes.append(f"the Hessian is not positive definite with damp_frac {frac}")
    notes.append("fell back to the Hessian's diagonal: columns do not compensate for each other")
    upper = torch.diag(diagonal[order].rsqrt())
    return Factor(torch.diag(diagonal.clone()), upper, order, None, tuple(notes))


class _Grid:
    """Scales and zeros of a weight, expanded to columns when asked; float32."""

    def __init__(self, scales: Tensor, zeros: Tensor | None, spec: QuantSpec, k: int) -> None:
        self.stored, self.zeros, self.spec = scales, zeros, spec
        self.group_size = k // scales.shape[1]
        self.scale = scales.float()
        self.zero = torch.full_like(self.scale, spec.mid_code) if zeros is None else zeros.float()
        self._scale_rows, self._zero_rows = self.scale.t().contiguous(), self.zero.t().contiguous()

    def scales_of(self, columns: Tensor) -> Tensor:
        """Scales of the columns, transposed: ``(len(columns), N)``."""
        return self._scale_rows[columns // self.group_size]

    def zeros_of(self, columns: Tensor) -> Tensor:
        """As :meth:`scales_of`."""
        return self._zero_rows[columns // self.group_size]

    def steps(self, codes: Tensor) -> Tensor:
        """``code - zero`` as ``(N, G, group_size)`` float32."""
        return codes.float().reshape(*self.scale.shape, -1) - self.zero.unsqueeze(-1)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The first rows of all tensors, then their second rows, ..., as views."""
    return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)


@torch.inference_mode()  # where a row of a matrix costs a third less to make; gptq_quantize returns ordinary tensors
def _round_columns(W: Tensor, grid: _Grid, factor: Factor) -> Tensor:
    """Algorithm 1 of the paper with lazy block updates; returns codes ``(N, K)`` uint8 in original column order."""
    order, diagonal, largest = factor.order, factor.upper.diagonal().unsqueeze(1), grid.spec.max_code
    W = W.t()[order].contiguous()  # (K, N): a column of the weight is a contiguous row here
    codes = torch.empty_like(W)
    for start in range(0, W.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, W.shape[0]))
        scale, zero = grid.scales_of(order[block]), grid.zeros_of(order[block])
        U = factor.upper[block] / diagonal[block]  # so that E need not be divided column by column
        w = torch.addcmul(W[block], zero, scale)  # what a code stands for, without its zero
        E, chosen = torch.zeros_like(w), torch.empty_like(w)
        earlier, u = E.t(), U[:, block].t().contiguous()
        # One column is five operations on a row of N numbers: what indexing costs matters. E is zero from the column's
        # own row on, so all of it stands for the rows before.
        for wi, ui, si, ei, code in _rows(w, u, scale, E, chosen):
            wi.addmv_(earlier, ui, alpha=-1)
            torch.div(wi, si, out=code).round_().clamp_(0, largest)
            torch.addcmul(wi, code, si, value=-1, out=ei)
        codes[order[block]] = chosen
        W[block.stop :].addmm_(U[:, block.stop :].t(), E, alpha=-1)
    return codes.to(torch.uint8).t().contiguous()


@torch.inference_mode()
def _descend(codes: Tensor, W: Tensor, grid: _Grid, factor: Factor, sweeps: int) -> Tensor:
    """Coordinate descent: each code in turn becomes the best one given all others. Never raises the damped loss."""
    H, order, largest = factor.hessian, factor.order, grid.spec.max_code
    error = (grid.steps(codes) * grid.scale.unsqueeze(-1)).flatten(1) - W
    gradient = H @ error.t()  # (K, N), half the gradient of the loss
    columns = codes.t().float()
    for _ in range(sweeps):
        for index in order.split(_BLOCK):
            scale, rows_of_H, old = grid.scales_of(index), H[index], columns[index]
            h = rows_of_H[:, index]
            curvature = h.diagonal().unsqueeze(1)
            # Divided by its own curvature, the gradient of a code alone is its distance from where the loss is least.
            g, h = gradient[index] / curvature, h / curvature
            negated, new, moves = -old * scale, torch.empty_like(old), torch.zeros_like(old)
            earlier = moves.t()  # zero from the column's own row on
            for gi, hi, before, minus_q, si, code, move in _rows(g, h, old, negated, scale, new, moves):
                gi.addmv_(earlier, hi)
                torch.addcdiv(before, gi, si, value=-1, out=code).round_().clamp_(0, largest)
                torch.addcmul(minus_q, code, si, out=move)
            columns[index] = new
            gradient.addmm_(rows_of_H.t(), moves)  # H is symmetric
    return columns.to(torch.uint8).t().contiguous()


def _refit_scales(codes: Tensor, W: Tensor, grid: _Grid, factor: Factor) -> _Grid:
    """Scales of least damped loss for fixed codes: one ``(G, G)`` system per row, in closed form."""
    H, (n, num_groups) = factor.hessian, grid.scale.shape
    steps, size = grid.steps(codes), grid.group_size
    target = (steps * (W @ H).reshape(n, num_groups, size)).sum(-1)
    A = torch.empty(n, num_groups, num_groups, device=W.device)
    for g in range(num_groups):
        columns = slice(g * size, (g + 1) * size)
        A[:, g] = ((steps[:, g] @ H[columns]).reshape(n, num_groups, size) * steps).sum(-1)
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    A.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    target += ridge.unsqueeze(1) * grid.scale  # a group whose codes all equal its zero keeps its scale
    fitted = torch.linalg.solve(A, target)
    fitted = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, grid.scale)
    return _Grid(round_scales(fitted, grid.stored.dtype), grid.zeros, grid.spec, W.shape[1])


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    factor: Factor | None = None,
    target: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    rounds: int = 1,
    sweeps: int = 1,
) -> GptqResult:
    """Quantize one weight so that the outputs on the calibration inputs change least.

    Args:
        weight: ``(N, K)`` floating point, finite.
        hessian: ``(K, K)`` float32, ``E[x x^T]``; undamped, also what the reported losses are measured with.
        spec: the grid.
        factor: :func:`factorize` of the Hessian, when linears share it.
        target: ``(N, K)``; the weight to come close to when it is not ``weight`` itself
            (:func:`lowbit.calib.hessian.corrected_target`). The grid is still searched on ``weight``.
        scale_dtype: dtype the scales are stored in.
        rounds: alternations of refitting the scales and descending on the codes.
        sweeps: passes over the columns in each descent.

    Weights that share their input may be stacked along N and the result split: rows do not see each other.

    Returns:
        In every row the better of GPTQ and round to nearest, by the loss against ``target``.

    Raises:
        ValueError: shapes that do not match, or non-finite input.
    """
    factor = factorize(hessian) if factor is None else factor
    if weight.ndim != 2 or hessian.shape[0] != weight.shape[1]:
        raise ValueError(f"weight (N, K) {tuple(weight.shape)} and hessian {tuple(hessian.shape)} do not match")
    for name, tensor in (("weight", weight), ("target", weight if target is None else target)):
        if not all_finite(tensor):
            raise ValueError(f"{name} contains NaN or infinite values")
    weight = weight.float()
    W = weight if target is None else target.float()

    def losses(candidate: QuantizedWeight) -> Tensor:
        return output_loss(dequantize(candidate), W, hessian)

    importances = hessian.diagonal(), factor.column_cost
    nearest, (scales, zeros) = search_grids(weight, spec, importances, scale_dtype=scale_dtype)
    rtn = quantize_to_grid(weight, *nearest, spec)
    rtn_loss = losses(rtn)
    grid = _Grid(scales, zeros, spec, weight.shape[1])
    codes = _round_columns(W, grid, factor)
    best = QuantizedWeight(codes, grid.stored, zeros, spec)
    loss = losses(best)
    for _ in range(rounds):
        grid = _refit_scales(codes, W, grid, factor)
        codes = _descend(codes, W, grid, factor, sweeps)
        refined = QuantizedWeight(codes, grid.stored, zeros, spec)
        best, loss = _better_rows(refined, losses(refined), best, loss)
    rtn_rows = rtn_loss < loss
    best, loss = _better_rows(rtn, rtn_loss, best, loss)
    return GptqResult(best, loss, rtn_loss, rtn_rows, factor.damp_frac, factor.notes)


def _better_rows(
    a: QuantizedWeight, a_loss: Tensor, b: QuantizedWeight, b_loss: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """Row by row the one of lower loss; ``b`` where they are equal."""
    rows = a_loss < b_loss
    pick = rows.unsqueeze(1)
    zeros = None if a.zeros is None or b.zeros is None else torch.where(pick, a.zeros, b.zeros)
    codes, scales = torch.where(pick, a.codes, b.codes), torch.where(pick, a.scales, b.scales)
    return QuantizedWeight(codes, scales, zeros, a.spec), torch.where(rows, a_loss, b_loss)

"""Activation-aware weight quantization: scale search, clip search (clip.py), round to nearest.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978. The
paper's two searches minimise the output error ``||Q(W s) (x / s) - W x||^2``. Here no forward pass is needed for it:
with ``hessian = X^T X / tokens`` the error of a candidate ``Q`` is exactly ``trace((Q - W) H (Q - W)^T)`` per token,
so everything below is a pure function of weights, Hessian and spec.

A scale ``s`` is one positive number per input channel. The weight is multiplied by it, the input is divided by it (by
whatever produces the input, :mod:`lowbit.fold`), and channels that carry much signal get a finer grid relative to
their size, at the cost of the others in their group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import QuantizedWeight, dequantize, minmax_grid, quantize_to_grid, round_scales
from ..spec import QuantSpec
from .clip import check_inputs, check_weights, chunk_rows, quick_clip, search_clip
from .hessian import output_loss

__all__ = ["AwqScales", "GridFn", "ScaleSearch", "awq_quantize", "scale_hessian", "search_clip", "search_scales"]

GridFn = Callable[[Tensor, Tensor, QuantSpec], tuple[Tensor, Tensor | None]]
"""``(weight (N, K), hessian (K, K), spec) -> (scales (N, G), zeros (N, G) uint8 or None)``, as :func:`search_clip`."""


@dataclass(frozen=True)
class AwqScales:
    """Result of :func:`search_scales`.

    Attributes:
        scales: ``(K,)`` in the Hessian's dtype, positive; ones when no scaling was better than none.
        alpha: exponent of the activation magnitude; 0 with ``duo`` False is no scaling.
        duo: the scales were also divided by the weights' magnitude to the power ``1 - alpha``.
        loss: mean squared output error per token with ``scales``, summed over the weights' rows.
        rtn_loss: the same without scaling. ``loss <= rtn_loss`` always.
    """

    scales: Tensor
    alpha: float
    duo: bool
    loss: float
    rtn_loss: float


def scale_hessian(hessian: Tensor, scales: Tensor) -> Tensor:
    """Second moment of the input after it was divided by ``scales``: ``H_ij / (s_i s_j)``. Both ``(K, K)``."""
    return hessian / torch.outer(scales, scales).to(hessian.dtype)


class ScaleSearch:
    """Best per-channel scales among ``a^alpha`` and ``a^alpha / w^(1 - alpha)``, alpha in ``[0, 1]`` (section 3.2).

    ``a`` is the magnitude of the input channel, ``w`` the mean over all rows of ``|W| / max|W| in its group``. Every
    candidate is divided by ``sqrt(max * min)`` and scored by the full-Hessian output error of all weights together.
    No scaling is one of the candidates and wins ties.

    The weights come one after the other, each with the Hessian of the tokens it reads, of which only one is needed at
    a time: the experts of a layer share the scales of their common input, but not their tokens.

    Args:
        weights: all ``(N_i, K)`` floating-point weights that will be added, here for their magnitude alone.
        magnitude: ``(K,)`` non-negative magnitude of the input, in the dtype to compute in.
        grid: alpha takes the values ``i / grid`` for ``i = 0 .. grid``.
        channels: ``(K,)`` int64 ids; columns of one id get one scale (grouped-query attention, where several columns
            of ``o_proj`` read the same row of ``v_proj``). Default: every column its own.
        grid_fn: quantization grid of a scaled weight.
        part: ``(i, n)`` tries every n-th candidate only, from the i-th on: of the results of all i the one of least
            ``(loss, alpha, duo)`` is the result of the whole search.

    Raises:
        ValueError: no weights, a shape that does not fit, a grid below 1.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        magnitude: Tensor,
        spec: QuantSpec,
        *,
        grid: int = 20,
        channels: Tensor | None = None,
        grid_fn: GridFn = quick_clip,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if magnitude.ndim != 1:
            raise ValueError(f"magnitude must be (K,), got {tuple(magnitude.shape)}")
        check_weights(weights, magnitude.shape[0], spec)
        if grid < 1:
            raise ValueError(f"grid must be at least 1, got {grid}")
        self._spec, self._grid_fn = spec, grid_fn
        act, wgt = _tie(magnitude, channels), _tie(_weight_magnitude(weights, spec), channels)
        # Without the first, which is no scaling, and the last, which without duo is the same.
        tried = [(step / grid, duo) for step in range(grid + 1) for duo in (False, True)][1:-1][part[0] :: part[1]]
        self._candidates = [(torch.ones_like(act), 0.0, False)]
        for alpha, duo in tried:
            scales = _normalised(act.pow(alpha) / wgt.pow(1 - alpha) if duo else act.pow(alpha))
            self._candidates.append((scales, alpha, duo))
        self._losses = [0.0] * len(self._candidates)

    def add(self, weights: Sequence[Tensor], hessian: Tensor, factors: Sequence[float] | None = None) -> None:
        """Score every candidate on weights that read the same tokens.

        Args:
            weights: ``(N_i, K)`` each.
            hessian: ``(K, K)``, ``X^T X / tokens`` of their input, in the dtype to compute in.
            factors: one per weight on its part of the loss, such as the share of the tokens it reads. Default: ones.

        Raises:
            ValueError: no weights, a shape that does not fit, or a Hessian that is not finite.
        """
        check_inputs(weights, hessian, self._spec)
        factors = [1.0] * len(weights) if factors is None else factors
        for i, (scales, _, _) in enumerate(self._candidates):
            losses = [
                f * _rtn_loss(w, scales, hessian, self._spec, self._grid_fn)
                for f, w in zip(factors, weights, strict=True)
            ]
            self._losses[i] += float(torch.stack(losses).sum())

    def best(self) -> AwqScales:
        """The candidate of least loss over all that was added."""
        rtn_loss = self._losses[0]
        found = min(range(len(self._losses)), key=self._losses.__getitem__)
        scales, alpha, duo = self._candidates[found]
        return AwqScales(scales, alpha, duo, self._losses[found], rtn_loss)


def search_scales(
    weights: Sequence[Tensor],
    hessian: Tensor,
    spec: QuantSpec,
    *,
    grid: int = 20,
    act_magnitude: Tensor | None = None,
    channels: Tensor | None = None,
    loss_weights: Sequence[float] | None = None,
    grid_fn: GridFn = quick_clip,
    part: tuple[int, int] = (0, 1),
) -> AwqScales:
    """:class:`ScaleSearch` over weights that all read the same tokens.

    Args:
        weights: the ``(N_i, K)`` floating-point weights that read this input.
        hessian: ``(K, K)``, ``X^T X / tokens`` of the input, in the dtype to compute in.
        act_magnitude: ``(K,)`` non-negative, e.g. mean ``|x|``. Default: ``sqrt(E[x^2])``, the Hessian's diagonal.
        loss_weights: one factor per weight on its part of the loss. Default: ones.
        grid, channels, grid_fn, part: as there.

    Raises:
        ValueError: no weights, a shape that does not fit, a grid below 1, or a Hessian that is not finite.
    """
    check_inputs(weights, hessian, spec)
    if loss_weights is not None and len(loss_weights) != len(weights):
        raise ValueError(f"loss_weights must have one factor per weight ({len(weights)}), got {len(loss_weights)}")
    magnitude = hessian.diagonal().clamp(min=0).sqrt() if act_magnitude is None else act_magnitude.to(hessian)
    if magnitude.shape != (hessian.shape[0],):
        raise ValueError(f"act_magnitude must be ({hessian.shape[0]},), got {tuple(magnitude.shape)}")
    search = ScaleSearch(weights, magnitude, spec, grid=grid, channels=channels, grid_fn=grid_fn, part=part)
    search.add(weights, hessian, loss_weights)
    return search.best()


def awq_quantize(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Clip search, round to nearest, then the scales that fit the codes best under the full Hessian.

    The last step is least squares over the G scales of a row with the codes held (the groups' errors are correlated
    through the Hessian, which the clip search leaves aside). Each row keeps the best of the three stages (min-max,
    clipped, refitted) by its exact output loss, so a row is never worse than round to nearest.

    Args:
        weight: ``(N, K)`` floating point, already multiplied by the folded scales if there are any.
        hessian: ``(K, K)`` of the input as this weight sees it (:func:`scale_hessian` after a fold).
        scale_dtype: dtype the scales are stored in; codes are chosen against the rounded scales.

    Returns:
        QuantizedWeight with scales in ``scale_dtype``.

    Raises:
        ValueError: a shape that does not fit, a group size that does not divide K, a Hessian that is not finite.
    """
    check_inputs([weight], hessian, spec)
    w = weight.to(hessian.dtype)
    scales, zeros = search_clip(w, hessian, spec)
    best = _round_to(w, *minmax_grid(w, spec), spec, scale_dtype)
    loss = output_loss(dequantize(best, w.dtype), w, hessian)
    candidate = _round_to(w, scales, zeros, spec, scale_dtype)
    best, loss = _keep_better(best, loss, candidate, w, hessian)
    for _ in range(2):
        refitted = round_scales(_refit_scales(w, candidate, hessian), scale_dtype)
        held = QuantizedWeight(candidate.codes, refitted, candidate.zeros, spec)
        best, loss = _keep_better(best, loss, held, w, hessian)
        candidate = quantize_to_grid(w, refitted, candidate.zeros, spec)
        best, loss = _keep_better(best, loss, candidate, w, hessian)
    return best


def _tie(x: Tensor, channels: Tensor | None) -> Tensor:
    """Root mean square over columns that share a channel, written back to each of them; never exactly 0."""
    if channels is not None:
        if channels.shape != x.shape:
            raise ValueError(f"channels must be {tuple(x.shape)}, got {tuple(channels.shape)}")
        ids = channels.to(x.device)
        count = torch.bincount(ids).to(x.dtype)
        x = (torch.zeros_like(count).scatter_add_(0, ids, x.square()) / count)[ids].sqrt()
    top = x.max()
    return x.clamp(min=1e-4 * float(top)) if top > 0 else torch.ones_like(x)


def _weight_magnitude(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """``(K,)``: mean over rows of ``|w|`` relative to the largest of its group."""
    total = sum(part.shape[0] for part in weights)
    out = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    for w in weights:
        for part in w.split(chunk_rows(w.shape[1])):
            size = part.to(out.dtype).abs().reshape(part.shape[0], spec.num_groups(part.shape[1]), -1)
            peak = size.amax(-1, keepdim=True)
            out += (size / torch.where(peak > 0, peak, 1.0)).sum(0).flatten()
    return out / total


def _normalised(scales: Tensor) -> Tensor:
    return scales / (scales.max() * scales.min()).sqrt()


def _rtn_loss(weight: Tensor, scales: Tensor, hessian: Tensor, spec: QuantSpec, grid_fn: GridFn) -> Tensor:
    """Output loss (scalar) of rounding ``weight * scales`` to nearest and dividing the scales out again."""
    total = torch.zeros((), dtype=hessian.dtype, device=hessian.device)
    scaled_hessian = scale_hessian(hessian, scales)
    for part in weight.split(chunk_rows(weight.shape[1])):
        w = part.to(hessian.dtype)
        scaled = w * scales
        grid_scales, zeros = grid_fn(scaled, scaled_hessian, spec)
        rounded = dequantize(quantize_to_grid(scaled, grid_scales, zeros, spec), w.dtype)
        total += output_loss(rounded, scaled, scaled_hessian).sum()
    return total


def _refit_scales(weight: Tensor, qw: QuantizedWeight, hessian: Tensor) -> Tensor:
    """Scales ``(N, G)`` minimising each row's full-Hessian loss with the codes held: one ``G x G`` system per row."""
    groups = qw.scales.shape[1]
    unit = dequantize(QuantizedWeight(qw.codes, torch.ones_like(qw.scales, dtype=weight.dtype), qw.zeros, qw.spec))
    parts = []
    # G weighted copies of the rows are alive at once, so the chunk is G times smaller.
    rows = chunk_rows(weight.shape[1] * groups)
    for w, q, old in zip(weight.split(rows), unit.to(weight.dtype).split(rows), qw.scales.split(rows), strict=True):
        n, k = w.shape
        codes = q.reshape(n, groups, -1)
        by_group = torch.einsum("nga,gak->ngk", codes, hessian.reshape(groups, k // groups, k))
        right = (by_group * w.unsqueeze(1)).sum(-1)
        left = torch.einsum("ngha,nha->ngh", by_group.reshape(n, groups, groups, -1), codes)
        # A group whose codes are all zero has an empty row; the ridge keeps the system regular and leaves its scale.
        ridge = 1e-6 * left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        left = left + torch.diag_embed(ridge.expand(n, groups))
        fit = torch.linalg.solve_ex(left, right + ridge * old.to(w.dtype))[0]
        parts.append(torch.where(torch.isfinite(fit) & (fit > 0), fit, old.to(w.dtype)))
    return torch.cat(parts)


def _round_to(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype
) -> QuantizedWeight:
    return quantize_to_grid(weight, round_scales(scales, scale_dtype), zeros, spec)


def _keep_better(
    best: QuantizedWeight, loss: Tensor, other: QuantizedWeight, weight: Tensor, hessian: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """Row by row, whichever has the smaller output loss."""
    other_loss = output_loss(dequantize(other, weight.dtype), weight, hessian)
    better = (other_loss < loss).unsqueeze(1)
    zeros = None
    if best.zeros is not None and other.zeros is not None:
        zeros = torch.where(better, other.zeros, best.zeros)
    rows = QuantizedWeight(
        torch.where(better, other.codes, best.codes), torch.where(better, other.scales, best.scales), zeros, best.spec
    )
    return rows, torch.where(better.squeeze(1), other_loss, loss)

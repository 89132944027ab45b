"""Round to nearest, on the best grid rather than the widest.

For every group the grid (scale, zero) minimises ``sum_k importance_k (w_k - q_k)^2``. The search runs over all rows
and groups at once: first shrunken ranges, as in the GPTQ and AWQ code bases ("MSE" and "clip" search), then
alternating least squares, which for fixed codes c gives the best scale in closed form,
``scale = sum h w (c - z) / sum h (c - z)^2``, and tries the neighbouring zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import QuantizedWeight, minmax_grid, quantize_to_grid, round_scales
from ..spec import QuantSpec

__all__ = ["rtn_quantize", "search_grid", "search_grids"]

_SMALLEST_SHRINK = {2: 0.25, 3: 0.35, 4: 0.5, 5: 0.6, 6: 0.7, 8: 0.85}
_SHRINKS = {2: 16, 3: 16, 4: 16, 5: 32, 6: 32, 8: 32}  # the refits make up for a coarser step where scales are coarse
_REFITS = 2  # four find grids of 1e-5 to 7e-4 less error
# Weights searched at a time: bounds the temporaries to a few tens of MB; on a CPU they stay in the cache.
_CHUNK, _CPU_CHUNK = 1 << 22, 1 << 18


@dataclass
class _BestGrid:
    """The best grid so far of every group; all ``(n, G)`` float32, scales already rounded to storage."""

    error: Tensor
    scales: Tensor
    zeros: Tensor

    def offer(self, errors: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Take the best of several grids, each ``(candidates, n, G)``, in every group where its error is smaller."""
        error, index = errors.min(0)
        better, index = error < self.error, index.unsqueeze(0)
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, scales.gather(0, index)[0], self.scales)
        self.zeros = torch.where(better, zeros.gather(0, index)[0], self.zeros)


class _Search:
    """One batched search over the groups of some rows, for several importances of the columns at once."""

    def __init__(
        self, groups: Tensor, importances: Sequence[Tensor | None], spec: QuantSpec, dtype: torch.dtype
    ) -> None:
        self.groups = groups  # (n, G, group_size) float32
        self.importances = importances  # each (1, G, group_size) or None
        self.spec, self.dtype = spec, dtype
        # A thousand operations write to these four: fresh memory would cost more than what is computed.
        self._scaled, self._nearest, self._work, self._product = (torch.empty_like(groups) for _ in range(4))
        scales, zeros = minmax_grid(groups.flatten(1), spec)
        self.widest = scales
        self.zeros = torch.full_like(scales, spec.mid_code) if zeros is None else zeros.float()
        self.best = [_BestGrid(torch.full_like(scales, torch.inf), scales, self.zeros) for _ in importances]
        self.try_grids([(scales, [self.zeros])], range(len(importances)))

    def _sum(self, x: Tensor, which: int) -> Tensor:
        importance = self.importances[which]
        return (x if importance is None else torch.mul(x, importance, out=self._product)).sum(-1)

    def _scale(self, scales: Tensor) -> None:
        """The weights in units of ``scales``, and the whole numbers nearest to them, which serve all zeros."""
        torch.div(self.groups, scales.unsqueeze(-1), out=self._scaled)
        torch.round(self._scaled, out=self._nearest)

    def _steps(self, zeros: Tensor) -> Tensor:
        """``code - zero`` of every weight."""
        low = -zeros.unsqueeze(-1)
        torch.maximum(self._nearest, low, out=self._work)
        return torch.minimum(self._work, low + self.spec.max_code, out=self._work)

    def try_grids(self, candidates: Iterable[tuple[Tensor, Sequence[Tensor]]], which: Sequence[int]) -> None:
        """Offer grids, each scales with one or more zeros, to the best of the importances ``which``.

        Scales are rounded to storage first; errors are in units of them until they are summed.
        """
        tried: list[tuple[Tensor, Tensor]] = []
        sums: list[list[Tensor]] = [[] for _ in which]
        for scales, shifted in candidates:
            scales = round_scales(scales, self.dtype).float()
            self._scale(scales)
            for zeros in shifted:
                error = self._steps(zeros).sub_(self._scaled).square_()
                for one, found in zip(which, sums, strict=True):
                    found.append(self._sum(error, one))
                tried.append((scales, zeros))
        all_scales, all_zeros = (torch.stack(parts) for parts in zip(*tried, strict=True))
        for one, found in zip(which, sums, strict=True):
            self.best[one].offer(torch.stack(found).mul_(all_scales.square()), all_scales, all_zeros)

    def _shifted(self, zeros: Tensor) -> list[Tensor]:
        shifts = (0,) if self.spec.symmetric else (0, -1, 1)
        return [(zeros + shift).clamp_(0, self.spec.max_code) for shift in shifts]

    def shrink(self) -> None:
        """Try every other range from the widest down, then those beside the best; trying all gains 7e-4 at most."""
        smallest, count = _SMALLEST_SHRINK[self.spec.bits], _SHRINKS[self.spec.bits]
        factors, zeros = torch.linspace(1.0, smallest, count).tolist(), self._shifted(self.zeros)
        self.try_grids(((self.widest * factor, zeros) for factor in factors[2::2]), range(len(self.best)))
        step = (1.0 - smallest) / (count - 1)
        for which, best in enumerate(self.best):
            beside = (best.scales + self.widest * (sign * step) for sign in (1, -1))
            inside = (torch.clamp(scales, self.widest * smallest, self.widest) for scales in beside)
            self.try_grids([(scales, [best.zeros]) for scales in inside], (which,))

    def refit(self, which: int) -> None:
        """One step of alternating least squares from the best grid."""
        scales, shifted = self.best[which].scales, self._shifted(self.best[which].zeros)
        self._scale(scales)
        fitted = []
        for zeros in shifted:
            steps = self._steps(zeros)
            torch.mul(steps, self.groups, out=self._product)
            best = self._sum(self._product, which) / self._sum(steps.square_(), which)
            fitted.append(torch.where(best > 0, best, scales))  # NaN (all codes zero) keeps the scale
        self.try_grids([(scales, [zeros]) for scales, zeros in zip(fitted, shifted, strict=True)], (which,))


def search_grids(
    weight: Tensor,
    spec: QuantSpec,
    importances: Sequence[Tensor | None],
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor | None]]:
    """:func:`search_grid` for each of several importances; the candidates they have in common are computed once."""
    k = weight.shape[1]
    num_groups = spec.num_groups(k)
    shaped = [None if h is None else _per_group(h, k, num_groups) for h in importances]
    rows = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _CHUNK) // k)
    found: list[list[_BestGrid]] = []
    for chunk in weight.float().split(rows):
        search = _Search(chunk.reshape(chunk.shape[0], num_groups, -1), shaped, spec, scale_dtype)
        search.shrink()
        for which in range(len(shaped)):
            for _ in range(_REFITS):
                search.refit(which)
        found.append(search.best)
    grids: list[tuple[Tensor, Tensor | None]] = []
    for parts in zip(*found, strict=True):
        scales = torch.cat([part.scales for part in parts]).to(scale_dtype)
        zeros = None if spec.symmetric else torch.cat([part.zeros for part in parts]).to(torch.uint8)
        grids.append((scales, zeros))
    return grids


def _per_group(importance: Tensor, k: int, num_groups: int) -> Tensor:
    if tuple(importance.shape) != (k,):
        raise ValueError(f"importance must be ({k},), got {tuple(importance.shape)}")
    # A group whose columns never fire would compare 0 < 0 forever: the floor lets its weights speak.
    return importance.float().clamp(min=1e-8 * float(importance.max()) or 1.0).reshape(1, num_groups, -1)


def search_grid(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, *, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Grid of least (weighted) squared rounding error; never worse than :func:`lowbit.affine.minmax_grid`.

    Args:
        weight: ``(N, K)`` floating point, finite.
        importance: ``(K,)`` non-negative weights of the columns, e.g. ``E[x_k^2]``; None counts all alike.
        scale_dtype: dtype the scales are stored in; candidates are compared after rounding to it.

    Returns:
        scales ``(N, G)`` in ``scale_dtype`` and zeros ``(N, G)`` uint8 (None when symmetric).

    Raises:
        ValueError: the group size does not divide K, or importance is not ``(K,)``.
    """
    return search_grids(weight, spec, [importance], scale_dtype=scale_dtype)[0]


def rtn_quantize(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Search the grid, then round every weight to it. Arguments as in :func:`search_grid`."""
    scales, zeros = search_grid(weight, spec, importance, scale_dtype=scale_dtype)
    return quantize_to_grid(weight.float(), scales, zeros, spec)

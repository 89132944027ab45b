"""AWQ's clip search: the range in which a group rounds best, by the Hessian of its inputs (:mod:`lowbit.calib.awq`).

Lin et al., arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..affine import minmax_grid
from ..spec import QuantSpec

__all__ = ["check_inputs", "check_weights", "chunk_rows", "quick_clip", "search_clip"]

# Elements of one temporary: the searches go over rows in chunks of this size, so their memory does not grow with N.
_CHUNK_ELEMENTS = 2**24

# Range of the factors tried on the min-max scale. Above 1 for symmetric grids only: there the positive side has one
# code less, and stretching (by 8/7 at 4 bits) is what stops it from clipping.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 0.35, 1.15


def search_clip(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, *, steps: int = 26, rounds: int = 2
) -> tuple[Tensor, Tensor | None]:
    """Clipping range of every group of every row, by its block of the Hessian (the paper's "weight clipping").

    All groups of all rows at once. The objective of a group is ``e H_gg e^T`` with its diagonal block ``H_gg``: its
    output error when the errors of the other groups are left aside. Candidates are min-max grids shrunk on both sides
    or (asymmetric) on one, then zeros one code up or down, then the least-squares scale of the codes found, each kept
    where it lowers the objective: no group ends above its min-max grid.

    Args:
        weight: ``(N, K)`` floating point.
        hessian: ``(K, K)``, in the dtype to compute in.
        steps: number of factors below 1 tried on the min-max scale.
        rounds: how often zeros and least-squares scales are tried after that.

    Returns:
        scales ``(N, G)`` in the Hessian's dtype, zeros ``(N, G)`` uint8 or None.
    """
    check_inputs([weight], hessian, spec)
    if steps < 1 or rounds < 0:
        raise ValueError(f"steps must be at least 1 and rounds at least 0, got {steps} and {rounds}")
    blocks = _diagonal_blocks(hessian, spec.num_groups(weight.shape[1]))
    chunks = weight.to(hessian.dtype).split(chunk_rows(weight.shape[1]))
    parts = [_search_clip_rows(chunk, blocks, spec, steps, rounds) for chunk in chunks]
    scales = torch.cat([scales for scales, _ in parts])
    return scales, None if spec.symmetric else torch.cat([zeros for _, zeros in parts if zeros is not None])


def quick_clip(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """:func:`search_clip` at about a fifth of its cost: what AWQ's scale search ranks its candidates by."""
    return search_clip(weight, hessian, spec, steps=8, rounds=1)


def check_inputs(weights: Sequence[Tensor], hessian: Tensor, spec: QuantSpec) -> None:
    """ValueError unless there are weights, all ``(N_i, K)``, and a finite ``hessian (K, K)`` for their input."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.is_floating_point():
        raise ValueError(f"hessian must be (K, K) floating point, got {tuple(hessian.shape)} {hessian.dtype}")
    check_weights(weights, hessian.shape[0], spec)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian holds NaN or infinite values; the calibration inputs were not finite")


def check_weights(weights: Sequence[Tensor], k: int, spec: QuantSpec) -> None:
    """ValueError unless there are weights, all ``(N_i, k)``, whose rows the spec's groups divide."""
    if not weights:
        raise ValueError("weights must hold at least one (N, K) tensor, got none")
    for w in weights:
        if w.ndim != 2 or w.shape[1] != k or w.shape[0] == 0:
            raise ValueError(f"a weight must be (N, {k}) with N > 0 as its input is {k} wide, got {tuple(w.shape)}")
    spec.num_groups(k)


def chunk_rows(columns: int) -> int:
    """How many rows of so many columns are one temporary."""
    return max(1, _CHUNK_ELEMENTS // columns)


def _diagonal_blocks(hessian: Tensor, num_groups: int) -> Tensor:
    """``(G, g, g)`` blocks on the diagonal."""
    g = hessian.shape[0] // num_groups
    split = hessian.reshape(num_groups, g, num_groups, g)
    return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _search_clip_rows(
    weight: Tensor, blocks: Tensor, spec: QuantSpec, steps: int, rounds: int
) -> tuple[Tensor, Tensor | None]:
    """:func:`search_clip` for a chunk of rows. Works on ``(G, n, g)`` so that the loss is one batched matmul."""
    groups = blocks.shape[0]
    w = weight.reshape(weight.shape[0], groups, -1).transpose(0, 1).contiguous()
    start, start_zeros = minmax_grid(weight, spec)
    scale = start.T.unsqueeze(-1)
    zero = torch.full_like(scale, spec.mid_code) if start_zeros is None else start_zeros.T.unsqueeze(-1).to(w.dtype)

    def codes(scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale + zero).round_().clamp_(0, spec.max_code) - zero

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        error = codes(scale, zero) * scale - w
        return (torch.bmm(error, blocks) * error).sum(-1, keepdim=True)

    best = loss(scale, zero)

    def consider(other_scale: Tensor, other_zero: Tensor) -> None:
        nonlocal scale, zero, best
        other = loss(other_scale, other_zero)
        better = other < best
        scale = torch.where(better, other_scale, scale)
        zero = torch.where(better, other_zero, zero)
        best = torch.where(better, other, best)

    minmax, minmax_zero, ends = scale, zero, (-zero * scale, (spec.max_code - zero) * scale)
    width = (1.0 - _SMALLEST_FACTOR) / steps
    count = steps + (int((_LARGEST_FACTOR - 1.0) / width) if spec.symmetric else 0)
    for step in range(count):
        factor = _SMALLEST_FACTOR + width * (step + (step >= steps))
        consider(minmax * factor, minmax_zero)
        if not spec.symmetric:
            for low, high in ((ends[0] * factor, ends[1]), (ends[0], ends[1] * factor)):
                one_sided = (high - low) / spec.max_code
                consider(one_sided, (-low / one_sided).round())
    for _ in range(rounds):
        if not spec.symmetric:
            for shift in (-1, 1):
                moved = (zero + shift).clamp(0, spec.max_code)
                consider(_least_squares_scale(w, codes(scale, moved), blocks, scale), moved)
        for _ in range(2):
            consider(_least_squares_scale(w, codes(scale, zero), blocks, scale), zero)
    scales = scale.squeeze(-1).T.contiguous()
    return scales, None if spec.symmetric else zero.squeeze(-1).T.to(torch.uint8).contiguous()


def _least_squares_scale(w: Tensor, codes: Tensor, blocks: Tensor, otherwise: Tensor) -> Tensor:
    """``argmin_s (s q - w) H_gg (s q - w)^T = (q H w) / (q H q)``; ``otherwise`` where that is not positive."""
    weighted = torch.bmm(codes, blocks)
    top, bottom = (weighted * w).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
    fit = top / torch.where(bottom > 0, bottom, 1.0)
    return torch.where((bottom > 0) & (fit > 0), fit, otherwise)

"""The second moment of a linear's inputs, which is the Hessian of its squared output error (GPTQ, section 3.1).

H = E[x x^T]        (K, K) float32        loss of Q for W:  trace((Q - W) H (Q - W)^T) = E |Q x - W x|^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CrossMoment", "Hessian", "all_finite", "corrected_target", "output_loss"]

# Columns of the symmetric product are computed in up to so many stripes, each from its diagonal on: 8 are 9/16 of the
# work, 4 are 5/8. Narrower ones than this are slower (float32: MKL on a Xeon; bfloat16: oneDNN on an EPYC).
_STRIPES = {torch.float32: 8, torch.bfloat16: 4}
_NARROWEST = {torch.float32: 96, torch.bfloat16: 192}
_ROWS = 512  # of the product of two streams, and tokens converted for it, at a time: bounds the temporaries
_MIRRORED = 128  # rows and columns of the upper triangle that are copied to the lower one at a time
_CHUNK = 1 << 24  # weights whose loss is computed at a time
_WIDEST_FLOAT64 = 8192  # columns: 512 MiB of sums


def _sums(k: int, products: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros ``(K, K)``, wide enough for the order of the additions not to show: ranks then agree with one process.

    A CPU's bfloat16 chunk sums have 8 bits and fit float32; those of 24 bits need float64.
    """
    wide = products == torch.float32 and k <= _WIDEST_FLOAT64
    return torch.zeros(k, k, dtype=torch.float64 if wide else torch.float32, device=device)


def _add_products(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Add ``a^T b`` to ``total`` for every ``a`` of ``left`` and ``b`` of ``right``, in place."""
    if total.dtype == torch.float64 and left:
        total += _sum_of_products(left, right)
        return
    for a, b in zip(left, right, strict=True):
        if total.dtype == a.dtype:
            total.addmm_(a.t(), b)
        else:
            total += a.t() @ b


def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    # On a CPU two products of half the tokens at once take 0.8 to 0.9 of the time of one that all threads share.
    parts = 2 if left[0].device.type == "cpu" and all(len(a) % 2 == 0 for a in left) else 1
    factors = [(a.unflatten(0, (parts, -1)).mT, b.unflatten(0, (parts, -1))) for a, b in zip(left, right, strict=True)]
    product = torch.bmm(*factors[0])
    for a, b in factors[1:]:
        product.baddbmm_(a, b)
    return product.sum(0)


class Hessian:
    """Running mean of ``x x^T`` over tokens.

    Args:
        k: input features.
        device: where to accumulate.
        products: dtype to multiply in, float32 or, on a CPU, bfloat16.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float32) -> None:
        self._sum, self._products = _sums(k, products, device), products
        self.tokens = 0

    def add(self, *chunks: Tensor) -> None:
        """Add chunks of inputs, each ``(tokens, K)``, any floating dtype.

        Products are summed in float32 within a chunk, where those of 16-bit numbers are exact, and over the chunks of
        one call if they need no conversion. With products in bfloat16 the inputs are rounded to it, which adds 2**-16
        of the diagonal at most, and so is a chunk's sum, for which torch has no float32 result on a CPU: at most 2**-8
        of each entry, averaged out over the chunks.

        A NaN or infinity among the inputs shows in :meth:`mean`.

        Raises:
            ValueError: wrong width.
        """
        k = self._sum.shape[0]
        for x in chunks:
            if x.ndim != 2 or x.shape[1] != k:
                raise ValueError(f"expected inputs (tokens, {k}), got {tuple(x.shape)}")
        if len(chunks) > 1 and any(x.dtype != self._products or x.device != self._sum.device for x in chunks):
            for x in chunks:  # one copy at a time
                self.add(x)
            return
        moved = [x.to(self._sum.device, self._products) for x in chunks]
        width = -(-k // min(_STRIPES[self._products], max(1, k // _NARROWEST[self._products])))
        for start in range(0, k, width):
            rows = self._sum[start : start + width, start:]
            _add_products(rows, [x[:, start : start + width] for x in moved], [x[:, start:] for x in moved])
        self.tokens += sum(len(x) for x in chunks)

    @property
    def sums(self) -> list[Tensor]:
        """The running sums themselves: who adds other tokens' sums to them adds to ``tokens`` too."""
        return [self._sum]

    def merge_(self, other: Hessian) -> Hessian:
        """Take in another token set's sums; returns self."""
        self._sum += other._sum
        self.tokens += other.tokens
        return self

    def mean(self) -> Tensor:
        """``E[x x^T]`` as a new symmetric ``(K, K)`` float32 tensor.

        Raises:
            ValueError: no token was seen (a hook that never fired would otherwise turn GPTQ into rounding), or the
                inputs held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("the Hessian has seen no tokens: the linear was not reached by the calibration data")
        hessian = torch.empty_like(self._sum, dtype=torch.float32)
        torch.div(self._sum, self.tokens, out=hessian)
        hessian.triu_()
        for start in range(0, len(hessian), _MIRRORED):  # in place: fresh memory would cost more than what is written
            rows, stop = hessian[start : start + _MIRRORED], start + _MIRRORED
            rows[:, start:stop] += rows[:, start:stop].triu(1).t()
            hessian[stop:, start:stop] = rows[:, stop:].t()
        if not all_finite(hessian):
            raise ValueError("the calibration inputs of this linear contain NaN or infinite values")
        return hessian


def all_finite(x: Tensor) -> bool:
    """Whether ``x``, of at most 32 bits, holds neither NaN nor infinity: its sum in float64 has room, and tells."""
    return math.isfinite(float(x.sum(dtype=torch.float64)))


def output_loss(candidate: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """``E |Q x - W x|^2`` per output row: shapes ``(N, K)``, ``(N, K)``, ``(K, K)`` -> ``(N,)``."""
    rows = max(1, _CHUNK // weight.shape[1])  # bounds the memory of wide layers
    losses = []
    for q, w in zip(candidate.split(rows), weight.split(rows), strict=True):
        error = q - w
        losses.append((error @ hessian).mul_(error).sum(1))
    return torch.cat(losses)


class CrossMoment:
    """Running ``E[(x - y) y^T]`` and ``E[y y^T]`` over the tokens that both streams have seen.

    x is a linear's input in the original model, y in the model whose earlier layers are quantized. Together they give
    the weight that undoes, as far as this linear can, what the earlier layers did (:func:`corrected_target`).
    """

    def __init__(self, k: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float32) -> None:
        self._cross, self._products = _sums(k, products, device), products
        self.hessian = Hessian(k, device, products)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.hessian.tokens

    @tokens.setter
    def tokens(self, count: int) -> None:
        self.hessian.tokens = count

    @property
    def sums(self) -> list[Tensor]:
        """As :attr:`Hessian.sums`."""
        return [self._cross, *self.hessian.sums]

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Add the same tokens' inputs from both streams, each ``(tokens, K)``."""
        if original.shape != quantized.shape:
            raise ValueError(f"streams differ in shape: {tuple(original.shape)} and {tuple(quantized.shape)}")
        # The drift enters as a correction only: bfloat16 is precise enough for its products, and much faster on a GPU.
        # float16 has the precision but not the range. The difference is taken before it is rounded.
        device = self._cross.device
        rounded = device.type != "cpu" and original.dtype == quantized.dtype == torch.bfloat16
        factors = torch.bfloat16 if rounded else self._products
        if device.type == "cpu" and original.dtype != factors == torch.float32 and len(original) > _ROWS:
            for parts in zip(original.split(_ROWS), quantized.split(_ROWS), strict=True):  # whose copies are small
                self.add(*parts)
            return
        wide = torch.promote_types(original.dtype, factors)
        original, quantized = original.to(device, wide), quantized.to(device, wide)
        drift, quantized = (original - quantized).to(factors), quantized.to(factors)
        for total, part in zip(self._cross.split(_ROWS), drift.split(_ROWS, dim=1), strict=True):
            total += part.t() @ quantized
        self.hessian.add(quantized)

    def target(self, weight: Tensor) -> Tensor:
        """:func:`corrected_target` of a weight ``(N, K)``, damped for the number of tokens seen.

        K regressors estimated from n tokens carry noise of order K / n relative to the inputs' energy; damping by twice
        that fraction keeps the correction where the data supports it, on text unlike the calibration's too.
        """
        k = self._cross.shape[0]
        damp_frac = max(0.01, 2 * k / self.tokens)
        cross = (self._cross / self.tokens).float()
        return corrected_target(weight, cross, self.hessian.mean(), damp_frac=damp_frac)


def corrected_target(weight: Tensor, cross: Tensor, hessian: Tensor, *, damp_frac: float) -> Tensor:
    """The weight T that brings ``T y`` closest to ``W x``: ``T = W + W E[(x-y) y^T] (E[y y^T] + damping)^-1``.

    GPTQ compares ``Q y`` with ``W y`` and so never corrects what earlier layers got wrong; GPTAQ (arXiv 2504.02692)
    and Qronos (arXiv 2505.11695) compare with ``W x``, the output of the original model. For squared error that is
    GPTQ with T in the place of W, which is what this returns.

    Args:
        weight: ``(N, K)``.
        cross, hessian: ``E[(x-y) y^T]`` and ``E[y y^T]``, each ``(K, K)`` float32.
        damp_frac: fraction of the mean diagonal added to the diagonal; the larger, the closer T stays to W.

    Returns:
        ``(N, K)`` float32; ``weight`` itself when the damped second moment is not positive definite.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp_frac * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    weight = weight.float()
    if int(failed):
        return weight
    if weight.shape[0] <= weight.shape[1]:
        return weight + torch.cholesky_solve((weight @ cross).t(), lower).t()
    return weight + weight @ torch.cholesky_solve(cross.t(), lower).t()  # K systems instead of N

"""AWQ's scales of one decoder block: found on the unquantized block, group by group, then folded into it.

The experts of a layer read the same input and so share its scales, but each its own tokens. Their search is one: every
expert's error is measured with the Hessian of the tokens routed to it and counts by their number, shared experts' with
that of all tokens. An expert with fewer tokens than inputs is helped out as in calibration (:mod:`lowbit.routed`), and
its down projection, whose inputs exist for its own tokens only, is left without a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .calib.awq import ScaleSearch
from .calib.hessian import Hessian
from .distributed import Ranks
from .fold import apply_fold
from .mappings import NOT_QUANTIZED, Fold
from .routed import RoutedInputs
from .spec import QuantSpec

__all__ = ["TOO_FEW", "Folding"]

TOO_FEW = "too few calibration tokens for a scale of its own"


@dataclass
class _Search:
    """One fold's: what it has seen of ``fold.balance``."""

    fold: Fold
    search: ScaleSearch | None = None
    tokens: int = 0
    seen: set[str] = field(default_factory=set)


class Folding:
    """The scales of a block's folds, searched for while the block's inputs go by.

    Args:
        modules: the block's linears, by their names in it.
        folds: of the block, tested (:func:`lowbit.fold.exact_folds`).
        quantized: names of the linears that will be quantized, of which the Hessians are to come.
        ranks: each tries a part of the candidates.

    Attributes:
        reasons: linear -> why no scale enters it; the caller's, which it adds to.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Linear],
        folds: Sequence[Fold],
        quantized: set[str],
        spec: QuantSpec,
        ranks: Ranks,
        reasons: dict[str, str],
    ) -> None:
        self._modules, self._spec, self._ranks, self.reasons = modules, spec, ranks, reasons
        self._searches: list[_Search] = []
        for fold in folds:
            if quantized.issuperset(fold.balance):
                self._searches.append(_Search(fold))
            else:
                reasons.update(dict.fromkeys(fold.balance, NOT_QUANTIZED))

    def wants(self, names: Sequence[str]) -> bool:
        """Whether any of these linears' inputs are scaled by a fold."""
        return any(name in one.fold.balance for one in self._searches for name in names)

    def take(self, names: Sequence[str], own: Hessian, routed: RoutedInputs) -> None:
        """Score the candidates on linears that read one tensor.

        Args:
            names: the linears, relative to the block.
            own: of their inputs, over all tokens of all ranks.
            routed: has seen what enters the experts, if these are some.
        """
        hessian, starved = routed.resolve(names[0], own)
        for one in list(self._searches):
            found = [name for name in one.fold.balance if name in names]
            if not found:
                continue
            if hessian is None or (starved is not None and one.fold.rows is not None):
                self._searches.remove(one)
                self.reasons.update(dict.fromkeys(found, TOO_FEW))
                continue
            self._score(one, found, own.tokens, hessian, routed.everyone(names[0]))

    def _score(
        self, one: _Search, names: Sequence[str], tokens: int, hessian: Tensor, everyone: Hessian | None
    ) -> None:
        if one.search is None:
            one.tokens = tokens if everyone is None else everyone.tokens
            magnitude = (hessian if everyone is None else everyone.mean()).diagonal().clamp(min=0).sqrt()
            weights = [self._modules[name].weight for name in one.fold.balance]
            part = self._ranks.rank, self._ranks.count
            one.search = ScaleSearch(weights, magnitude, self._spec, channels=one.fold.channel_ids(), part=part)
        if tokens:  # of no token there is no error
            share = tokens / one.tokens
            one.search.add([self._modules[name].weight for name in names], hessian, [share] * len(names))
        one.seen.update(names)

    def apply(self, block: nn.Module) -> None:
        """Move the scales found into the block, which is to hold float32 or float64."""
        for one in self._searches:
            if one.search is None or one.seen != set(one.fold.balance):
                raise RuntimeError(f"{sorted(set(one.fold.balance) - one.seen)} did not come by: no scale for them")
            found = one.search.best()
            tried = self._ranks.collect(((found.loss, found.alpha, found.duo), found.scales.cpu()))
            apply_fold(block, one.fold, min(tried, key=lambda result: result[0])[1].to(found.scales))

"""Which of several ways to group heads costs least, measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm import tqdm

from spdcompile.passes.base import RegionKind
from spdcompile.plan import HeadGroups, Router
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.grouping import Groups, random_groups
from spdcompile.runtime.hidden import hidden_states
from spdcompile.runtime.record import Record
from spdcompile.undropped import Source

_POINT = RegionKind.ATTENTION.value
_MEMORY = 2**30  # bytes of hidden states, beyond which they go to files


@dataclass(frozen=True, slots=True)
class Best:
    """The groups of a layer that cost least.

    Args:
        kl, kl_paper, kl_even: KL divergence per token, in nats, with the layer's attention point
            dropped: with these groups, the paper's, and the even split.
    """

    groups: Groups
    kl: float
    kl_paper: float
    kl_even: float


class Candidates:
    """Measures ways to group the heads of all layers at once, each layer's drop by itself.

    Args:
        tokens: int64 [chunks, length].
        router: what routers read where a dropped point is pending.
    """

    def __init__(self, source: Source, tp: int, tokens: Tensor, router: Router) -> None:
        self._source, self._tp, self._tokens, self._router = source, tp, tokens, router

    def best(
        self, paper: HeadGroups, even: HeadGroups, draws: int, *, progress: bool = True
    ) -> dict[int, Best]:
        """Layer -> the cheapest of the paper's groups, the even split, and random ones.

        Args:
            paper, even: layer -> units of each rank.
            draws: how many random candidates.
        """
        candidates = [paper, even, *self._drawn(even, draws)]
        shown = tqdm(candidates, desc="head groups", unit="way", disable=not progress)
        costs = [self._costs(groups) for groups in shown]
        found = {}
        for layer in paper:
            by_candidate = [cost[layer] for cost in costs]
            place = int(np.argmin(by_candidate))
            groups = candidates[place][layer]
            found[layer] = Best(groups, by_candidate[place], *by_candidate[:2])
        return found

    def _drawn(self, even: HeadGroups, draws: int) -> list[HeadGroups]:
        """Random groups; those of a layer do not depend on which others are grouped."""
        numbers = {layer: sum(map(len, groups)) for layer, groups in even.items()}
        generators = {layer: np.random.default_rng(layer) for layer in even}
        return [
            {layer: random_groups(numbers[layer], self._tp, generators[layer]) for layer in even}
            for _ in range(draws)
        ]

    def _costs(self, groups: HeadGroups) -> dict[int, float]:
        """Layer -> KL divergence with its attention point dropped."""
        lowering = self._source.lowering(self._tp, groups)
        with hidden_states(None, _MEMORY) as states:
            evaluator = Evaluator(
                lowering,
                self._source.executor(lowering),
                self._tokens,
                states=states,
                record=Record(None, ""),
                router=self._router,
            )
            found = {layer: evaluator.quality({(layer, _POINT)}).kl for layer in groups}
        assert all(kl is not None for kl in found.values()), "an evaluation measures it"
        return {layer: kl for layer, kl in found.items() if kl is not None}

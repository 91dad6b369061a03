"""Rank correlation, and how likely chance gives as much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PERMUTATIONS = 10_000


def ranks(values: Sequence[float]) -> np.ndarray:
    """The rank of each value from 1 on; equal values share the mean of theirs."""
    array = np.asarray(values, dtype=float)
    smaller = (array[None] < array[:, None]).sum(1)
    equal = (array[None] == array[:, None]).sum(1)
    return smaller + (equal + 1) / 2


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant."""
    return _pearson(ranks(one), ranks(other))


def chance(one: Sequence[float], other: Sequence[float]) -> float:
    """How often a random order gives a correlation as far from zero, by 10,000 of them."""
    generator = np.random.default_rng(0)
    first, second = ranks(one), ranks(other)
    found = abs(_pearson(first, second)) - 1e-12
    if not first.std() or not second.std():
        return 1.0
    centred = (second - second.mean()) / (second.std() * len(second) * first.std())
    orders = generator.permuted(np.tile(first, (_PERMUTATIONS, 1)), axis=1)
    return float((np.abs(orders @ centred) >= found).mean())


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    spread = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread else 0.0

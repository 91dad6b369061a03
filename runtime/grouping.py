"""Which units share a rank: the partition into groups with the largest distances within them."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from spdcompile.passes.layout import even_split

MOST_PARTITIONS = 20_000
"""Up to so many partitions are all tried; about a second of them."""
_RESTARTS = 32

Groups = tuple[tuple[int, ...], ...]


class Search(enum.Enum):
    """How the groups of a layer were found."""

    EXHAUSTIVE = "exhaustive"
    LOCAL = "local search"
    NOTHING = "one unit a rank: nothing to choose"


def best_groups(
    distances: np.ndarray, tp: int, *, most: int = MOST_PARTITIONS
) -> tuple[Groups, Search]:
    """The groups with the largest sum of distances between the units of a group.

    Args:
        distances: float [U, U], symmetric, of each unit to each other one.
        tp: number of groups; their sizes are those of the even split.
        most: with more partitions than this a local search from several starts takes over, which
            may miss the best one.

    Returns: tp groups of ascending units, in no particular order; and how they were found.
    """
    even = even_split(len(distances), tp)
    sizes = sorted((len(group) for group in even if group), reverse=True)
    if sizes[0] == 1:
        return even, Search.NOTHING
    empty = ((),) * (tp - len(sizes))
    if num_partitions(sizes) <= most:
        every = partitions(tuple(range(len(distances))), tuple(sizes))
        return (
            *max(every, key=lambda groups: within(distances, groups)),
            *empty,
        ), Search.EXHAUSTIVE
    return (*_by_swaps(distances, sizes), *empty), Search.LOCAL


def random_groups(num_units: int, tp: int, generator: np.random.Generator) -> Groups:
    """Units dealt to the ranks at random, in groups of the even split's sizes, each ascending."""
    order = generator.permutation(num_units)
    return tuple(tuple(sorted(order[list(group)].tolist())) for group in even_split(num_units, tp))


def within(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """The sum of distances between the units of a group, over all groups."""
    return sum(float(distances[np.ix_(group, group)].sum()) / 2 for group in groups if group)


def num_partitions(sizes: Sequence[int]) -> int:
    """In how many ways units fall into unordered groups of these sizes."""
    ordered = math.factorial(sum(sizes))
    for size in sizes:
        ordered //= math.factorial(size)
    for count in Counter(sizes).values():
        ordered //= math.factorial(count)
    return ordered


def partitions(units: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Groups]:
    """Each partition of ascending units into unordered groups of these sizes, once."""
    if not units:
        yield ()
        return
    first, *others = units
    for size in sorted(set(sizes)):
        left = list(sizes)
        left.remove(size)
        for mates in combinations(others, size - 1):
            rest = tuple(unit for unit in others if unit not in mates)
            for groups in partitions(rest, tuple(left)):
                yield ((first, *mates), *groups)


def _by_swaps(distances: np.ndarray, sizes: Sequence[int]) -> Groups:
    """The best of several starts, each improved by exchanging two units while that helps."""
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    best, most = owners, -math.inf
    for start in range(_RESTARTS):
        found = _improved(distances, owners if start == 0 else generator.permutation(owners))
        value = float(distances[found[:, None] == found[None]].sum())
        if value > most:
            best, most = found, value
    return tuple(tuple(np.flatnonzero(best == group).tolist()) for group in range(len(sizes)))


def _improved(distances: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Exchanges the two units that help most, until none do.

    Args:
        owners: the group of each unit, int [U].
    """
    owners = owners.copy()
    num_groups = int(owners.max()) + 1
    tolerance = 1e-9 * float(np.abs(distances).max(initial=0.0))  # rounding is no gain
    while True:
        to_group = distances @ np.eye(num_groups)[owners]  # [U, groups]
        to_other = to_group[:, owners]  # of each unit to the group of each other one
        own = np.diagonal(to_other)
        gains = to_other + to_other.T - own[:, None] - own[None] - 2 * distances
        gains[owners[:, None] == owners[None]] = 0
        one, other = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[one, other] <= tolerance:
            return owners
        owners[[one, other]] = owners[[other, one]]

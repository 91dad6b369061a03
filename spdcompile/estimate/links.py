"""What collectives take: alpha and beta, given or fitted to measured ones, within nodes and across.

A collective over n ranks that goes round a ring takes `base_s`, and for each of its steps `hop_s`
and the time of 1/n of its bytes: n - 1 steps for an all-gather, twice as many for an all-reduce.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spdcompile.estimate.counting import Kind
from spdcompile.estimate.work import Exchange


@dataclass(frozen=True, slots=True)
class Timed:
    """A collective that was measured.

    Args:
        num_bytes: of its result, on each rank.
    """

    kind: Kind
    ranks: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Way:
    """One way to exchange: a protocol of the library, a ring.

    Args:
        base_s: of a collective, however many ranks there are.
        hop_s: of each of its steps.
        s_per_byte: of what a rank sends, and at the same time receives; the inverse of the bus
            bandwidth.
    """

    base_s: float
    hop_s: float
    s_per_byte: float

    def seconds(self, kind: Kind, num_bytes: int, ranks: int) -> float:
        """Of one collective; 0 for a single rank."""
        if ranks == 1:
            return 0.0
        hops = _hops(kind, ranks)
        return self.base_s + hops * (self.hop_s + num_bytes / ranks * self.s_per_byte)


@dataclass(frozen=True, slots=True)
class Link:
    """What ranks exchange through.

    Args:
        ways: of which the fastest is taken, as communication libraries do by size.
        across: between nodes, shared by the ranks of a node.
        nodes: over which ranks are spread evenly, with `across`.
        measured: what the ways were fitted to.
    """

    name: str
    ways: tuple[Way, ...]
    across: Link | None = None
    nodes: int = 1
    measured: tuple[Timed, ...] = ()
    sources: tuple[str, ...] = ()

    def seconds(self, exchange: Exchange, ranks: int) -> float:
        """Of one collective over so many ranks; 0 for a single one."""
        return self.of(exchange.kind, exchange.num_bytes, ranks)

    def of(self, kind: Kind, num_bytes: int, ranks: int) -> float:
        """The same of a collective with a result of so many bytes."""
        if self.across is None:
            return min(way.seconds(kind, num_bytes, ranks) for way in self.ways)
        nodes = min(self.nodes, ranks)
        per_node = math.ceil(ranks / nodes)
        within = min(way.seconds(kind, num_bytes, per_node) for way in self.ways)
        return within + self.across.of(kind, num_bytes, nodes)


def _hops(kind: Kind, ranks: int) -> int:
    """A sum goes round twice: to be summed, then to be known to all."""
    return (2 if kind is Kind.ALL_REDUCE else 1) * (ranks - 1)


def fitted(rows: Sequence[Timed], hop_s: float | None = None) -> Way:
    """The way that is nearest to measured collectives, by the squares of relative errors.

    Args:
        hop_s: what a step takes; found too if None, for which numbers of ranks or kinds of
            collectives must differ.

    Returns: constants that are 0 or more.
    """
    seconds = np.array([row.seconds for row in rows])
    hops = np.array([float(_hops(row.kind, row.ranks)) for row in rows])
    moved = hops * [row.num_bytes / row.ranks for row in rows]
    columns = [np.ones_like(seconds), hops, moved]
    known = 0.0 if hop_s is None else hop_s
    if hop_s is not None:
        columns[1] = np.zeros_like(seconds)
    matrix = np.stack(columns, 1) / seconds[:, None]
    scale = np.abs(matrix).max(0)  # constants are of other magnitudes than their equations
    scale[scale == 0] = 1.0
    matrix /= scale
    target = (seconds - known * hops) / seconds
    # Few enough unknowns to try all sets of those that are not 0.
    best: tuple[float, np.ndarray] | None = None
    for count in range(1, 4):
        for chosen in itertools.combinations(range(3), count):
            found = np.zeros(3)
            found[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            error = float(np.square(matrix @ found - target).sum())
            if (found >= 0).all() and (best is None or error < best[0] * (1 - 1e-9)):
                best = error, found
    assert best is not None, "one constant alone fits positive times"
    base, hop, per_byte = map(float, best[1] / scale)
    return Way(base, hop + known, per_byte)

"""How the indices of a split dim fall into units, and units onto ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

Assignment = tuple[tuple[int, ...], ...]
"""Units per rank: `assignment[rank]` lists unit ids in ascending order."""

EVERY = -1
"""Owner of an index that every rank holds."""


class UnevenLayoutError(ValueError):
    """The units along a dim do not form whole, equal runs, so no rank-independent split exists."""


class Run(NamedTuple):
    """A stretch of a dim that the ranks share in one way.

    Args:
        start: its first index.
        length: how many indices it has.
        each: indices per unit, those of a shared group counted for each of its units; 0 where
            every rank holds the whole run.
        group: units that share the same indices; 1 where each unit has its own.
    """

    start: int
    length: int
    each: int
    group: int

    def local_size(self, units: int) -> int:
        """Its size on a rank with that many units."""
        return self.each * units if self.each else self.length


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Which unit owns each index of a split dim.

    Owners fall into *runs*. In a run of units every unit appears once, in order, with the same
    number of indices: a fused [q | k | v] output is three of them, a plain projection one. In a
    run of groups the indices belong to `copies` consecutive units each, which all hold them: a K/V
    head whose query heads are on several ranks. A run of EVERY is held by all ranks.

    Args:
        region: name of the region whose units these are.
        num_units: how many units the region has.
        owners: int64 [N]: unit u, or num_units + g for group g, or EVERY.
        copies: units in a group.
    """

    region: str
    num_units: int
    owners: np.ndarray
    copies: int = 1
    runs: tuple[Run, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self._find_runs()))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and (self.region, self.copies) == (other.region, other.copies)
            and np.array_equal(self.owners, other.owners)
        )

    def __hash__(self) -> int:
        return hash((self.region, self.num_units, len(self.owners)))

    def __len__(self) -> int:
        return len(self.owners)

    def _find_runs(self) -> list[Run]:
        """The runs in order.

        Raises:
            UnevenLayoutError: a stretch that does not hold every unit equally often, in order.
        """
        kinds = np.where(self.owners == EVERY, 0, np.where(self.owners < self.num_units, 1, 2))
        breaks = (np.diff(self.owners) < 0) | (np.diff(kinds) != 0)
        runs = []
        for start, stop in pairwise([0, *(np.flatnonzero(breaks) + 1), len(self.owners)]):
            length, kind = int(stop - start), kinds[start]
            if kind == 0:
                runs.append(Run(int(start), length, 0, 1))
                continue
            first, group = (0, 1) if kind == 1 else (self.num_units, self.copies)
            each, rest = divmod(length, self.num_units // group)
            expected = first + np.repeat(np.arange(self.num_units // group), each)
            if rest or not np.array_equal(self.owners[start:stop], expected):
                raise UnevenLayoutError(
                    f"indices {start}..{stop} do not hold each of {self.num_units // group} units "
                    "equally"
                )
            runs.append(Run(int(start), length, each, group))
        return runs

    @property
    def times_held(self) -> int | None:
        """How many units hold each index; None if that differs between the runs."""
        groups = {run.group if run.each else None for run in self.runs}
        return groups.pop() if len(groups) == 1 else None

    def local_size(self, units_per_rank: int) -> int:
        """Size of the dim on one rank."""
        return sum(run.local_size(units_per_rank) for run in self.runs)

    def local_offset(self, index: int, units_per_rank: int) -> int:
        """Where an index of the global dim that no unit's indices straddle lies on a rank.

        Raises:
            UnevenLayoutError: `index` lies inside a run of units.
        """
        local = 0
        for run in self.runs:
            if run.start == index:
                return local
            if run.start < index < run.start + run.length:
                if run.each:
                    raise UnevenLayoutError(f"index {index} lies inside a run of units")
                return local + index - run.start
            local += run.local_size(units_per_rank)
        return local

    def indices(self, units: tuple[int, ...], units_per_rank: int) -> np.ndarray:
        """Global indices of the given units in local order; -1 where a missing unit is padded."""
        pieces = []
        for run in self.runs:
            if not run.each:
                pieces.append(np.arange(run.start, run.start + run.length))
                continue
            local = np.full((units_per_rank, run.each), -1, dtype=np.int64)
            first = run.start + np.array(units, dtype=np.int64) // run.group * run.each
            local[: len(units)] = first[:, None] + np.arange(run.each)
            pieces.append(local.reshape(-1))
        return np.concatenate(pieces)


@dataclass(frozen=True, eq=False, slots=True)
class ShardSpec:
    """How a parameter is cut: rank r holds `index[r]` along `dim`; -1 stands for zeros.

    What several units share occurs on several ranks, or several times on one.

    Args:
        index: int64 [tp, local size].
    """

    dim: int
    index: np.ndarray

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """All ranks' shards of a global tensor, stacked: [tp, ...]."""
        ranks = [self.shard_of(whole, rank) for rank in range(len(self.index))]
        return torch.stack(ranks)

    def shard_of(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """One rank's shard of a global tensor."""
        index = torch.from_numpy(self.index[rank]).to(whole.device)
        local = whole.index_select(self.dim, index.clamp(min=0))
        if bool((index >= 0).all()):
            return local
        shape = [-1 if dim == self.dim else 1 for dim in range(whole.dim())]
        return local * (index >= 0).view(shape).to(local.dtype)

    def unshard(self, stacked: torch.Tensor, size: int) -> torch.Tensor:
        """The global tensor that stacked shards [tp, ...] came from; padding is left out.

        Of an entry that occurs several times, one is taken: they are equal.
        """
        shape = list(stacked.shape[1:])
        shape[self.dim] = size
        whole = stacked.new_zeros(shape)
        for rank, index in enumerate(self.index):
            keep = torch.from_numpy(np.flatnonzero(index >= 0))
            target = torch.from_numpy(index[index >= 0])
            whole.index_copy_(self.dim, target, stacked[rank].index_select(self.dim, keep))
        return whole

    @property
    def local_size(self) -> int:
        """Size along `dim` on each rank."""
        return self.index.shape[1]

    @property
    def repeated(self) -> int:
        """Entries along `dim`, over all ranks, that are there already once."""
        held = self.index[self.index >= 0]
        return len(held) - len(np.unique(held))

    @property
    def padded(self) -> int:
        """Entries along `dim`, over all ranks, that are padding."""
        return int((self.index < 0).sum())


def even_split(num_units: int, tp: int) -> Assignment:
    """Units in order over the ranks; the first `num_units % tp` ranks get one more."""
    bounds = [rank * (num_units // tp) + min(rank, num_units % tp) for rank in range(tp + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def shard_spec(layout: Layout, dim: int, assignment: Assignment) -> ShardSpec:
    """The split of one dim under an assignment of units to ranks."""
    per_rank = max(len(units) for units in assignment)
    index = np.stack([layout.indices(tuple(sorted(u)), per_rank) for u in assignment])
    return ShardSpec(dim, index)

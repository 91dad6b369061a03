"""How the indices of a split dim fall into units, and units onto ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

Assignment = tuple[tuple[int, ...], ...]
"""Units per rank: `assignment[rank]` lists unit ids in ascending order."""


class UnevenLayoutError(ValueError):
    """The units along a dim do not form whole, equal runs, so no rank-independent split exists."""


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Which unit owns each index of a split dim.

    A *run* is a stretch in which every unit appears once, in order, with the same number of
    indices: a fused [q | k | v] output is three runs, a plain projection one.

    Args:
        region: name of the region whose units these are.
        num_units: how many units the region has.
        owners: unit of each index, int64 [N].
    """

    region: str
    num_units: int
    owners: np.ndarray

    def __post_init__(self) -> None:
        self.runs()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and self.region == other.region
            and np.array_equal(self.owners, other.owners)
        )

    def __hash__(self) -> int:
        return hash((self.region, self.num_units, len(self.owners)))

    def __len__(self) -> int:
        return len(self.owners)

    def runs(self) -> list[tuple[int, int]]:
        """(start, indices per unit) of each run.

        Raises:
            UnevenLayoutError: a stretch that does not hold every unit equally often, in order.
        """
        starts = [0, *(np.flatnonzero(np.diff(self.owners) < 0) + 1), len(self.owners)]
        runs = []
        for start, stop in pairwise(starts):
            each, rest = divmod(int(stop - start), self.num_units)
            expected = np.repeat(np.arange(self.num_units), each)
            if rest or not np.array_equal(self.owners[start:stop], expected):
                raise UnevenLayoutError(
                    f"indices {start}..{stop} do not hold each of {self.num_units} units equally"
                )
            runs.append((int(start), each))
        return runs

    def local_size(self, units_per_rank: int) -> int:
        """Size of the dim on one rank."""
        return len(self.owners) // self.num_units * units_per_rank

    def local_offset(self, index: int, units_per_rank: int) -> int:
        """Where a run boundary of the global dim lies on a rank.

        Raises:
            UnevenLayoutError: `index` is not a boundary between runs.
        """
        index = min(index, len(self.owners))
        if index not in {len(self.owners), *(start for start, _ in self.runs())}:
            raise UnevenLayoutError(f"index {index} lies inside a run of units")
        return index // self.num_units * units_per_rank

    def indices(self, units: tuple[int, ...], units_per_rank: int) -> np.ndarray:
        """Global indices of the given units in local order; -1 where a missing unit is padded."""
        pieces = []
        for start, each in self.runs():
            local = np.full((units_per_rank, each), -1, dtype=np.int64)
            local[: len(units)] = start + np.array(units)[:, None] * each + np.arange(each)
            pieces.append(local.reshape(-1))
        return np.concatenate(pieces)


@dataclass(frozen=True, eq=False, slots=True)
class ShardSpec:
    """How a parameter is cut: rank r holds `index[r]` along `dim`; -1 stands for zeros.

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
        """The global tensor that stacked shards [tp, ...] came from; padding is left out."""
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

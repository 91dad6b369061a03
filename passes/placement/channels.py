"""Channel ids and the classes that they fall into."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Channels:
    """Hands out channel ids and remembers which of them an operator has combined.

    A *shared* channel, such as one of a K/V head that several query heads read, ties none of the
    channels together that it meets: it *serves* them.

    Args:
        shared: ids of the shared channels.
    """

    def __init__(self, shared: frozenset[int] = frozenset()) -> None:
        self.count = 0
        self.hubs: set[int] = set()
        self._shared = torch.tensor(sorted(shared), dtype=torch.int64)
        self._pairs: list[Tensor] = []
        self._served: list[Tensor] = []
        self.opaque: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """New ids, int64 [size]."""
        ids = torch.arange(self.count, self.count + size)
        self.count += size
        return ids

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Puts a[j] and b[j] into one class, wherever both are ids."""
        differ = (a >= 0) & (b >= 0) & (a != b)
        if not bool(differ.any()):
            return
        pairs = torch.stack([a[differ], b[differ]]).unique(dim=1)
        if len(self._shared):
            is_shared = self._is_shared(pairs)
            serving = is_shared[0] != is_shared[1]
            server_first = torch.where(is_shared[0], pairs, pairs.flip(0))
            self._served.append(server_first[:, serving])
            pairs = pairs[:, ~serving]
        self._pairs.append(pairs)

    def need_whole(self, ids: Tensor, reason: str) -> None:
        """Says that a reader cannot do with a rank's share of these channels.

        Its result carries none of them, since it is then the same on all ranks.
        """
        self.opaque.append((ids.reshape(-1), reason))

    def merge(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """Ids of a value that combines two values of one shape elementwise."""
        if a is None or b is None:
            return a if b is None else b
        self.unite(a, b)
        return torch.where(self._rank(a) >= self._rank(b), a, b)

    def merge_along(self, ids: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Unites all ids along `dims`; returns one of them for each, with the dims kept as 1."""
        own = ids
        if len(self._shared):
            own = torch.where(self._is_shared(ids), -1, ids)
        most = own.amax(dims, keepdim=True)
        most = torch.where(most >= 0, most, ids.amax(dims, keepdim=True))
        self.unite(ids, most.expand_as(ids))
        return most

    def note_hubs(self, ids: Tensor | None, *, tied: bool = False) -> None:
        """Remembers channels that an operator hands to several others at once.

        Args:
            tied: whether with them go all those that they are united with so far.
        """
        if ids is None:
            return
        found = ids[ids >= 0].unique().numpy()
        if tied:
            classes = self.classes()
            found = np.flatnonzero(np.isin(classes, classes[found]))
        self.hubs |= set(found.tolist())

    def classes(self) -> np.ndarray:
        """Class of each id that is not shared with another class, int [count]."""
        if not self._pairs:
            return np.arange(self.count)
        return connected(torch.cat(self._pairs, dim=1).numpy(), self.count)

    def served(self) -> np.ndarray:
        """(shared id, id that it serves), int64 [2, n]."""
        if not self._served:
            return np.zeros((2, 0), dtype=np.int64)
        return torch.cat(self._served, dim=1).numpy()

    def _is_shared(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, self._shared)

    def _rank(self, ids: Tensor) -> Tensor:
        """0 where there is no id, 1 for a shared one, 2 for one of its own."""
        known = (ids >= 0).int()
        return known * 2 - (known * self._is_shared(ids).int() if len(self._shared) else 0)


def connected(pairs: np.ndarray, count: int) -> np.ndarray:
    """Class of each id, int64 [count], in the order of the classes' least ids.

    Not scipy's: that takes 36 MB, since transformers imports it too where it is installed.

    Args:
        pairs: ids in one class, int64 [2, n].
    """
    first = np.arange(count)  # an id of the same class; at its end the class's least so far
    while True:
        a, b = first[pairs]
        if np.array_equal(a, b):
            return np.unique(first, return_inverse=True)[1]
        np.minimum.at(first, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(first, first[first]):
            first = first[first]

"""Channel ids and the classes that they fall into."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


class Channels:
    """Hands out channel ids and remembers which of them an operator has combined."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[Tensor] = []
        self.opaque: dict[int, str] = {}

    def fresh(self, size: int) -> Tensor:
        """New ids, int64 [size]."""
        ids = torch.arange(self.count, self.count + size)
        self.count += size
        return ids

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Puts a[j] and b[j] into one class, wherever both are ids."""
        differ = (a >= 0) & (b >= 0) & (a != b)
        if bool(differ.any()):
            self._pairs.append(torch.stack([a[differ], b[differ]]).unique(dim=1))

    def merge(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """Ids of a value that combines two values of one shape elementwise."""
        if a is None or b is None:
            return a if b is None else b
        self.unite(a, b)
        return torch.where(a >= 0, a, b)

    def merge_along(self, ids: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Unites all ids along `dims`; returns one of them for each, with the dims kept as 1."""
        most = ids.amax(dims, keepdim=True)
        self.unite(ids, most.expand_as(ids))
        return most

    def classes(self) -> np.ndarray:
        """Class of each id, int [count]."""
        if not self._pairs:
            return np.arange(self.count)
        pairs = torch.cat(self._pairs, dim=1).numpy()
        ones = np.ones(pairs.shape[1], dtype=np.int8)
        graph = coo_array((ones, (pairs[0], pairs[1])), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]

"""Sample calls for the operators that choose entries by data; letters as in rule_samples.py."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes.rule_samples import x
from tests.passes.sample import Sample

aten = torch.ops.aten


def n(size: int, *shape: int) -> Tensor:
    """Indices into a dim of the given size, its last entry left out so that one more fits too."""
    return torch.randint(0, size - 1, shape)


READS = (
    # Tokens in the order of their experts; an expert's bias for each token.
    Sample(aten.index.Tensor, lambda b, s: (x(4 * b * s, 6), [n(4 * b * s, 6 * b * s)])),
    Sample(aten.index.Tensor, lambda b, s: (x(4, 12), [n(4, b * s)])),
    Sample(aten.index.Tensor, lambda b, s: (x(4, 6), [n(4, b, s)])),
    Sample(aten.index.Tensor, lambda b, s: (x(b, s, 4, 6), [None, None, n(4, 2)])),
    Sample(aten.index.Tensor, lambda b, s: (x(b, 4, 6, 2), [None, n(4, 3), n(6, 3)])),
    Sample(aten.index.Tensor, lambda b, s: (x(b, 4, 6, 2), [None, n(4, s, 1), n(6, 3)])),
    Sample(aten.index.Tensor, lambda b, s: (x(4, 2, 6, 3), [n(4, s), None, n(6, 1)])),
    Sample(aten.index.Tensor, lambda b, s: (x(4, 6), [n(4, b, s), n(6)])),
    Sample(aten.index_select.default, lambda b, s: (x(b, 4, 6), 1, n(4, s))),
    Sample(aten.index_select.default, lambda b, s: (x(b, 4, 6), -1, n(6, 3))),
    Sample(aten.gather.default, lambda b, s: (x(b, s, 6), 2, n(6, b, s, 2))),
    Sample(aten.gather.default, lambda b, s: (x(b, 6, 4), 1, n(6, b, s, 4))),
    Sample(aten.gather.default, lambda b, s: (x(4, 6), 0, n(4, 2, 3))),
)

WRITES = (
    Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, 3)], x(3, 6))),
    Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, 3)], x(3, 6), True)),
    Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, b, s)], x(6))),
    Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, b, s)], x())),
    Sample(aten.index_put.default, lambda b, s: (x(b, 6, 4), [None, n(6, 2)], x(b, 2, 4))),
    Sample(aten.index_put.default, lambda b, s: (x(4, 2, 6), [n(4, 3), None, n(6, 3)], x(3, 2))),
    Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, 3)], x(3, 1))),
    Sample(aten.index_add.default, lambda b, s: (x(b, 4, 6), 1, n(4, 3), x(b, 3, 6))),
    Sample(aten.index_add.default, lambda b, s: (x(4, 6), 0, n(4, b * s), x(b * s, 6))),
    Sample(aten.index_copy.default, lambda b, s: (x(b, 4, 6), -1, n(6, 3), x(b, 4, 3))),
    Sample(aten.scatter.src, lambda b, s: (x(b, s, 6), 2, n(6, b, s, 2), x(b, s, 2))),
    Sample(aten.scatter.src, lambda b, s: (x(4, 6), 0, n(4, 2, 6), x(3, 6))),
    Sample(aten.scatter.src, lambda b, s: (x(4, 6), 0, n(4, 2, 3), x(3, 6))),
    Sample(aten.scatter_add.default, lambda b, s: (x(4, 6), 0, n(4, 3, 6), x(3, 6))),
    Sample(aten.scatter.value, lambda b, s: (x(b, s, 6), 2, n(6, b, s, 2), 1.0)),
    Sample(aten.scatter.value, lambda b, s: (x(4, 6), 0, n(4, 3, 6), 0)),
)

INDEXING = (*READS, *WRITES)

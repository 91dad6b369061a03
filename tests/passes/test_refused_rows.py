"""Combinations of placements that no rule may answer, beyond those of test_placement_rules.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spdcompile.passes.ops import GROUPED_MM
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.types import P, R, Shard
from tests.passes.brute_force import splits_of
from tests.passes.indexing_samples import n
from tests.passes.rule_samples import m, multiply_groups, x
from tests.passes.sample import Sample

aten = torch.ops.aten


def split(dim: int, *shape: int) -> Shard:
    """The split of one dim into two units, in one run."""
    return next(s for s in splits_of(shape, 2) if s.dim == dim)


GROUPED = Sample(
    GROUPED_MM,
    lambda b, s: (x(4, 6), x(2, 6, 4), torch.tensor([2, 4])),
    kernel=multiply_groups,
)
ROWS, WEIGHT, ENDS = (4, 6), (2, 6, 4), (2,)
REFUSED = (
    (GROUPED, (P, P, R)),
    (GROUPED, (split(1, *ROWS), R, R)),
    (GROUPED, (split(0, *ROWS), R, R)),
    (GROUPED, (R, split(0, *WEIGHT), R)),
    (GROUPED, (split(1, *ROWS), split(2, *WEIGHT), R)),
    (GROUPED, (R, R, split(0, *ENDS))),
    (Sample(aten.index.Tensor, lambda b, s: (x(4, 6), [m(4, 6)])), (split(1, 4, 6), R)),
    (Sample(aten.index.Tensor, lambda b, s: (x(4, 6), [n(4, 3)])), (split(0, 4, 6), R)),
    (Sample(aten.index_add.default, lambda b, s: (x(4, 6), 0, n(4, 4), x(4, 6))), (R, R, P)),
    (Sample(aten.index_put.default, lambda b, s: (x(4, 6), [n(4, 4)], x(4, 6))), (P, R, R)),
    (Sample(aten.scatter.value, lambda b, s: (x(b, s, 6), 2, n(6, b, s, 6), 1.0)), (P, R)),
)


@pytest.mark.parametrize(("sample", "placements"), REFUSED, ids=str)
def test_wrong_combination_is_refused(sample: Sample, placements: Any) -> None:
    call = sample.seen.with_placements(list(placements))
    assert RULES[sample.target].place(call) is None

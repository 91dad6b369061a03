"""Combinations of placements that no rule may answer, beyond those of test_placement_rules.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spdcompile.passes.ops import GROUPED_MM
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, Operand, P, R, Shard, placed
from tests.passes.brute_force import splits_of
from tests.passes.channel_dependence import with_ids
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
ROW, COLUMN = split(0, 4, 6), split(1, 4, 6)
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
    (Sample(aten.masked_fill.Scalar, lambda b, s: (x(4, 6), m(4, 6), 1.0)), (P, R)),
    (Sample(aten.where.ScalarOther, lambda b, s: (m(4, 6), x(4, 6), 1.0)), (R, P)),
    (Sample(aten.where.self, lambda b, s: (m(4, 6), x(4, 6), x(4, 6))), (R, P, R)),
    (Sample(aten.constant_pad_nd.default, lambda b, s: (x(4, 6), [1, 0], 2.0)), (P,)),
    (Sample(aten.constant_pad_nd.default, lambda b, s: (x(4, 6), [1, 0])), (split(1, 4, 6),)),
    (Sample(aten.tril.default, lambda b, s: (x(4, 6),)), (split(1, 4, 6),)),
    (Sample(aten.roll.default, lambda b, s: (x(4, 6), [2], [1])), (split(1, 4, 6),)),
    (Sample(aten.topk.default, lambda b, s: (x(4, 6), 2)), (P,)),
    (Sample(aten.topk.default, lambda b, s: (x(4, 6), 2)), (split(1, 4, 6),)),
    (Sample(aten.max.dim, lambda b, s: (x(4, 6), 0)), (P,)),
    (Sample(aten.view_as_complex.default, lambda b, s: (x(4, 2),)), (split(1, 4, 2),)),
    (Sample(aten.einsum.default, lambda b, s: ("...i,oi->...o", [x(4, 6), x(4, 6)])), (R, ROW)),
    (Sample(aten.einsum.default, lambda b, s: ("bi,oi->bo", [x(4, 6), x(4, 6)])), (P, P)),
    (Sample(aten.einsum.default, lambda b, s: ("bi,oi->bo", [x(4, 6), x(4, 6)])), (ROW, COLUMN)),
    (Sample(aten.conv1d.default, lambda b, s: (x(b, 6, 4), x(4, 6, 2), x(4))), (P, R, R)),
    (Sample(aten.conv1d.default, lambda b, s: (x(b, 6, 4), x(4, 6, 2))), (P, P)),
    (Sample(aten.scatter.value, lambda b, s: (x(b, s, 6), 2, n(6, b, s, 6), 1.0)), (P, R)),
)


@pytest.mark.parametrize(("sample", "placements"), REFUSED, ids=str)
def test_wrong_combination_is_refused(sample: Sample, placements: Any) -> None:
    call = sample.seen.with_placements(list(placements))
    assert RULES[sample.target].place(call) is None


def test_size_of_a_split_dim_is_refused() -> None:
    rule = RULES[aten.sym_size.int]
    for placement in (R, P, split(1, 4, 6)):
        call = Call(aten.sym_size.int, (Operand((4, 6), placement), 0), {}, ())
        assert rule.place(call) == placed(R)
    for dim in (1, -1):
        call = Call(aten.sym_size.int, (Operand((4, 6), split(1, 4, 6)), dim), {}, ())
        assert rule.place(call) is None


@pytest.mark.parametrize(
    ("sample", "operand"),
    [
        (Sample(aten.topk.default, lambda b, s: (x(4, 6), 2)), 0),
        (Sample(aten.index.Tensor, lambda b, s: (x(4, 6), [n(4, 3)])), 1),
        (Sample(aten.einsum.default, lambda b, s: ("...i->...", [x(4, 6)])), 0),
    ],
    ids=str,
)
def test_what_is_chosen_by_must_be_whole(sample: Sample, operand: int) -> None:
    channels = Channels()
    ids = channels.fresh(sample.small()[operand].numel()).view(sample.small()[operand].shape)
    out = RULES[sample.target].follow(with_ids(sample.seen, {operand: ids}), channels)
    assert out in (None, [None, None])
    (found,) = channels.opaque
    assert torch.equal(found[0], ids.reshape(-1)) and found[1]

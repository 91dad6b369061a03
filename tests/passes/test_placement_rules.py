"""Every placement rule against simulated ranks: none is wrong, and what is missing is known."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from spdcompile.passes.ops import ATTENTION, GROUPED_MM
from spdcompile.passes.placement import RULES, indexing
from spdcompile.passes.placement.along import Along
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.contraction import MatMul
from spdcompile.passes.placement.movement import Movement
from spdcompile.passes.placement.pointwise import Pointwise
from spdcompile.passes.placement.rows import rows
from spdcompile.passes.placement.source import Source
from spdcompile.passes.placement.types import Call, Operand, P, Placed, R, Shard, placed
from tests.passes.brute_force import Outcome, examine, placements_of, splits_of
from tests.passes.channel_dependence import Followed, dependence, follow, num_connected, with_ids
from tests.passes.indexing_samples import INDEXING
from tests.passes.missing_answers import MISSING
from tests.passes.movement_samples import MOVEMENT
from tests.passes.reduction_samples import CHOICES, MORE
from tests.passes.rule_samples import (
    ALONG,
    ATTENTIONS,
    CONTRACTION,
    EXEMPT,
    POINTWISE,
    SOURCE,
    i,
    m,
    x,
)
from tests.passes.sample import Sample

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
SAMPLES = (*POINTWISE, *ALONG, *CONTRACTION, *ATTENTIONS, *SOURCE, *MOVEMENT, *INDEXING, *MORE)
# Followed as wholes, coarser than what depends on what: heads, experts, entries chosen by data.
# Or not at all: what is chosen by.
_UNITED = (
    *(ATTENTION, _SDPA, aten.embedding.default, GROUPED_MM, *indexing.RULES),
    *(aten.argmax.default, aten.argmin.default, *(sample.target for sample in CHOICES)),
)
_EXACT = [sample for sample in SAMPLES if sample.target not in _UNITED]
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)

_S6 = splits_of((1, 1, 6), 2)[0]
_S4 = splits_of((1, 4, 1, 6), 2)[0]
_ROW, _COLUMN = splits_of((4, 6), 2)[0], splits_of((4, 6), 2)[2]


@cache
def outcome_of(sample: Sample) -> Outcome:
    """Brute force over one sample, once."""
    return examine(sample, RULES[sample.target])


def test_samples_cover_every_rule() -> None:
    sampled = {sample.target for sample in SAMPLES}
    assert sampled | EXEMPT.keys() == RULES.keys()
    assert not sampled & EXEMPT.keys()


@every_sample
def test_rule_holds_on_simulated_ranks(sample: Sample) -> None:
    assert sum(1 for _ in placements_of(sample)) <= 1000
    outcome = outcome_of(sample)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.right, "the operator was not even accepted with whole operands"


def test_missing_answers_are_the_known_ones() -> None:
    found = {
        (sample.target, _kinds(answer))
        for sample in SAMPLES
        for answer in outcome_of(sample).missing
    }
    print(*sorted(f"{target}: {answer}" for target, answer in found), sep="\n")
    assert found == MISSING.keys()


@every_sample
def test_splits_of_two_regions_never_combine(sample: Sample) -> None:
    rule = RULES[sample.target]
    for placements in outcome_of(sample).right:
        split = [n for n, placement in enumerate(placements) if isinstance(placement, Shard)]
        if len(split) < 2 or sample.target is aten.type_as.default:  # reads a dtype only
            continue
        mixed = list(placements)
        layout = replace(mixed[split[-1]].layout, region="another")
        mixed[split[-1]] = replace(mixed[split[-1]], layout=layout)
        assert rule.place(sample.seen.with_placements(mixed)) is None


@pytest.mark.parametrize(
    ("target", "args", "placements"),
    [
        (aten.add.Tensor, (x(1, 1, 6), x(1, 1, 6)), (P, R)),
        (aten.add.Tensor, (x(1, 1, 6), 1.0), (P,)),
        (aten.sub.Tensor, (x(1, 1, 6), x(1, 1, 6)), (R, P)),
        (aten.mul.Tensor, (x(1, 1, 6), x(1, 1, 6)), (P, P)),
        (aten.mul.Tensor, (x(1, 1, 6), x(1, 1, 6)), (P, _S6)),
        (aten.div.Tensor, (x(1, 1, 6), x(1, 1, 6)), (R, P)),
        (aten.maximum.default, (x(1, 1, 6), x(1, 1, 6)), (P, P)),
        (aten.gelu.default, (x(1, 1, 6),), (P,)),
        (aten.pow.Tensor_Scalar, (x(1, 1, 6), 2), (P,)),
        (aten.to.dtype, (x(1, 1, 6), torch.float32), (P,)),
        (aten.where.self, (m(1, 1, 6), x(1, 1, 6), x(1, 1, 6)), (R, P, R)),
        (aten.softmax.int, (x(1, 1, 6), -1), (_S6,)),
        (aten.softmax.int, (x(1, 1, 6), -1), (P,)),
        (aten.cumsum.default, (x(1, 1, 6), -1), (_S6,)),
        (aten.layer_norm.default, (x(1, 1, 6), [6]), (_S6,)),
        (aten.rms_norm.default, (x(1, 1, 6), [6]), (P,)),
        (aten.mean.dim, (x(1, 1, 6), [-1], True), (_S6,)),
        (aten.linear.default, (x(1, 1, 6), x(4, 6)), (P, P)),
        (aten.linear.default, (x(1, 1, 6), x(4, 6)), (_S6, R)),
        (aten.linear.default, (x(1, 1, 6), x(4, 6)), (_S6, _ROW)),
        (aten.linear.default, (x(1, 1, 6), x(4, 6), x(4)), (_S6, _COLUMN, R)),
        (aten.linear.default, (x(1, 1, 6), x(4, 6), x(4)), (P, R, R)),
        (aten.cat.default, ([x(1, 1, 6), x(1, 1, 6)], -1), (P, R)),
        (aten.cat.default, ([x(1, 1, 6), x(1, 1, 6)], -1), (_S6, R)),
        (aten.select.int, (x(1, 1, 6), 2, 0), (_S6,)),
        (aten.embedding.default, (x(12, 6), i(1, 1).abs()), (splits_of((12, 6), 2)[0], R)),
        (aten.index_put.default, (x(4, 6), [i(4)], x(4, 6)), (P, R, R)),
        (_SDPA, tuple(x(1, 4, 1, 6) for _ in "qkv"), (P, P, P)),
        (_SDPA, (*(x(1, 4, 1, 6) for _ in "qkv"), x(4, 1, 1)), (R, R, R, P)),
    ],
)
def test_wrong_combination_is_refused(target: Any, args: Any, placements: Any) -> None:
    sample = Sample(target, lambda b, s: args)
    assert RULES[target].place(sample.seen.with_placements(list(placements))) is None


class _Unlocalized(Movement):
    """Data movement whose ranks run it with the global sizes."""

    def localize(self, call: Call, args: Any, out: Any, resize: Any) -> Any:
        return args


class _Whole(MatMul):
    """Takes the ranks' products along a split contraction for the result."""

    def place(self, call: Call) -> Placed | None:
        answer = super().place(call)
        return placed(R) if answer is not None and answer.out == P else answer


@pytest.mark.parametrize(
    ("rule", "target", "make"),
    [
        (Pointwise(rows("P <- P R")), aten.add.Tensor, lambda b, s: (x(b, s, 6), x(b, s, 6))),
        (Pointwise(rows("P <- P P")), aten.mul.Tensor, lambda b, s: (x(b, s, 6), x(b, s, 6))),
        (Pointwise(rows("R <- S(i)")), aten.neg.default, lambda b, s: (x(b, s, 6),)),
        (Pointwise(rows("P <- P")), aten.to.dtype, lambda b, s: (x(b, s, 6), torch.float32)),
        (Along(lambda call: (0,)), aten.softmax.int, lambda b, s: (x(b, s, 4, 6), -1)),
        (
            Along(lambda call: (2,), reduces=True, additive=True),
            aten.mean.dim,
            lambda b, s: (x(b, s, 6), [2]),
        ),
        (_Whole(transposed=True), aten.linear.default, lambda b, s: (x(b, s, 6), x(4, 6))),
        (MatMul(), aten.linear.default, lambda b, s: (x(b, s, 6), x(6, 6))),
        (_Unlocalized(), aten.reshape.default, lambda b, s: (x(b, s, 12), [b, s, 4, 3])),
        (_Unlocalized(), aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, 0, 6)),
    ],
)
def test_brute_force_finds_a_wrong_rule(rule: Any, target: Any, make: Any) -> None:
    sample = Sample(target, make)
    assert examine(sample, rule).wrong
    assert not examine(sample, RULES[target]).wrong


def test_brute_force_finds_a_missing_row() -> None:
    sample = Sample(aten.neg.default, lambda b, s: (x(b, s, 6),))
    missing = examine(sample, Pointwise(rows("S(i) <- S(i)"))).missing
    assert missing == ["P <- P"]


@every_sample
def test_following_loses_no_dependence(sample: Sample) -> None:
    numbers = range(len(sample.tensors))
    for carrying in (*({index} for index in numbers), set(numbers)):
        followed = follow(sample, RULES[sample.target], carrying)
        for index in carrying:
            assert not _loses(sample, index, followed), f"operand {index}, ids on {carrying}"


@pytest.mark.parametrize("sample", _EXACT, ids=str)
def test_following_unites_no_more_than_the_operator_does(sample: Sample) -> None:
    for index in range(len(sample.tensors)):
        followed = follow(sample, RULES[sample.target], {index})
        assert len(set(followed.before[index])) == num_connected(_dependence(sample, index))


@every_sample
def test_followed_ids_have_the_shape_of_the_result(sample: Sample) -> None:
    channels = Channels()
    ids = {
        index: channels.fresh(tensor.numel()).view(tensor.shape)
        for index, tensor in enumerate(sample.small())
    }
    out = RULES[sample.target].follow(with_ids(sample.seen, ids), channels)
    if isinstance(out, torch.Tensor):
        assert tuple(out.shape) == sample.seen.out_shape


def test_dependence_check_finds_lost_ids() -> None:
    sample = Sample(aten.linear.default, lambda b, s: (x(b, s, 6), x(4, 6)))
    followed = follow(sample, Source(), {0})
    assert _loses(sample, 0, followed)


def test_getitem_takes_one_result() -> None:
    pieces = [_S6, P, R]
    for index, piece in enumerate(pieces):
        call = Call(operator.getitem, (Operand((), pieces, pieces), index), {}, (1, 1, 6))
        assert RULES[operator.getitem].place(call) == placed(piece)
        assert RULES[operator.getitem].follow(call, Channels()) is piece
    call = Call(operator.getitem, (Operand((), P), 1), {}, (1, 1, 6))
    assert RULES[operator.getitem].place(call) == placed(P)


_dependence = cache(dependence)


def _loses(sample: Sample, index: int, followed: Followed) -> bool:
    """Whether a result element depends on an element of the operand that is not in its class."""
    apart = followed.before[index][:, None] != followed.after
    carried = ~np.isin(followed.before[index], followed.whole)[:, None]
    return bool((_dependence(sample, index) & apart & carried).any())


def _kinds(answer: str) -> str:
    """A row without dims and layouts."""
    return " ".join(word[0] if word != "<-" else word for word in answer.split())

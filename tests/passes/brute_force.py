"""Checks a placement rule by brute force: two simulated ranks against the whole tensors.

Every placement of the operands is put to the rule. What it answers is simulated: each rank gets
its operands, runs the operator on them, and the ranks' results, combined as the answer says, must
be the whole result. A rule sees batch and sequence length 1, the simulation other sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdcompile.passes.layout import EVERY, Layout, ShardSpec, UnevenLayoutError, shard_spec
from spdcompile.passes.placement.movement import Movement, Resize
from spdcompile.passes.placement.types import Call, P, Placed, R, Replicate, Shard
from tests.passes.sample import Sample

RANKS = (0, 1)
# Units are neither contiguous on a rank nor equally many: 3 units leave a padded one on rank 1.
# Of 4 units, two and two share what a group owns: each rank holds a copy of both groups.
ASSIGNMENTS = {2: ((1,), (0,)), 3: ((0, 2), (1,)), 4: ((0, 2), (1, 3))}
_SHARING = 4
REGION = "region"
# A local program that is impossible rather than wrong: the sizes do not fit.
_CANNOT_RUN = (RuntimeError, IndexError, UnevenLayoutError)


@dataclass(frozen=True)
class Outcome:
    """What brute force found out about one sample.

    Args:
        wrong: answers that the simulation contradicts.
        missing: placements without an answer although there is a right one.
        right: the accepted placements that hold.
    """

    wrong: list[str]
    missing: list[str]
    right: list[tuple[Any, ...]]


def examine(sample: Sample, rule: Any) -> Outcome:
    """Puts every placement of the operands to the rule and simulates the answers."""
    outcome = Outcome([], [], [])
    for num_units, placements in placements_of(sample):
        call = sample.seen.with_placements(list(placements))
        answer = local_answer(rule, call)
        if answer is None:
            # Both ranks hold all groups, so that much would be right there by chance.
            if num_units == _SHARING:
                continue
            if (out := _right_answer(sample, rule, placements, num_units)) is not None:
                outcome.missing.append(row(out, placements))
        elif why := contradiction(sample, rule, placements, answer):
            outcome.wrong.append(f"{sample}: {row(answer.out, placements)}: {why}")
        else:
            outcome.right.append(placements)
    return outcome


def local_answer(rule: Any, call: Call) -> Placed | None:
    """The rule's answer; None too if the ranks have no arguments for it, as in propagation."""
    answer = rule.place(call)
    if answer is not None and _is_local_movement(rule, call):
        try:
            given = [operand.placement for operand in call.operands()]
            rule.localize(call, call.args, answer.out, _resize(given))
        except UnevenLayoutError:
            return None
    return answer


def placements_of(sample: Sample) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """All placements of the operands within one region, with the region's number of units."""
    for num_units in ASSIGNMENTS:
        choices = []
        for operand, parts in zip(sample.seen.operands(), sample.parts, strict=True):
            splits = splits_of(operand.shape, num_units, sample.runs)
            choices.append([R, *([P] if parts else []), *splits])
        for placements in itertools.product(*choices):
            first = num_units == min(ASSIGNMENTS)
            if first or any(isinstance(placement, Shard) for placement in placements):
                yield num_units, placements


def splits_of(shape: tuple[int, ...], num_units: int, runs: tuple[int, ...] = ()) -> list[Shard]:
    """Splits of each dim into units: in one run, in several equal runs, in the given runs."""
    if num_units == _SHARING:
        return _shared_splits(shape)
    found = []
    for dim, size in enumerate(shape):
        patterns = {(size,), (size // 2,) * 2, (size // 3,) * 3, runs}
        for pattern in sorted(patterns, key=len):
            each = [part // num_units for part in pattern]
            if size > 1 and sum(each) * num_units == size and min(each) > 0:
                owners = np.concatenate([np.repeat(np.arange(num_units), n) for n in each])
                found.append(Shard(dim, Layout(REGION, num_units, owners)))
    return found


def _shared_splits(shape: tuple[int, ...]) -> list[Shard]:
    """Splits of each dim into units, into groups that share, and with a rest on every rank."""
    units, groups = np.arange(_SHARING), _SHARING + np.arange(_SHARING // 2)
    found = []
    for dim, size in enumerate(shape):
        ways = []
        if size % len(units) == 0:
            ways.append(np.repeat(units, size // len(units)))
        if size % len(groups) == 0:
            ways.append(np.repeat(groups, size // len(groups)))
        if size > len(units):
            ways.append(np.concatenate([units, np.full(size - len(units), EVERY)]))
        found += [Shard(dim, Layout(REGION, _SHARING, owners, copies=2)) for owners in ways]
    return found


def contradiction(
    sample: Sample, rule: Any, placements: tuple[Any, ...], answer: Placed
) -> str | None:
    """How the simulation contradicts an answer; None if it does not."""
    cut = [answer.cuts.get(index, given) for index, given in enumerate(placements)]
    for index in answer.cuts:
        if placements[index] != R:
            return f"cuts operand {index}, which is not whole"
    try:
        ranks = _simulate(sample, rule, cut, answer.out)
    except _CANNOT_RUN as error:
        return f"the ranks cannot run it: {error}"
    outs = answer.out if isinstance(answer.out, list) else [answer.out] * len(sample.whole)
    for piece, (out, whole) in enumerate(zip(outs, sample.whole, strict=True)):
        if not _combines(out, [results[piece] for results in ranks], whole):
            return f"the ranks' results do not make the whole one (result {piece})"
    return None


def _right_answer(
    sample: Sample, rule: Any, placements: tuple[Any, ...], num_units: int
) -> Any | None:
    """An answer that the simulation would bear out."""
    ranks = None
    for out in (R, P, *splits_of(sample.seen.out_shape, num_units, sample.runs)):
        try:
            # Only data movement has other local arguments for other results.
            if ranks is None or isinstance(rule, Movement):
                ranks = _simulate(sample, rule, placements, out)
        except (*_CANNOT_RUN, TypeError, AttributeError):  # `localize` knows no such result
            if not isinstance(rule, Movement):
                return None
            continue
        pieces = zip(*ranks, sample.whole, strict=True)
        if all(_combines(out, list(results), whole) for *results, whole in pieces):
            return out
    return None


def _simulate(sample: Sample, rule: Any, placements: Sequence[Any], out: Any) -> list[list[Tensor]]:
    """Every rank's results."""
    call, real = sample.seen.with_placements(list(placements)), sample.real
    if _is_local_movement(rule, call):
        real = replace(real, args=rule.localize(call, real.args, out, _resize(placements)))
    ranks = []
    for rank in RANKS:
        local = [_local(sample, n, placement, rank) for n, placement in enumerate(placements)]
        ranks.append(sample.run(real, local))
    return ranks


def _resize(placements: Sequence[Any]) -> Resize:
    (units,) = {p.layout.num_units for p in placements if isinstance(p, Shard)}
    return Resize({REGION: max(map(len, ASSIGNMENTS[units]))})


def _is_local_movement(rule: Any, call: Call) -> bool:
    split = any(isinstance(operand.placement, Shard) for operand in call.operands())
    return split and isinstance(rule, Movement)


@cache
def _local(sample: Sample, index: int, placement: Any, rank: int) -> Tensor:
    """One rank's operand."""
    whole = sample.tensors[index]
    if placement == R:
        return whole
    if placement == P:
        parts = sample.parts[index]
        assert parts is not None, "only floating operands are tried as partial sums"
        return parts[rank]
    spec, dim = _spec(placement), placement.dim
    folded = whole.unflatten(dim, (-1, len(placement.layout)))
    return spec.shard_of(folded, rank).flatten(dim, dim + 1)


def _combines(out: Any, results: list[Tensor], whole: Tensor) -> bool:
    """Whether the ranks' results make the whole one, in the way that `out` says."""
    if isinstance(out, Replicate):
        return all(_same(result, whole) for result in results)
    if out == P:
        return whole.is_floating_point() and _same(sum(results[1:], results[0]), whole)
    spec, dim = _spec(out), out.dim
    if dim >= whole.dim() or whole.shape[dim] % len(out.layout):
        return False
    shape = list(whole.shape)
    shape[dim] = shape[dim] // len(out.layout) * spec.local_size
    if any(list(result.shape) != shape for result in results):
        return False
    stacked = torch.stack(results).unflatten(dim + 1, (-1, spec.local_size))
    together = spec.unshard(stacked, len(out.layout))
    # Of what several ranks hold, all copies must agree, not only the one that is taken.
    agree = _same(spec.shard(together), stacked)
    return (agree or spec.padded > 0) and _same(together.flatten(dim, dim + 1), whole)


def _spec(shard: Shard) -> ShardSpec:
    """The split of the dim; the batch that is folded in front becomes a dim of its own."""
    return shard_spec(shard.layout, shard.dim + 1, ASSIGNMENTS[shard.layout.num_units])


def _same(result: Tensor, whole: Tensor) -> bool:
    """Equal up to float64 rounding: a few operations on numbers of order 1, and margin."""
    if result.shape != whole.shape or result.dtype != whole.dtype:
        return False
    if whole.is_complex():
        result, whole = torch.view_as_real(result), torch.view_as_real(whole)
    return torch.allclose(result.double(), whole.double(), rtol=1e-9, atol=1e-11)


def row(out: Any, placements: tuple[Any, ...]) -> str:
    """An answer as a row of a rule table."""
    outs = out if isinstance(out, list) else [out]
    return f"{' '.join(map(_name, outs))} <- {' '.join(map(_name, placements))}"


def _name(placement: Any) -> str:
    if isinstance(placement, Shard):
        runs = len(placement.layout.runs)
        return f"S({placement.dim})" + (f"*{runs}" if runs > 1 else "")
    return str(placement)

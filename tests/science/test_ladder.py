"""The ladder's decisions, on made-up trials whose outcome is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdcompile import Budget, PointClass
from spdcompile.errors import UsageError
from spdcompile.runtime.order import Order, Step
from spdcompile.runtime.validation import HeldOut, is_better
from spdcompile.tuning.choosing import choose
from spdcompile.tuning.ladder import (
    Attempt,
    Choice,
    Effort,
    Rung,
    choose_by_loss,
    choose_by_saving,
    longest,
)
from spdcompile.tuning.tuned import decisions_of, thresholds_of

COUNT = 12
BASE = HeldOut((3.0, 3.2, 2.8, 3.1), 0.0, 1.0)


class Known:
    """Trials whose increase of the perplexity is a function of what is tried."""

    def __init__(
        self,
        zero_shot: list[float],
        *,
        short: float = 0.5,
        full: float = 0.2,
        grouped: float = 1.0,
        groups_refused: str = "",
    ) -> None:
        self.zero_shot = zero_shot
        self.factors = {(Rung.DISTIL, False): short, (Rung.DISTIL, True): full}
        self.factors |= {(Rung.GROUP, key[1]): grouped * x for key, x in self.factors.items()}
        self.groups_refused = groups_refused
        self.tried: dict[tuple[int, Rung, bool], Attempt] = {}

    @property
    def made(self) -> tuple[Attempt, ...]:
        return tuple(self.tried.values())

    def attempt(
        self, count: int, rung: Rung, *, full: bool = False, grouped_from: int = 0
    ) -> Attempt:
        increase = self.zero_shot[count] * self.factors.get((rung, full), 1.0)
        losses = tuple(loss + math.log1p(increase) for loss in BASE.losses)
        made = Attempt(count, rung, full, HeldOut(losses, increase, 1.0), increase)
        if rung is Rung.GROUP and self.groups_refused:
            made = replace(made, refused=self.groups_refused)
        return self.tried.setdefault((count, rung, full), made)


@st.composite
def _known(draw: st.DrawFn) -> Known:
    steps = draw(st.lists(st.floats(0.001, 0.1), min_size=COUNT, max_size=COUNT))
    sums = [sum(steps[:count]) for count in range(COUNT + 1)]
    short = draw(st.floats(0.3, 0.9))
    return Known(
        sums,
        short=short,
        full=short * draw(st.floats(0.2, 1.0)),
        grouped=draw(st.floats(0.5, 1.2)),
        groups_refused=draw(st.sampled_from(["", "no heads"])),
    )


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_longest_is_found_by_halving(low: int, length: int, last: int) -> None:
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count <= last

    high = low + length
    assert longest(holds, low, high) == max(low, min(high, last))
    assert len(asked) <= length.bit_length() + 1 and all(low < count <= high for count in asked)


@given(_known(), st.floats(0.0, 1.5), st.integers(0, 3))
def test_loss_is_kept_and_no_cheaper_longer_prefix_is_missed(
    trials: Known, allowed: float, runs: int
) -> None:
    budget = Budget(max_loss=allowed)
    choice = choose_by_loss(trials, COUNT, budget, Effort(full_runs=runs))
    taken = choice.attempt
    assert budget.allows(taken.increase) and not taken.refused
    assert 0 <= choice.in_sensitive <= choice.sensitive <= taken.count
    longest_zero_shot = max(k for k in range(COUNT + 1) if trials.zero_shot[k] <= allowed)
    assert choice.in_sensitive == longest_zero_shot
    # Whatever was seen to be within the budget is no longer than what is taken.
    within = [a for a in trials.made if budget.allows(a.increase) and not a.refused]
    assert max(a.count for a in within) == taken.count
    assert taken.rung is Rung.ZERO_SHOT or taken.count > longest_zero_shot
    assert sum(a.full for a in trials.made) <= runs + 1


def _choice_for(trials: Known, budget: Budget, effort: Effort | None = None) -> Attempt:
    return choose_by_loss(trials, COUNT, budget, effort or Effort()).attempt


def test_full_distillation_reaches_further_than_a_short_one() -> None:
    trials = Known([0.01 * k for k in range(COUNT + 1)], short=0.5, full=0.25)
    taken = _choice_for(trials, Budget(max_loss=0.02))
    assert (taken.count, taken.rung, taken.full) == (8, Rung.DISTIL, True)
    without = Effort(full_runs=0)
    trials = Known([0.01 * k for k in range(COUNT + 1)], short=0.5, full=0.25)
    assert _choice_for(trials, Budget(max_loss=0.02), without).count == 4


def test_promise_that_full_distillation_does_not_keep_is_taken_back() -> None:
    trials = Known([0.01 * k for k in range(COUNT + 1)], short=0.5, full=0.4, groups_refused="no")
    taken = _choice_for(trials, Budget(max_loss=0.0201))
    assert (taken.count, taken.full) == (5, True)
    assert [a.count for a in trials.made if a.full] == [8, 5]


def test_head_groups_are_tried_only_beyond_distillation() -> None:
    rising = [0.0, 0.01, 0.02, *([0.2 * k for k in range(1, COUNT - 1)])]
    trials = Known(rising, short=0.3, full=0.1, grouped=0.4)
    choice = choose_by_loss(trials, COUNT, Budget(max_loss=0.03), Effort(full_runs=9))
    grouped = [a for a in trials.made if a.rung is Rung.GROUP]
    assert (choice.in_sensitive, choice.sensitive) == (2, 3)
    assert choice.attempt.rung is Rung.GROUP and choice.attempt.count > 3
    assert min(a.count for a in grouped) == 4
    trials = Known(rising, short=0.3, full=0.1, groups_refused="no heads")
    choice = choose_by_loss(trials, COUNT, Budget(max_loss=0.03), Effort())
    assert (choice.attempt.count, choice.why) == (3, "no heads")


def test_rungs_that_are_ruled_out_are_not_used() -> None:
    trials = Known([0.01 * k for k in range(COUNT + 1)])
    taken = _choice_for(trials, Budget(max_loss=0.02), Effort(rungs=(Rung.ZERO_SHOT,)))
    assert (taken.count, taken.rung) == (2, Rung.ZERO_SHOT)
    assert {a.rung for a in trials.made} == {Rung.ZERO_SHOT}


@given(_known(), st.integers(0, COUNT))
def test_saving_takes_the_cheapest_recovery_that_helps(trials: Known, count: int) -> None:
    choice = choose_by_saving(trials, count, Budget(min_saved=0.5), Effort())
    taken = choice.attempt
    assert taken.count == count and not taken.refused
    if count:
        helps = trials.factors[Rung.GROUP, False] < trials.factors[Rung.DISTIL, False]
        dearest = Rung.GROUP if helps and not trials.groups_refused else Rung.DISTIL
        assert taken.rung is dearest and taken.full
    assert 0 <= choice.in_sensitive <= choice.sensitive <= count


def test_recovery_stops_once_the_loss_is_allowed() -> None:
    trials = Known([0.01 * k for k in range(COUNT + 1)])
    for allowed, rung in ((0.2, Rung.ZERO_SHOT), (0.03, Rung.DISTIL)):
        budget = Budget(max_loss=allowed, min_saved=0.5)
        assert choose_by_saving(trials, COUNT, budget, Effort()).attempt.rung is rung
    assert Rung.GROUP not in {a.rung for a in trials.made}


def test_order_that_recovers_best_is_followed() -> None:
    """The second costs more zero-shot, and recovers from all but a little of it."""
    rising = [0.01 * k for k in range(COUNT + 1)]

    def known(worse: float, short: float, full: float) -> Known:
        sums = [worse * loss for loss in rising]
        return Known(sums, short=short, full=full, groups_refused="no heads")

    for budget in (Budget(max_loss=0.03), Budget(min_saved=0.5)):
        orders = [known(1, 0.9, 0.8), known(4, 0.1, 0.05)]
        counts = (COUNT, COUNT) if budget.max_loss else (6, 6)
        place, choice = choose(orders, counts, budget, Effort())
        assert place == 1 and choice.attempt.count == counts[1] and choice.attempt.full
        orders = [known(1, 0.2, 0.1), known(4, 0.9, 0.8)]
        place, choice = choose(orders, counts, budget, Effort())
        assert place == 0 and choice.attempt.count == counts[0]


@given(st.data())
def test_thresholds_are_where_the_class_changes(data: st.DataObject) -> None:
    scores = sorted(data.draw(st.lists(st.floats(1e-6, 9.0), min_size=1, max_size=9, unique=True)))
    order = Order(
        tuple(Step((place, "attn"), 0.0, score, score) for place, score in enumerate(scores)), {}, 0
    )
    taken = data.draw(st.integers(0, len(scores)))
    sensitive = data.draw(st.integers(0, taken))
    in_sensitive = data.draw(st.integers(0, sensitive))
    attempt = Attempt(taken, Rung.GROUP, True, HeldOut((1.0,), 0.0, 1.0), 0.0)
    choice = Choice(attempt, in_sensitive, sensitive, "")
    tau1, tau2 = (math.inf if tau is None else tau for tau in thresholds_of(order, choice))
    assert tau1 <= tau2
    for decision in decisions_of(order, choice, [attempt], {}):
        assert decision.score is not None
        by_score = {
            PointClass.IN_SENSITIVE: decision.score <= tau1,
            PointClass.SENSITIVE: tau1 < decision.score <= tau2,
            PointClass.EXTREMELY_SENSITIVE: tau2 < decision.score,
            PointClass.KEPT: decision.score > scores[taken - 1] if taken else True,
        }
        assert by_score[decision.kind], decision


def test_better_means_by_more_than_the_standard_error() -> None:
    def gaining(*gains: float) -> HeldOut:
        losses = [loss - gain for loss, gain in zip(BASE.losses, gains, strict=True)]
        return replace(BASE, losses=tuple(losses))

    assert is_better(gaining(0.1, 0.1, 0.1, 0.1), BASE)
    assert not is_better(gaining(0.1, -0.1, 0.1, -0.09), BASE)
    assert not is_better(BASE, BASE)
    assert is_better(HeldOut((1.0,), 0.0, 1.0), HeldOut((1.1,), 0.0, 1.0))


@pytest.mark.parametrize(
    "shares", [{}, {"max_loss": -0.1}, {"min_saved": 1.1}, {"min_faster": float("nan")}]
)
def test_budget_that_cannot_be_kept_is_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="The budget"):
        Budget(**shares)

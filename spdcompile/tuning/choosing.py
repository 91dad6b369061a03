"""Which order to follow, where there are several: the one whose points recover best."""

from __future__ import annotations

from collections.abc import Sequence

from spdcompile.tuning.budget import Budget
from spdcompile.tuning.ladder import Choice, Effort, Rung, Trials, choose_by_loss, choose_by_saving


def choose(
    orders: Sequence[Trials],
    counts: Sequence[int],
    budget: Budget,
    effort: Effort,
) -> tuple[int, Choice]:
    """The place of an order, and where its ladder ends.

    Points that cost least zero-shot need not be those that recover best, so the orders are
    compared by short distillations, of the points that they would drop.

    Args:
        orders: the first is the one to follow unless another is better.
        counts: of each, how many points have to go for what is to be saved; or how many there are,
            if nothing has to be.
    """
    if budget.saves:
        place = _recovers_best(orders, counts, budget, effort)
        return place, choose_by_saving(orders[place], counts[place], budget, effort)
    best, choice = 0, choose_by_loss(orders[0], counts[0], budget, effort)
    for place, trials in enumerate(orders[1:], start=1):
        longer = choice.attempt.count + 1
        if Rung.DISTIL not in effort.rungs or longer > counts[place]:
            continue
        attempt = trials.attempt(longer, Rung.DISTIL)
        if attempt.refused or not budget.allows(attempt.increase / effort.reach):
            continue
        other = choose_by_loss(trials, counts[place], budget, effort)
        if other.attempt.count > choice.attempt.count:
            best, choice = place, other
    return best, choice


def _recovers_best(
    orders: Sequence[Trials], counts: Sequence[int], budget: Budget, effort: Effort
) -> int:
    """The order whose points have the lowest loss after a short distillation."""
    zero_shot = orders[0].attempt(counts[0], Rung.ZERO_SHOT)
    enough = budget.max_loss is not None and budget.allows(zero_shot.increase)
    if len(orders) == 1 or enough or Rung.DISTIL not in effort.rungs:
        return 0
    pairs = zip(orders, counts, strict=True)
    attempts = [trials.attempt(count, Rung.DISTIL) for trials, count in pairs]
    return min(range(len(attempts)), key=lambda place: attempts[place].increase)

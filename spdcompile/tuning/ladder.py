"""How far down the order a budget reaches, and with which recovery: cheapest first.

Zero-shot drop, then block-to-block distillation (B2B), then head grouping and B2B, then keeping the
sync point (SPD, arXiv 2502.20727). What is tried is a prefix of the order at one rung, on held-out
text. Here are only the decisions: `Trials` does the work and remembers it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spdcompile.runtime.validation import HeldOut, is_better
from spdcompile.tuning.budget import Budget


class Rung(enum.Enum):
    """A way to recover from a drop, in the order of their cost."""

    ZERO_SHOT = "zero-shot"
    DISTIL = "B2B"
    GROUP = "HG+B2B"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A prefix of the order, dropped and recovered at one rung.

    Args:
        count: how many points are dropped.
        full: whether it was distilled in full; short ones are for the search.
        held_out: what came out, on held-out text.
        increase: perplexity added, as a share of the undropped program's.
        seconds: what it took; 0 if an earlier run had found it.
        refused: why it could not be done; then it has the figures of the zero-shot drop.
        layers: those whose heads were grouped.
        order: which order the points are the first of.
    """

    count: int
    rung: Rung
    full: bool
    held_out: HeldOut
    increase: float
    seconds: float = 0.0
    refused: str = ""
    layers: frozenset[int] = frozenset()
    order: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "order": self.order,
            "dropped": self.count,
            "recovery": self.rung.value,
            "full": self.full,
            "perplexity": self.held_out.perplexity,
            "increase": self.increase,
            "kl": self.held_out.kl,
            "agreement": self.held_out.agreement,
            "seconds": round(self.seconds, 1),
            **({"refused": self.refused} if self.refused else {}),
        }


class Trials(Protocol):
    """Drops prefixes of an order and recovers from it."""

    @property
    def made(self) -> tuple[Attempt, ...]:
        """What was tried so far, in order."""
        ...

    def attempt(
        self, count: int, rung: Rung, *, full: bool = False, grouped_from: int = 0
    ) -> Attempt:
        """Drops the first `count` points; what was tried before is not tried again.

        Args:
            full: whether to distil in full.
            grouped_from: head groups are for layers whose attention points are from here on.
        """
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the ladder ended.

    Args:
        attempt: what is taken.
        in_sensitive: so many points at the start of the order need no recovery (ISB).
        sensitive: so many need no more than distillation (ISB and SB).
        why: what ended the search, in words.
    """

    attempt: Attempt
    in_sensitive: int
    sensitive: int
    why: str


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard the ladder tries.

    Args:
        full_runs: distil so many candidates in full, at most.
        reach: a short distillation that comes within so many times the budget is taken to get
            within it when done in full; the first full one corrects this.
        rungs: the recoveries that may be used; zero-shot is always one.
    """

    full_runs: int = 3
    reach: float = 2.0
    rungs: tuple[Rung, ...] = tuple(Rung)


def longest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest count in low..high for which something holds, found by halving.

    Args:
        holds: true up to some count and false beyond; taken to be true of `low`.
    """
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def choose_by_loss(trials: Trials, count: int, budget: Budget, effort: Effort) -> Choice:
    """The longest prefix that some recovery brings within the loss that is allowed.

    Args:
        count: how many points the order has.
    """

    def allowed(attempt: Attempt) -> bool:
        return not attempt.refused and budget.allows(attempt.increase)

    reached = longest(lambda k: allowed(trials.attempt(k, Rung.ZERO_SHOT)), 0, count)
    in_sensitive = reached
    best = trials.attempt(reached, Rung.ZERO_SHOT)
    search = _Search(trials, budget, effort)
    if Rung.DISTIL in effort.rungs:
        best = search.extend(best, Rung.DISTIL, count)
    sensitive = best.count
    # The rung is asked for what distillation alone could not mend, one point after the other.
    while Rung.GROUP in effort.rungs and best.count < count:
        longer = search.extend(best, Rung.GROUP, best.count + 1, grouped_from=sensitive)
        if longer is best:
            break
        best = longer
    why = "all points are dropped" if best.count == count else search.why(best.count)
    return Choice(search.finish(best), in_sensitive, sensitive, why)


class _Search:
    """Looks for longer prefixes that a recovery brings within the budget."""

    def __init__(self, trials: Trials, budget: Budget, effort: Effort) -> None:
        self.trials, self.budget, self.effort = trials, budget, effort
        self.gain = 1 / effort.reach  # what a full distillation leaves of a short one's loss
        self.runs_left = effort.full_runs
        self.grouped_from = 0

    def extend(self, best: Attempt, rung: Rung, most: int, *, grouped_from: int = 0) -> Attempt:
        """The longest prefix beyond `best` within the budget at a rung; else `best` itself."""
        self.grouped_from = grouped_from
        beyond = most
        while best.count < beyond:
            count = self._most_promising(rung, best.count, beyond)
            if count == best.count:
                break
            attempt = self.trials.attempt(count, rung, grouped_from=grouped_from)
            if self.runs_left:
                self.runs_left -= 1
                attempt = self._in_full(attempt)
            elif not self.budget.allows(attempt.increase):
                # Nothing is left to try it in full: only what is within the budget as it is.
                self.gain = 1.0
                beyond = count - 1
                continue
            if self.budget.allows(attempt.increase):
                best = attempt
            else:
                beyond = count - 1
        return best

    def finish(self, best: Attempt) -> Attempt:
        """What is taken is distilled in full, if it is distilled at all."""
        if best.rung is Rung.ZERO_SHOT or best.full:
            return best
        return self._in_full(best)

    def why(self, count: int) -> str:
        """What ended the search."""
        tried = [a for a in self.trials.made if a.count == count + 1]
        if not tried:
            return f"no attempt with {count + 1} points dropped"
        last = tried[-1]
        if last.refused:
            return last.refused
        return (
            f"with {count + 1} points dropped the perplexity rises by {last.increase:.2%} "
            f"({last.rung.value}{'' if last.full or last.rung is Rung.ZERO_SHOT else ', short'})"
        )

    def _most_promising(self, rung: Rung, reached: int, most: int) -> int:
        """The longest prefix up to `most` that is expected to get within the budget."""

        def promises(count: int) -> bool:
            if count <= reached:
                return True
            attempt = self.trials.attempt(count, rung, grouped_from=self.grouped_from)
            return not attempt.refused and self.budget.allows(attempt.increase * self.gain)

        return longest(promises, reached, most)

    def _in_full(self, short: Attempt) -> Attempt:
        """Distils in full, and learns what that is worth; the better one of both."""
        full = self.trials.attempt(
            short.count, short.rung, full=True, grouped_from=self.grouped_from
        )
        if short.increase > 0 and full.increase > 0:
            self.gain = min(1.0, full.increase / short.increase)
        return min(full, short, key=lambda attempt: attempt.increase)


def choose_by_saving(trials: Trials, count: int, budget: Budget, effort: Effort) -> Choice:
    """The cheapest recovery for a prefix that is given, of those that are really better.

    Args:
        count: how many points are to go.
    """
    best = trials.attempt(count, Rung.ZERO_SHOT)
    why = "no dearer recovery is better on held-out text by more than its standard error"
    for rung in (Rung.DISTIL, Rung.GROUP):
        if not count or rung not in effort.rungs:
            continue
        if budget.max_loss is not None and budget.allows(best.increase):
            why = "within the loss that is allowed"
            break
        # Short ones are compared with each other: in full only what is taken is distilled.
        short = trials.attempt(count, rung)
        other = best if best.rung is Rung.ZERO_SHOT else trials.attempt(count, best.rung)
        if not short.refused and is_better(short.held_out, other.held_out):
            full = trials.attempt(count, rung, full=True)
            best = min(full, short, key=lambda attempt: attempt.increase)
    in_sensitive = _need_nothing(trials, best, budget)
    sensitive = in_sensitive if best.rung is Rung.GROUP else count
    return Choice(best, in_sensitive, sensitive, why)


def _need_nothing(trials: Trials, best: Attempt, budget: Budget) -> int:
    """How many points cost zero-shot no more than is allowed, or than the plan costs in the end."""
    if best.rung is Rung.ZERO_SHOT:
        return best.count
    allowed = budget if budget.max_loss is not None else Budget(max_loss=max(best.increase, 0.0))
    return longest(
        lambda count: allowed.allows(trials.attempt(count, Rung.ZERO_SHOT).increase),
        0,
        best.count - 1,
    )

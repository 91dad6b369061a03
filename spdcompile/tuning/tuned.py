"""What tuning found: a plan, the weights that go with it, and what became of every sync point."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spdcompile.export import export_hf
from spdcompile.models import ModelSource
from spdcompile.passes.drop import PointName
from spdcompile.plan import Plan
from spdcompile.runtime.evaluate import Quality
from spdcompile.runtime.order import Order
from spdcompile.tuning.budget import Budget
from spdcompile.tuning.ladder import Attempt, Choice, Rung


class PointClass(enum.Enum):
    """What a sync point needs so that it can go within the budget."""

    IN_SENSITIVE = "ISB"
    """Nothing: it is dropped zero-shot."""
    SENSITIVE = "SB"
    """Block-to-block distillation."""
    EXTREMELY_SENSITIVE = "ESB"
    """Head grouping, then block-to-block distillation."""
    KEPT = "kept"
    """It could go, and stays: the budget asks for no more, or allows no more."""
    REFUSED = "refused"
    """It cannot be dropped."""


@dataclass(frozen=True, slots=True)
class PointDecision:
    """What became of a sync point.

    Args:
        score: KL divergence to the undropped program with this point and all before it in the
            order dropped, zero-shot, in nats; the largest so far. None if it was refused.
        alone: the KL divergence that was expected of it by itself.
        tried: in words, the shortest prefix with this point that was tried at each rung.
        outcome: what became of it, in words.
    """

    point: PointName
    kind: PointClass
    score: float | None = None
    alone: float | None = None
    tried: str = ""
    outcome: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        layer, name = self.point
        return {
            "point": f"{layer}.{name}",
            "class": self.kind.value,
            "score": self.score,
            "alone": self.alone,
            "tried": self.tried,
            "outcome": self.outcome,
        }


@dataclass(frozen=True, slots=True)
class Savings:
    """What a plan saves.

    Args:
        all_reduces: of the undropped program.
        remaining: of the plan's.
        faster: share of the latency that is gone, by the table of latencies; None without one.
        measured: the same, measured with the plan itself on this machine; None if it was not.
    """

    all_reduces: int
    remaining: int
    faster: float | None = None
    measured: float | None = None

    @property
    def saved(self) -> float:
        """Share of all all-reduces that is gone."""
        return 1 - self.remaining / self.all_reduces


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning found.

    Args:
        plan: what to drop, the head groups, and everything else here as JSON data in `measured`.
        tensors: new global tensors under their state_dict names, in the model's own dtypes; none
            if nothing had to be distilled.
        budget: what was asked for.
        met: whether the plan keeps to it on held-out text.
        why: what ended the search, in words.
        recovery: the rung at which the plan's points are dropped.
        undropped, zero_shot, recovered: quality on held-out text with nothing dropped, with the
            plan's points dropped and nothing else done, and of the plan with its weights.
        tau1, tau2: the largest scores of in-sensitive points, and of those that need distillation
            at most; None if there are no points beyond.
        points: every sync point, in the order in which they would be dropped.
        attempts: all that was tried.
        source: the model that was tuned.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    budget: Budget
    met: bool
    why: str
    recovery: Rung
    undropped: Quality
    zero_shot: Quality
    recovered: Quality
    savings: Savings
    tau1: float | None
    tau2: float | None
    points: tuple[PointDecision, ...]
    attempts: tuple[Attempt, ...]
    source: ModelSource

    @property
    def increase(self) -> float:
        """The perplexity that the plan adds on held-out text, as a share."""
        return self.recovered.perplexity / self.undropped.perplexity - 1

    def kinds(self, kind: PointClass) -> tuple[PointName, ...]:
        """The points of a class, in order."""
        return tuple(decision.point for decision in self.points if decision.kind is kind)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the weights, as JSON data."""
        return self.plan.to_dict()

    def export_hf(self, directory: str | Path) -> None:
        """Writes an ordinary Hugging Face checkpoint, and the plan as `spd_plan.json`.

        Raises:
            UsageError: the directory is not empty.
            SaveError: a file cannot be written; then none is left.
        """
        export_hf(self.source, directory, plan=self.plan, tensors=self.tensors)  # type: ignore[arg-type]


def with_figures(tuned: Tuned) -> Tuned:
    """The same, with its figures written into the plan."""
    saved = tuned.savings
    figures = {
        "budget": {
            "max_loss": tuned.budget.max_loss,
            "min_saved": tuned.budget.min_saved,
            "min_faster": tuned.budget.min_faster,
        },
        "met": tuned.met,
        "why": tuned.why,
        "recovery": tuned.recovery.value,
        "increase": tuned.increase,
        "saved": saved.saved,
        "all_reduces": [saved.all_reduces, saved.remaining],
        "faster": saved.faster,
        "measured_faster": saved.measured,
        "undropped": quality_data(tuned.undropped),
        "zero_shot": quality_data(tuned.zero_shot),
        "recovered": quality_data(tuned.recovered),
        "tau1": tuned.tau1,
        "tau2": tuned.tau2,
        "points": [decision.to_dict() for decision in tuned.points],
        "attempts": [attempt.to_dict() for attempt in tuned.attempts],
    }
    measured = {**tuned.plan.measured, "tuning": figures}
    return replace(tuned, plan=replace(tuned.plan, measured=measured))


def quality_data(quality: Quality) -> dict[str, float | None]:
    """A quality as JSON data."""
    return {
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "agreement": quality.agreement,
    }


def thresholds_of(order: Order, choice: Choice) -> tuple[float | None, float | None]:
    """The scores at which the class changes, tau1 and tau2 of the paper (section 4).

    Returns: the largest score of an in-sensitive point, 0 if there is none, and the largest of
        those that need distillation at most; None where there are no points beyond.
    """
    scores = [0.0, *(step.score for step in order.steps)]
    beyond = choice.attempt.count
    tau1 = scores[choice.in_sensitive] if choice.in_sensitive < beyond else None
    tau2 = scores[choice.sensitive] if choice.sensitive < beyond else None
    return tau1, tau2


def decisions_of(
    order: Order,
    choice: Choice,
    attempts: Sequence[Attempt],
    refused: Mapping[PointName, str],
) -> tuple[PointDecision, ...]:
    """What became of every point: those of the order, then those that cannot be dropped."""
    found = []
    for place, step in enumerate(order.steps, start=1):
        kind = _kind(place, choice)
        found.append(
            PointDecision(
                step.point,
                kind,
                step.score,
                step.alone,
                tried=_tried(place, attempts),
                outcome="kept"
                if kind is PointClass.KEPT
                else f"dropped, {choice.attempt.rung.value}",
            )
        )
    cannot = [
        PointDecision(point, PointClass.REFUSED, outcome=why)
        for point, why in sorted(refused.items())
    ]
    return (*found, *cannot)


def _kind(place: int, choice: Choice) -> PointClass:
    """The class of the point at a place of the order, counted from 1."""
    if place > choice.attempt.count:
        return PointClass.KEPT
    if place <= choice.in_sensitive:
        return PointClass.IN_SENSITIVE
    if place <= choice.sensitive:
        return PointClass.SENSITIVE
    return PointClass.EXTREMELY_SENSITIVE


def _tried(place: int, attempts: Sequence[Attempt]) -> str:
    """The shortest prefix with a point that was tried, at each rung."""
    words = []
    for rung in Rung:
        with_it = [a for a in attempts if a.rung is rung and a.count >= place]
        if not with_it:
            continue
        best = min(with_it, key=lambda a: (a.count, not a.full))
        size = "" if rung is Rung.ZERO_SHOT or best.full else " short"
        result = "refused" if best.refused else f"{best.increase:+.2%}"
        words.append(f"{rung.value}{size} {result} ({best.count})")
    return ", ".join(words)

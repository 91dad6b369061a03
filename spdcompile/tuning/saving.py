"""What plans save: all-reduces that are counted, and latency from a table or measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.measuring import check_cores
from spdcompile.passes.base import Program
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.plan import Plan
from spdcompile.tuning.budget import Budget
from spdcompile.tuning.latency import (
    MEASURE_ELSEWHERE,
    Latencies,
    measure_latencies,
    step_seconds,
)
from spdcompile.tuning.tuned import Savings


class Meter:
    """Says what a plan saves.

    Args:
        compiled: the model with nothing dropped.
        model: it, or its directory, for the processes that measure latencies.
        given: a table of latencies; None measures them when they are asked for.
        tokens: of the step that is measured.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        model: PreTrainedModel | str | Path,
        given: Latencies | None,
        tokens: int,
    ) -> None:
        self._compiled, self._model = compiled, model
        self._given, self._tokens = given, tokens
        self._latencies = given
        self._total = _count_all_reduces(compiled.program)

    def shortest(self, plans: Sequence[Plan], budget: Budget) -> int:
        """The place of the first plan that saves what a budget asks for; the last if none does.

        Args:
            plans: each drops more than the one before, the first one nothing.
        """
        if budget.min_faster is not None and self._latencies is None and plans[-1].dropped:
            self._latencies = measure_latencies(self._model, plans[-1], tokens=self._tokens)
        enough = (
            place for place, plan in enumerate(plans) if saves_enough(self.modelled(plan), budget)
        )
        return next(enough, len(plans) - 1)

    def modelled(self, plan: Plan) -> Savings:
        """What a plan saves, latency by the table."""
        like_own = replace(plan, head_groups=self._compiled.plan.head_groups)
        remaining = _count_all_reduces(self._compiled.with_mask(like_own).program)
        latencies = self._latencies
        faster = None if latencies is None else latencies.saved(self._total - remaining)
        return Savings(self._total, remaining, faster)

    def measured(self, plan: Plan) -> Savings:
        """The same; where the table was measured here, the plan's own latency is measured too."""
        savings = self.modelled(plan)
        if self._latencies is None or self._given is not None or not plan.dropped:
            return savings
        before, after, _ = step_seconds(self._model, plan, tokens=self._tokens)
        return replace(savings, measured=1 - after / before)


def saves_enough(savings: Savings, budget: Budget) -> bool:
    """Whether what a budget asks for is saved; measured latency counts before modelled."""
    faster = savings.faster if savings.measured is None else savings.measured
    # 40 % of 10 all-reduces are 4, however the division is rounded.
    return savings.saved >= (budget.min_saved or 0) - 1e-9 and (
        budget.min_faster is None or (faster or 0) >= budget.min_faster
    )


def check_latencies(budget: Budget, given: Latencies | None, tp: int) -> None:
    """Before the work: latencies that a budget asks for can be had.

    Raises:
        UsageError: the table is for another tp, or there is none and they cannot be measured here.
    """
    if budget.min_faster is None:
        return
    if given is None:
        check_cores(tp, fix=MEASURE_ELSEWHERE)
    elif given.tp != tp:
        raise UsageError(
            "The latencies are for something else.",
            where="latencies",
            found=f"a table for tp={given.tp}",
            needed=f"tp={tp}",
        )


def _count_all_reduces(program: Program) -> int:
    """Of one forward pass, those that nothing can drop too."""
    return sum(count_sync_nodes(program.graph_of(part).module) for part in program.parts)

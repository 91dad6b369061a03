"""From a model, a text and a budget to a plan: the whole method (SPD, arXiv 2502.20727).

Which points go first is found on the calibration text (`runtime/order.py`), how many and with which
recovery on held-out text (`ladder.py`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from spdcompile.compiled import CompiledModel
from spdcompile.errors import RefusalError, UsageError
from spdcompile.loading import load_model
from spdcompile.models import ModelSource
from spdcompile.passes.drop import PointName
from spdcompile.plan import Plan
from spdcompile.planning import structure_of
from spdcompile.runtime.calibrate import Points, droppable
from spdcompile.runtime.data import check_tokens
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.hidden import HiddenStates, hidden_states
from spdcompile.runtime.order import Order, order_points
from spdcompile.runtime.record import Record, key_of
from spdcompile.runtime.validation import Validation
from spdcompile.sampled import sampled_chunks
from spdcompile.tuning.budget import Budget
from spdcompile.tuning.choosing import choose
from spdcompile.tuning.ladder import Attempt, Rung
from spdcompile.tuning.saving import Meter, check_latencies, saves_enough
from spdcompile.tuning.settings import TuneSettings
from spdcompile.tuning.trials import Bench, RecordedTrials
from spdcompile.tuning.tuned import Tuned, decisions_of, thresholds_of, with_figures
from spdcompile.undropped import local_executor, undropped

_HELD_OUT = 8
"""Without a text of its own, validation takes this part of the chunks, from the end."""


def tune(
    model: ModelSource | CompiledModel,
    tokens: Tensor,
    *,
    tp: int,
    budget: Budget,
    validation: Tensor | None = None,
    points: Points = Points.ALL,
    router: str | None = None,
    settings: TuneSettings | None = None,
    progress: bool = True,
) -> Tuned:
    """Chooses which sync points to drop and how to recover, so that a budget is kept.

    The points are ordered by what dropping them costs jointly, and a prefix of that order is
    dropped: for a loss that is allowed the longest that some recovery brings within it, for
    something to be saved the shortest that saves it. Recovery climbs from the cheapest: zero-shot,
    block-to-block distillation, head grouping with distillation, keeping the sync point. Where a
    budget cannot be kept, the plan is the best one found, and `met` is False.

    Args:
        model: as in `calibrate`. A compiled one must be eager.
        tokens: calibration chunks, int64 [chunks, length]; see `calibration_tokens`, `chunks_of`.
        tp: number of ranks; all of them run in this process.
        budget: what the plan may cost, and what it has to save.
        validation: held-out chunks, int64 [chunks, length]; the last eighth of the calibration
            chunks by default. Nothing is trained on them; budget and recovery are judged by them.
        points: which sync points may be dropped.
        router: as in `compile`.
        settings: how tuning runs.
        progress: whether to show progress bars.

    Raises:
        UsageError: tp, the tokens or the model do not fit, or the budget asks for latencies that
            cannot be measured here.
        RefusalError: no sync point can be dropped.
        SaveError: there is no room for hidden states, results or weights.
    """
    settings = settings or TuneSettings()
    check_latencies(budget, settings.latencies, tp)
    compiled = undropped(model, tp, None, router)
    train, held = _parted(compiled.model, tokens, validation)
    able, refused = droppable(compiled.base.program, points, compiled.plan.router)
    if not able:
        (layer, name), reason = next(iter(refused.items()))
        raise RefusalError(
            "The model has no sync point to drop.", point=f"layers.{layer}.{name}", reason=reason
        )
    with hidden_states(settings.scratch, settings.memory_bytes) as states:
        orders = _orders(compiled, train, able, settings, states, progress)
        tuning = _Tuning(_source_of(model), compiled, orders, budget, settings, progress)
        return tuning.run(train, held, states, refused)


def _orders(
    compiled: CompiledModel,
    train: Tensor,
    points: tuple[PointName, ...],
    settings: TuneSettings,
    states: HiddenStates,
    progress: bool,
) -> tuple[Order, ...]:
    """Different orders of the points, on chunks evenly spaced over the calibration text."""
    count = min(settings.order_chunks, len(train))
    chunks = train[torch.arange(count) * len(train) // count]
    plain, router = local_executor(compiled), compiled.plan.router
    keyed = {"router": router.value, "batch_size": settings.batch_size}
    evaluator = Evaluator(
        compiled.base,
        plain,
        chunks,
        states=states,
        record=Record(settings.resume, key_of(plain, chunks, keyed)),
        router=router,
        batch_size=settings.batch_size,
    )
    found: dict[tuple[PointName, ...], Order] = {}
    for spread in settings.spreads:
        order = order_points(
            evaluator, points, first=settings.first, spread=spread, progress=progress
        )
        found.setdefault(tuple(step.point for step in order.steps), order)
    return tuple(found.values())


class _Tuning:
    """What follows once the order is known."""

    def __init__(
        self,
        source: ModelSource,
        compiled: CompiledModel,
        orders: tuple[Order, ...],
        budget: Budget,
        settings: TuneSettings,
        progress: bool,
    ) -> None:
        self.source, self.compiled, self.orders = source, compiled, orders
        self.budget, self.settings, self.progress = budget, settings, progress
        self.meter = Meter(
            compiled,
            source if isinstance(source, str | Path) else compiled.model,
            settings.latencies,
            settings.latency_tokens,
        )

    def run(
        self, train: Tensor, held: Tensor, states: HiddenStates, refused: dict[PointName, str]
    ) -> Tuned:
        """Chooses a prefix and a recovery, and gathers all figures."""
        all_trials = self._trials(train, held, states)
        counts = [self._count(order) for order in self.orders]
        place, choice = choose(all_trials, counts, self.budget, self.settings.effort)
        order, trials = self.orders[place], all_trials[place]
        chosen = choice.attempt
        recovered = trials.recovered(chosen)
        plan = replace(
            self._plan(order, chosen.count),
            head_groups=recovered.head_groups or self.compiled.plan.head_groups,
            model=structure_of(self.compiled.model),
        )
        savings = self.meter.measured(plan)
        tau1, tau2 = thresholds_of(order, choice)
        tuned = Tuned(
            plan,
            recovered.tensors,
            self.budget,
            self.budget.allows(chosen.increase) and saves_enough(savings, self.budget),
            choice.why,
            chosen.rung,
            undropped=trials.undropped.quality,
            zero_shot=trials.attempt(chosen.count, Rung.ZERO_SHOT).held_out.quality,
            recovered=chosen.held_out.quality,
            savings=savings,
            tau1=tau1,
            tau2=tau2,
            points=decisions_of(order, choice, trials.made, {**refused, **order.refused}),
            attempts=tuple(attempt for each in all_trials for attempt in each.made),
            source=self.source,
        )
        return with_figures(tuned)

    def _count(self, order: Order) -> int:
        """How many points have to go; if nothing has to be saved, how many may."""
        if not self.budget.saves:
            return len(order.steps)
        plans = [self._plan(order, count) for count in range(len(order.steps) + 1)]
        return self.meter.shortest(plans, self.budget)

    def _trials(
        self, train: Tensor, held: Tensor, states: HiddenStates
    ) -> tuple[RecordedTrials, ...]:
        """One an order; what they measure is shared."""
        settings, plain = self.settings, local_executor(self.compiled)
        keyed = {
            "tune": [_facts(settings.short), _facts(settings.distill), settings.group_chunks],
            "sampled": settings.sampled,
            "validation": hashlib.sha256(held.contiguous().numpy().tobytes()).hexdigest(),
            "router": self.compiled.plan.router.value,
            "batch_size": settings.batch_size,
        }
        key = key_of(plain, train, keyed)
        record, told = Record(settings.resume, key), _telling(self.progress)
        bench = Bench(
            self.source,
            self.compiled,
            train,
            self._sampled(train),
            settings.group_chunks,
            Validation(plain, held, states=states, batch_size=settings.batch_size),
            settings.short,
            settings.distill,
            _stored_dtypes(self.source),
            self.progress,
        )
        return tuple(
            RecordedTrials(bench, order, record, settings.resume, key, told)
            for order in self.orders
        )

    def _sampled(self, train: Tensor) -> Tensor:
        """What the model writes itself, int64 [chunks, length]."""
        count = self.settings.sampled
        if not count:
            return train[:0]
        return sampled_chunks(self.source, train, count=count, progress=self.progress)

    def _plan(self, order: Order, count: int) -> Plan:
        return replace(self.compiled.plan, dropped=order.prefix(count))


def _facts(settings: DistillSettings) -> str:
    """What the result of a distillation depends on."""
    return repr(replace(settings, memory_bytes=None, scratch=None, resume=None))


def _telling(progress: bool) -> Callable[[Attempt], object]:
    """Prints each attempt between the progress bars."""

    def tell(attempt: Attempt) -> None:
        what = f"{attempt.count} points, order {attempt.order}, {attempt.rung.value}"
        size = "" if attempt.rung is Rung.ZERO_SHOT else ", full" if attempt.full else ", short"
        outcome = attempt.refused or f"{attempt.increase:+.2%} perplexity"
        tqdm.write(f"{what}{size}: {outcome}", file=sys.stderr)

    return tell if progress else lambda attempt: None


def _parted(
    model: PreTrainedModel, tokens: Tensor, validation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is trained on, and what is held out; both int64 [chunks, length]."""
    check_tokens(model, tokens)
    if validation is not None:
        check_tokens(model, validation)
        return tokens, validation
    held = -(-len(tokens) // _HELD_OUT)
    if held == len(tokens):
        raise UsageError(
            "The calibration text is too short to hold some of it out.",
            where="tokens",
            found="1 chunk",
            needed="2 at least, or validation chunks",
        )
    return tokens[:-held], tokens[-held:]


def _source_of(model: ModelSource | CompiledModel) -> ModelSource:
    if isinstance(model, CompiledModel):
        return model.directory or model.model
    return model


def _stored_dtypes(source: ModelSource) -> dict[str, torch.dtype]:
    """The dtypes of the checkpoint's tensors, in which new ones will be written."""
    state = load_model(source, None).model.state_dict()
    return {name: tensor.dtype for name, tensor in state.items()}

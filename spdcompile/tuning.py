"""From a model, a text and a budget to a plan: the whole method (SPD, arXiv 2502.20727).

Which points go first is found on the calibration text (`runtime/order.py`), how many and with which
recovery on held-out text (`ladder.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from spdcompile.budget import Budget
from spdcompile.compiled import CompiledModel
from spdcompile.errors import RefusalError, UsageError
from spdcompile.ladder import Attempt, Effort, Rung, choose_by_loss, choose_by_saving
from spdcompile.latency import Latencies, check_cores, measure_latencies, step_seconds
from spdcompile.loading import load_model
from spdcompile.models import ModelSource
from spdcompile.passes.base import Program
from spdcompile.passes.drop import PointName
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.plan import Plan
from spdcompile.planning import structure_of
from spdcompile.runtime.calibrate import Method, Points, droppable
from spdcompile.runtime.data import check_tokens
from spdcompile.runtime.distill import DistillSettings
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.hidden import HiddenStates, hidden_states
from spdcompile.runtime.order import Order, order_points
from spdcompile.runtime.record import Record, key_of
from spdcompile.runtime.validation import Validation
from spdcompile.trials import Bench, RecordedTrials
from spdcompile.tuned import Savings, Tuned, decisions_of, thresholds_of, with_figures
from spdcompile.undropped import local_executor, undropped

_HELD_OUT = 8
"""Without a text of its own, validation takes this part of the chunks, from the end."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """How tuning runs.

    Args:
        distill: how what is taken is distilled.
        search: how candidates are distilled; by default the same with a fifth of the steps.
        effort: how many candidates are distilled in full, and which recoveries may be used.
        order_chunks: on how many calibration chunks the order is measured.
        first: how it is found what each point costs by itself: leave-one-out, or first-order, which
            is an estimate that may put a point too late.
        group_chunks: on how many chunks heads are grouped.
        latencies: a table; None measures on this machine, if the budget asks for latency.
        latency_tokens: of the step that is measured.
        batch_size: chunks at a time, where nothing is trained.
        memory_bytes, scratch: as in `CalibrateSettings`.
        resume: directory that keeps what is measured, and new weights, so that a run that was
            killed goes on.
    """

    distill: DistillSettings = field(default_factory=DistillSettings)
    search: DistillSettings | None = None
    effort: Effort = field(default_factory=Effort)
    order_chunks: int = 32
    first: Method = Method.ALONE
    group_chunks: int = 32
    latencies: Latencies | None = None
    latency_tokens: int = 64
    batch_size: int = 8
    memory_bytes: int | None = 2**30
    scratch: str | Path | None = None
    resume: str | Path | None = None

    @property
    def short(self) -> DistillSettings:
        """How candidates are distilled."""
        return self.search or replace(self.distill, steps=max(1, self.distill.steps // 5))


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
    _check_latencies(budget, settings, tp)
    compiled = undropped(model, tp, None, router)
    train, held = _parted(compiled.model, tokens, validation)
    able, refused = droppable(compiled.base.program, points, compiled.plan.router)
    if not able:
        (layer, name), reason = next(iter(refused.items()))
        raise RefusalError(
            "The model has no sync point to drop.", point=f"layers.{layer}.{name}", reason=reason
        )
    with hidden_states(settings.scratch, settings.memory_bytes) as states:
        order = _ordered(compiled, train, able, settings, states, progress)
        source = _source_of(model)
        tuning = _Tuning(source, compiled, order, budget, settings, progress)
        return tuning.run(train, held, states, refused)


def _ordered(
    compiled: CompiledModel,
    train: Tensor,
    points: tuple[PointName, ...],
    settings: TuneSettings,
    states: HiddenStates,
    progress: bool,
) -> Order:
    """The order of the points, on chunks that are evenly spaced over the calibration text."""
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
    return order_points(evaluator, points, first=settings.first, progress=progress)


class _Tuning:
    """What follows once the order is known."""

    def __init__(
        self,
        source: ModelSource,
        compiled: CompiledModel,
        order: Order,
        budget: Budget,
        settings: TuneSettings,
        progress: bool,
    ) -> None:
        self.source, self.compiled, self.order = source, compiled, order
        self.budget, self.settings, self.progress = budget, settings, progress
        self.total = _count_all_reduces(compiled.program)
        self.latencies = settings.latencies

    def run(
        self, train: Tensor, held: Tensor, states: HiddenStates, refused: dict[PointName, str]
    ) -> Tuned:
        """Chooses a prefix and a recovery, and gathers all figures."""
        trials = self._trials(train, held, states)
        count = self._needed()
        effort = self.settings.effort
        if self.budget.saves:
            choice = choose_by_saving(trials, count, self.budget, effort)
        else:
            choice = choose_by_loss(trials, len(self.order.steps), self.budget, effort)
        chosen = choice.attempt
        recovered = trials.recovered(chosen)
        plan = replace(
            self.compiled.plan,
            dropped=self.order.prefix(chosen.count),
            head_groups=recovered.head_groups or self.compiled.plan.head_groups,
            model=structure_of(self.compiled.model),
        )
        savings = self._savings(plan)
        tau1, tau2 = thresholds_of(self.order, choice)
        tuned = Tuned(
            plan,
            recovered.tensors,
            self.budget,
            self._is_met(chosen, savings),
            choice.why,
            chosen.rung,
            undropped=trials.undropped.quality,
            zero_shot=trials.attempt(chosen.count, Rung.ZERO_SHOT).held_out.quality,
            recovered=chosen.held_out.quality,
            savings=savings,
            tau1=tau1,
            tau2=tau2,
            points=decisions_of(self.order, choice, trials.made, {**refused, **self.order.refused}),
            attempts=trials.made,
            source=self.source,
        )
        return with_figures(tuned)

    def _trials(self, train: Tensor, held: Tensor, states: HiddenStates) -> RecordedTrials:
        settings, plain = self.settings, local_executor(self.compiled)
        bench = Bench(
            self.source,
            self.compiled,
            self.order,
            train,
            settings.group_chunks,
            Validation(plain, held, states=states, batch_size=settings.batch_size),
            settings.short,
            settings.distill,
            _stored_dtypes(self.source),
            self.progress,
        )
        keyed = {
            "tune": [repr(settings.short), repr(settings.distill), settings.group_chunks],
            "validation": hashlib.sha256(held.contiguous().numpy().tobytes()).hexdigest(),
            "router": self.compiled.plan.router.value,
            "batch_size": settings.batch_size,
        }
        key = key_of(plain, train, keyed)
        told = _telling(self.progress)
        return RecordedTrials(bench, Record(settings.resume, key), settings.resume, key, told)

    def _needed(self) -> int:
        """How many points have to go to save what the budget asks for; all if that is too few."""
        most = len(self.order.steps)
        if not self.budget.saves:
            return 0
        if self.budget.min_faster is not None and self.latencies is None and most:
            plan = self._plan(most)
            self.latencies = measure_latencies(
                self._model, plan, tokens=self.settings.latency_tokens
            )
        return next((k for k in range(most + 1) if self._saves_enough(self._plan(k))), most)

    def _saves_enough(self, plan: Plan) -> bool:
        savings = self._savings(plan, modelled=True)
        enough = savings.saved >= (self.budget.min_saved or 0) - 1e-9
        return enough and (savings.faster or 0) >= (self.budget.min_faster or 0)

    def _is_met(self, chosen: Attempt, savings: Savings) -> bool:
        faster = savings.faster if savings.measured is None else savings.measured
        return (
            self.budget.allows(chosen.increase)
            and savings.saved >= (self.budget.min_saved or 0) - 1e-9
            and (self.budget.min_faster is None or (faster or 0) >= self.budget.min_faster)
        )

    def _savings(self, plan: Plan, *, modelled: bool = False) -> Savings:
        """What a plan saves; measured too, unless `modelled`, if latencies were measured here."""
        remaining = _count_all_reduces(
            self.compiled.with_mask(
                replace(plan, head_groups=self.compiled.plan.head_groups)
            ).program
        )
        if self.latencies is None:
            return Savings(self.total, remaining)
        faster = self.latencies.saved(self.total - remaining)
        if modelled or self.settings.latencies is not None or not plan.dropped:
            return Savings(self.total, remaining, faster)
        before, after = step_seconds(self._model, plan, tokens=self.settings.latency_tokens)
        return Savings(self.total, remaining, faster, 1 - after / before)

    def _plan(self, count: int) -> Plan:
        return replace(self.compiled.plan, dropped=self.order.prefix(count))

    @property
    def _model(self) -> PreTrainedModel | str | Path:
        return self.source if isinstance(self.source, str | Path) else self.compiled.model


def _telling(progress: bool) -> Callable[[Attempt], object]:
    """Prints each attempt between the progress bars."""

    def tell(attempt: Attempt) -> None:
        what = f"{attempt.count} points, {attempt.rung.value}"
        size = "" if attempt.rung is Rung.ZERO_SHOT else ", full" if attempt.full else ", short"
        tqdm.write(f"{what}{size}: {attempt.refused or f'{attempt.increase:+.2%} perplexity'}")

    return tell if progress else lambda attempt: None


def _check_latencies(budget: Budget, settings: TuneSettings, tp: int) -> None:
    """Before the work: latencies that are asked for can be had."""
    if budget.min_faster is None:
        return
    if settings.latencies is None:
        check_cores(tp)
    elif settings.latencies.tp != tp:
        raise UsageError(
            "The latencies are for something else.",
            where="latencies",
            found=f"a table for tp={settings.latencies.tp}",
            needed=f"tp={tp}",
        )


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


def _count_all_reduces(program: Program) -> int:
    """Of one forward pass, those that nothing can drop too."""
    return sum(count_sync_nodes(program.graph_of(part).module) for part in program.parts)

"""How tuning runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from spdcompile.runtime.calibrate import Method
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.order import Spread
from spdcompile.tuning.ladder import Effort
from spdcompile.tuning.latency import Latencies

_SHORTER = 5
"""Candidates of the search get this part of the steps."""


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
        spreads: the orders to choose from, by how the points that stay lie among the others.
        sampled: chunks that the model writes itself (`sampled_chunks`), distilled on besides those
            that are given. The order, head groups and what is held out are of the given text.
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
    spreads: tuple[Spread, ...] = tuple(Spread)
    sampled: int = 0
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
        if self.search is not None:
            return self.search
        full = self.distill
        return replace(
            full,
            steps=None if full.steps is None else max(1, full.steps // _SHORTER),
            epochs=full.epochs / _SHORTER,
            logit_steps=full.logit_steps // _SHORTER,
        )

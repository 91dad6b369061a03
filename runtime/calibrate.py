"""What dropping each sync point costs: three ways of asking (SPD, arXiv 2502.20727, and beyond).

Cumulative, the paper's: s_i = PPL(points i..L dropped) - PPL(points i+1..L dropped). Leave-one-out:
PPL(point i dropped) - PPL(none). First order: the derivative of the loss; see first_order.py. The
blocks before the first dropped point are plain in all of them, and are run once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from spdcompile.errors import RefusalError
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program, RegionKind
from spdcompile.passes.drop import Drop, PointName, refusal_of
from spdcompile.plan import Router
from spdcompile.runtime.evaluate import Evaluator, Quality
from spdcompile.runtime.first_order import FirstOrder
from spdcompile.runtime.hidden import HiddenStates, hidden_states
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.record import Record, key_of


class Method(enum.Enum):
    """How the cost of a drop is found."""

    CUMULATIVE = "cumulative"
    """The paper's: with all later points dropped as well."""
    ALONE = "leave-one-out"
    """By itself, all other points kept."""
    FIRST_ORDER = "first-order"
    """By itself, from one backward pass: perplexity to first, KL divergence to second order."""


class Points(enum.Enum):
    """Which sync points are measured."""

    ALL = "all"
    ATTENTION = "attn"


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """How calibration runs.

    Args:
        points: which sync points.
        methods: how their cost is found.
        batch_size: chunks at a time.
        memory_bytes: hidden states beyond this many are in mapped files; None for all in memory.
        scratch: directory for those files; the system's own by default.
        resume: directory that keeps what is measured, so that a run that was killed goes on.
    """

    points: Points = Points.ALL
    methods: tuple[Method, ...] = (Method.CUMULATIVE,)
    batch_size: int = 8
    memory_bytes: int | None = 2**30
    scratch: str | Path | None = None
    resume: str | Path | None = None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What dropping sync points costs.

    Args:
        points: the sync points measured, in program order.
        undropped: with all points kept.
        found: by method, for each point: with it and all later ones dropped (cumulative), with it
            alone dropped (leave-one-out; first-order, where agreement is not known).
        refused: points that cannot be dropped, and why.
        block_evaluations: blocks run on the whole calibration set, a backward run counted as two;
            less what an earlier run had found.
        naive_block_evaluations: what evaluations of the whole model would have run, first-order
            counted as one a point.
    """

    points: tuple[PointName, ...]
    undropped: Quality
    found: Mapping[Method, tuple[Quality, ...]]
    refused: Mapping[PointName, str] = field(default_factory=dict)
    block_evaluations: int = 0
    naive_block_evaluations: int = 0

    def scores_by(self, method: Method) -> dict[PointName, float]:
        """For each point the perplexity that dropping it adds, by a method that was asked for."""
        dropped = [quality.perplexity for quality in self.found[method]]
        kept = [self.undropped.perplexity] * len(dropped)
        if method is Method.CUMULATIVE:
            kept = [*dropped[1:], *kept[:1]]
        pairs = zip(self.points, dropped, kept, strict=True)
        return {point: with_it - without for point, with_it, without in pairs}

    @property
    def scores(self) -> tuple[float, ...]:
        """The scores of the points in order, by the first method that was asked for."""
        return tuple(self.scores_by(next(iter(self.found))).values())

    def least_sensitive(self, count: int) -> tuple[PointName, ...]:
        """The `count` points with the smallest scores, in program order."""
        order = sorted(range(len(self.points)), key=lambda place: self.scores[place])
        return tuple(self.points[place] for place in sorted(order[:count]))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        rows = []
        for place, (layer, name) in enumerate(self.points):
            row: dict[str, Any] = {"point": f"{layer}.{name}"}
            for method, qualities in self.found.items():
                score = self.scores_by(method)[layer, name]
                row[method.value] = {"score": score, **_fields(qualities[place])}
            rows.append(row)
        return {
            "undropped": _fields(self.undropped),
            "points": rows,
            "refused": {f"{layer}.{name}": why for (layer, name), why in self.refused.items()},
            "block_evaluations": self.block_evaluations,
            "naive_block_evaluations": self.naive_block_evaluations,
        }


def _fields(quality: Quality) -> dict[str, float | None]:
    return {
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "agreement": quality.agreement,
    }


def calibrate(
    base: pipeline.Lowering,
    plain: LocalExecutor,
    tokens: Tensor,
    *,
    router: Router = Router.EXACT,
    settings: CalibrateSettings | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures what dropping each sync point costs.

    Args:
        base: the program before anything is dropped.
        plain: runs it.
        tokens: calibration chunks, int64 [chunks, length].
        router: what routers read where a dropped point is pending.

    Raises:
        RefusalError: none of the points can be dropped.
        UsageError: the tokens do not fit.
        SaveError: there is no room for hidden states or results.
    """
    settings = settings or CalibrateSettings()
    points, refused = droppable(base.program, settings.points, router)
    if not points:
        (layer, name), reason = next(iter(refused.items()))
        raise RefusalError(
            "The model has no sync point to measure.",
            point=f"layers.{layer}.{name}",
            reason=reason,
            fix="trace-and-report lists what can be dropped",
        )
    keyed = {"router": router.value, "batch_size": settings.batch_size}
    record = Record(settings.resume, key_of(plain, tokens, keyed))
    with hidden_states(settings.scratch, settings.memory_bytes) as states:
        run = _Run(base, plain, tokens, points, router, settings, states, record)
        return run.all(refused, progress)


def droppable(
    program: Program, points: Points, router: Router
) -> tuple[tuple[PointName, ...], dict[PointName, str]]:
    """Which sync points can be dropped, each by itself, and why the others cannot."""
    able: list[PointName] = []
    refused: dict[PointName, str] = {}
    for layer, name in _candidates(program, points):
        reason = refusal_of(program, layer, name, router)
        if not reason:
            try:
                Drop(frozenset({(layer, name)}), router)(program)
            except RefusalError as why:
                reason = why.reason
        if reason:
            refused[layer, name] = reason
        else:
            able.append((layer, name))
    return tuple(able), refused


def _candidates(program: Program, points: Points) -> list[PointName]:
    """The sync points of all blocks, merged ones included, in order."""
    found = []
    for part in program.parts:
        if part.layer is None:
            continue
        block = program.graph_of(part)
        attention = {r.name for r in block.regions if r.kind is RegionKind.ATTENTION}
        names = [name for point in block.sync_points for name in (*point.merged, point.name)]
        if points is Points.ATTENTION:
            names = [name for name in names if name in attention] or ["attn"]
        found += [(part.layer, name) for name in names]
    return found


class _Run:
    """One calibration."""

    def __init__(
        self,
        base: pipeline.Lowering,
        plain: LocalExecutor,
        tokens: Tensor,
        points: tuple[PointName, ...],
        router: Router,
        settings: CalibrateSettings,
        states: HiddenStates,
        record: Record,
    ) -> None:
        self.points, self.methods = points, settings.methods
        self.bar = tqdm(desc="sensitivity", unit="block", disable=True)
        self.evaluator = Evaluator(
            base,
            plain,
            tokens,
            states=states,
            record=record,
            router=router,
            batch_size=settings.batch_size,
            advance=self._advance,
        )
        self.layers = sum(part.layer is not None for part in base.program.parts)
        asked = Method.FIRST_ORDER in self.methods
        self.gradient = FirstOrder(self.evaluator, points) if asked else None

    def _advance(self, blocks: int) -> None:
        self.bar.update(blocks)

    def all(self, refused: Mapping[PointName, str], progress: bool) -> Sensitivity:
        """Every method that was asked for."""
        evaluations = self._evaluations()
        batches = len(self.evaluator.batches)
        total = self._left(evaluations) * batches
        with tqdm(total=total, desc="sensitivity", unit="block", disable=not progress) as self.bar:
            undropped = self.evaluator.quality(())
            found = {method: self._measured(method, undropped) for method in self.methods}
        naive = (len(evaluations) + (len(self.points) if self.gradient else 0)) * self.layers
        done = self.evaluator.blocks_run // batches
        return Sensitivity(self.points, undropped, found, refused, done, naive)

    def _dropped(self, method: Method) -> list[Sequence[PointName]]:
        """What a method drops for each point."""
        if method is Method.CUMULATIVE:
            return [self.points[place:] for place in range(len(self.points))]
        return [(point,) for point in self.points]

    def _evaluations(self) -> set[frozenset[PointName]]:
        measured = [method for method in self.methods if method is not Method.FIRST_ORDER]
        sets = (frozenset(points) for method in measured for points in self._dropped(method))
        return {frozenset(), *sets}

    def _left(self, evaluations: set[frozenset[PointName]]) -> int:
        """Blocks still to be run on each batch."""
        left = [points for points in evaluations if not self.evaluator.is_known(points)]
        blocks = [self.evaluator.blocks_from(points) for points in left]
        if self.gradient and self.evaluator.record.get(self._gradient_name) is None:
            blocks.append(self.gradient.blocks)
        return sum(blocks) + (self.layers if blocks else 0)

    def _measured(self, method: Method, undropped: Quality) -> tuple[Quality, ...]:
        if method is Method.FIRST_ORDER:
            kept = undropped.perplexity
            return tuple(Quality(kept * (1 + loss), kl) for loss, kl in self._changes())
        # From the last one on: the first evaluations are the cheap ones.
        found = [self.evaluator.quality(points) for points in reversed(self._dropped(method))]
        return tuple(reversed(found))

    def _changes(self) -> list[tuple[float, float]]:
        """Change of the loss and KL divergence of each point, kept in the record as one result."""
        assert self.gradient is not None, "made where the method was asked for"
        changes = self.evaluator.record.get(self._gradient_name)
        if changes is None:
            changes = [(change.loss, change.kl) for change in self.gradient.run()]
            self.evaluator.record.put(self._gradient_name, changes)
        return changes

    @property
    def _gradient_name(self) -> str:
        return "first-order of " + ",".join(f"{layer}.{name}" for layer, name in self.points)

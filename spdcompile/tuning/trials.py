"""Drops prefixes of an order, recovers from it in one way or another, and remembers what came out.

What is measured goes to a record, and new weights beside it, so that a run that was killed goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from spdcompile.calibration import distill
from spdcompile.compiled import CompiledModel
from spdcompile.errors import RefusalError
from spdcompile.grouping import group_heads
from spdcompile.models import ModelSource
from spdcompile.passes.drop import PointName
from spdcompile.plan import HeadGroups, Plan
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.order import Order
from spdcompile.runtime.record import Record
from spdcompile.runtime.validation import HeldOut, Validation
from spdcompile.tuning.ladder import Attempt, Rung
from spdcompile.undropped import undropped

_ATTENTION = "attn"


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials share.

    Args:
        source: the model itself, for head groups of its own.
        compiled: it with nothing dropped.
        train: chunks to distil and to group heads on, int64 [chunks, length].
        sampled: chunks that the model wrote, to distil on besides, int64 [chunks, length].
        group_chunks: how many of them heads are grouped on.
        validation: measures on held-out chunks.
        short, full: how to distil during the search, and what is taken.
        dtypes: of each tensor of the model as it is stored.
        progress: whether to show progress bars.
    """

    source: ModelSource
    compiled: CompiledModel
    train: Tensor
    sampled: Tensor
    group_chunks: int
    validation: Validation
    short: DistillSettings
    full: DistillSettings
    dtypes: Mapping[str, torch.dtype]
    progress: bool = True


@dataclass(frozen=True, slots=True)
class Recovered:
    """Weights and head groups that a recovery gave.

    Args:
        tensors: new global tensors under their state_dict names, in the model's own dtypes.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    head_groups: HeadGroups = field(default_factory=dict)


class RecordedTrials:
    """Makes each attempt once.

    Args:
        order: the points, in the order in which they are dropped.
        record: keeps the figures and head groups, and new weights until the end.
        directory: where the record is, and a distillation under way; None keeps all in memory.
        key: tells what is there from what other runs keep.
        told: called with each attempt that was made or found.
    """

    def __init__(
        self,
        bench: Bench,
        order: Order,
        record: Record,
        directory: str | Path | None = None,
        key: str = "",
        told: Callable[[Attempt], object] = lambda attempt: None,
    ) -> None:
        self.bench, self.order = bench, order
        self._record, self._told = record, told
        self._aside = None if directory is None else Path(directory) / f"{key[:16]}-unfinished"
        self._made: dict[str, Attempt] = {}
        self._results: dict[str, Recovered] = {}
        self._grouped: dict[frozenset[int], CompiledModel] = {}
        self._undropped = self._held_out("none", lambda: bench.compiled)

    @property
    def made(self) -> tuple[Attempt, ...]:
        """What was tried so far, in order."""
        return tuple(self._made.values())

    @property
    def undropped(self) -> HeldOut:
        """The program that drops nothing."""
        return self._undropped

    def attempt(
        self, count: int, rung: Rung, *, full: bool = False, grouped_from: int = 0
    ) -> Attempt:
        """Drops the first `count` points and recovers from it; see `ladder.Trials`."""
        layers = self._layers(count, grouped_from) if rung is Rung.GROUP else frozenset()
        full = full and rung is not Rung.ZERO_SHOT
        name = _name(self.order.prefix(count), rung, full, layers)
        if name not in self._made:
            began, known = time.perf_counter(), self._record.get(name) is not None
            try:
                if rung is Rung.GROUP and not layers:
                    raise _nothing_to_group()
                held_out = self._held_out(name, lambda: self._program(count, rung, full, layers))
                refused = ""
            except RefusalError as why:
                held_out = self.attempt(count, Rung.ZERO_SHOT).held_out
                refused = f"{why.summary} {why.reason}".rstrip(".")
            seconds = 0.0 if known else time.perf_counter() - began
            increase = held_out.increase(self._undropped)
            order = self.order.spread.value
            made = Attempt(count, rung, full, held_out, increase, seconds, refused, layers, order)
            self._made[name] = made
            self._told(made)
        return self._made[name]

    def recovered(self, attempt: Attempt) -> Recovered:
        """The weights of an attempt, made anew if they are gone; those of all others are let go."""
        points = self.order.prefix(attempt.count)
        name = _name(points, attempt.rung, attempt.full, attempt.layers)
        if attempt.rung is not Rung.ZERO_SHOT and name not in self._results:
            self._results[name] = self._stored(name, attempt.layers) or self._distilled(
                attempt.count, attempt.full, attempt.layers
            )
        self._remove_others(name)
        return self._results.get(name, Recovered())

    def _held_out(self, name: str, program: Callable[[], CompiledModel]) -> HeldOut:
        found = self._record.get(name)
        if found is None:
            found = self.bench.validation.measure(program().executor).to_dict()
            self._record.put(name, found)
        return HeldOut.from_dict(found)

    def _program(self, count: int, rung: Rung, full: bool, layers: frozenset[int]) -> CompiledModel:
        base = self._base(layers)
        dropped = base.with_mask(_plan(base, self.order.prefix(count)))
        if rung is Rung.ZERO_SHOT:
            return dropped
        name = _name(self.order.prefix(count), rung, full, layers)
        recovered = self._distilled(count, full, layers)
        self._keep(name, recovered)
        return dropped.with_weights(self._loaded(recovered.tensors))

    def _distilled(self, count: int, full: bool, layers: frozenset[int]) -> Recovered:
        bench, base = self.bench, self._base(layers)
        settings = bench.full if full else bench.short
        # The given text comes last: distillation chooses the best tensors by the last chunks.
        found = distill(
            base,
            torch.cat([bench.sampled, bench.train]),
            tp=base.plan.tp,
            spd_mask=_plan(base, self.order.prefix(count)),
            settings=settings if self._aside is None else replace(settings, resume=self._aside),
            progress=bench.progress,
        )
        # What is measured is what will be stored: rounding new weights is part of their cost.
        stored = {name: x.to(bench.dtypes.get(name, x.dtype)) for name, x in found.tensors.items()}
        return Recovered(stored, base.plan.head_groups)

    def _base(self, layers: frozenset[int]) -> CompiledModel:
        """The undropped model, with the heads of some layers grouped."""
        if not layers:
            return self.bench.compiled
        if layers not in self._grouped:
            own = self.bench.compiled.plan
            self._grouped.clear()  # one at a time: each has shards of its own
            self._grouped[layers] = undropped(
                self.bench.source, own.tp, self._head_groups(layers), own.router.value
            )
        return self._grouped[layers]

    def _head_groups(self, layers: frozenset[int]) -> HeadGroups:
        """The model's own head groups, those of some layers chosen anew."""
        own = self.bench.compiled.plan
        if not layers:
            return own.head_groups
        name = f"head groups of layers {','.join(map(str, sorted(layers)))}"
        found = self._record.get(name)
        if found is None:
            grouping = group_heads(
                self.bench.source,
                self.bench.train[: self.bench.group_chunks],
                tp=own.tp,
                layers=layers,
                router=own.router.value,
                progress=self.bench.progress,
            )
            found = grouping.plan.to_dict()
            self._record.put(name, found)
        return {**own.head_groups, **Plan.from_dict(found).head_groups}

    def _layers(self, count: int, grouped_from: int) -> frozenset[int]:
        """Layers whose attention points are dropped from a place of the order on."""
        steps = self.order.steps[grouped_from:count]
        return frozenset(step.point[0] for step in steps if step.point[1] == _ATTENTION)

    def _loaded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the dtypes in which everything is measured."""
        own = self.bench.compiled.model.state_dict()
        return {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}

    def _keep(self, name: str, recovered: Recovered) -> None:
        if self._aside is None:
            self._results[name] = recovered
            return
        self._record.put_tensors(name, recovered.tensors)
        # It is whole now: the parts of it that distillation kept are not needed any more.
        shutil.rmtree(self._aside, ignore_errors=True)

    def _stored(self, name: str, layers: frozenset[int]) -> Recovered | None:
        tensors = self._record.get_tensors(name)
        return None if tensors is None else Recovered(tensors, self._head_groups(layers))

    def _remove_others(self, name: str) -> None:
        """Lets go of the weights of all attempts but one."""
        self._results = {key: kept for key, kept in self._results.items() if key == name}
        self._record.remove_tensors_but(name)


def _plan(base: CompiledModel, points: frozenset[PointName]) -> Plan:
    return replace(base.plan, dropped=points)


def _name(points: frozenset[PointName], rung: Rung, full: bool, layers: frozenset[int]) -> str:
    """Under which a record keeps an attempt."""
    dropped = ",".join(f"{layer}.{point}" for layer, point in sorted(points)) or "none"
    if not points or rung is Rung.ZERO_SHOT:
        return dropped
    groups = f", heads of {','.join(map(str, sorted(layers)))}" if layers else ""
    return f"{dropped}: {rung.value}, {'full' if full else 'short'}{groups}"


def _nothing_to_group() -> RefusalError:
    return RefusalError(
        "There are no heads to group:", point="", reason="no attention point is among them"
    )

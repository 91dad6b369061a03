"""Block-to-block distillation (SPD, arXiv 2502.20727): blocks without their sync points learn to
give what the original blocks give.

The unit is a segment (segments.py): a single block where the plan keeps each block's last point, as
the paper has it, else a run of blocks. It is trained on its own, by MSE between its output and the
original's, only its own parameters moving, all ranks at once. What comes out is an ordinary
checkpoint again: shards are disjoint, and what is replicated stays one tensor.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spdcompile.passes import pipeline
from spdcompile.passes.base import Part
from spdcompile.passes.drop import PointName
from spdcompile.plan import Router
from spdcompile.runtime.data import batches_of
from spdcompile.runtime.distill_settings import DistillSettings, StudentInput
from spdcompile.runtime.distilled import Distilled, SegmentHistory
from spdcompile.runtime.hidden import HiddenStates, hidden_states
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.norm_scales import NormScales
from spdcompile.runtime.record import Record, key_of
from spdcompile.runtime.segments import (
    Segment,
    Values,
    bound,
    only,
    read_after,
    read_from,
    run_parts,
    segments_of,
    trainable,
)
from spdcompile.runtime.training import Loss, Tensors, TrainingSettings, train, with_rate_for

_BATCHES_JUDGED = 4
_ALL_WRONG = 1.0
"""Nats by which logits have nothing in common any more with what they should be."""


def distill(
    base: pipeline.Lowering,
    teacher: LocalExecutor,
    tokens: Tensor,
    *,
    points: frozenset[PointName],
    router: Router = Router.EXACT,
    settings: DistillSettings | None = None,
    progress: bool = True,
) -> Distilled:
    """Trains every segment that loses a sync point to give what the original gives.

    Memory holds the hidden states up to `settings.memory_bytes`, and of one segment the gradients,
    the optimiser's state and a batch's activations; with `settings.logit_steps`, in the end, those
    of all blocks from the first trained one on.

    Args:
        base: the program before anything is dropped.
        teacher: runs it, eagerly; its weights stay as they are; float32 is advised.
        tokens: calibration chunks, int64 [chunks, length].
        points: the sync points to drop.
        router: what routers read where a dropped point is pending.

    Raises:
        RefusalError: a point cannot be dropped.
        UsageError: the tokens do not fit, or what an earlier run left cannot be read.
        SaveError: there is no room for hidden states or results.
    """
    settings = settings or DistillSettings()
    dropped = pipeline.advance(base, pipeline.changing(points, router)).program
    student = teacher.with_program(dropped)
    record = Record(settings.resume, key_of(teacher, tokens, _keyed(points, router, settings)))
    with hidden_states(settings.scratch, settings.memory_bytes) as states:
        run = _Distillation(teacher, student, tokens, record, settings, states)
        return run.run(progress)


def _keyed(
    points: frozenset[PointName], router: Router, settings: DistillSettings
) -> dict[str, Any]:
    """What the result depends on besides weights and tokens, as JSON data."""
    places = {"memory_bytes", "scratch", "resume"}
    return {
        "points": sorted(points),
        "router": router.value,
        **{
            name: value.value if isinstance(value, enum.Enum) else value
            for name, value in asdict(settings).items()
            if name not in places
        },
    }


class _Distillation:
    """Goes through the segments once, carrying the teacher's and the student's hidden states."""

    def __init__(
        self,
        teacher: LocalExecutor,
        student: LocalExecutor,
        tokens: Tensor,
        record: Record,
        settings: DistillSettings,
        states: HiddenStates,
    ) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.record, self.states = record, states
        self.batches = list(batches_of(tokens, settings.batch_size))
        self.segments = segments_of(teacher.program, student.program)
        chosen = settings.batches(len(self.batches))
        self.training, self.logit_training, self.held_out = chosen

    def run(self, progress: bool) -> Distilled:
        """Distils segment by segment."""
        progressive = self.settings.student_input is StudentInput.PROGRESSIVE
        teaching = {index: self._start(index) for index in (*self.training, *self.held_out)}
        learning = teaching
        changed: Tensors = {}
        history = []
        left = sum(segment.drops for segment in self.segments) * self._steps
        left += self.settings.logit_steps
        with tqdm(total=left, desc="distil", unit="step", disable=not progress) as bar:
            for segment in self.segments:
                taught = self._advanced(self.teacher, segment.original, segment, teaching)
                found: Tensors = {}
                if segment.drops:
                    entry, found = self._distilled(segment, learning, taught, bar)
                    history.append(entry)
                    changed.update(found)
                if progressive:
                    learning = self._advanced(self.student, segment.parts, segment, learning, found)
                teaching = taught
                learning = learning if progressive else teaching
                self.teacher.release()
            if history and self.settings.logit_steps:
                entry, found = self._by_logits(history[0].layers[0], changed, bar)
                history.append(entry)
                changed.update(found)
        return Distilled(changed, tuple(history))

    @property
    def _steps(self) -> int:
        return self.settings.training.steps_over(len(self.training))

    @torch.no_grad()
    def _start(self, index: int) -> Values:
        """What there is of a batch before the first block."""
        batch = self.batches[index].to(self.teacher.device)
        env = program_inputs(self.teacher.program, batch)
        self.teacher.run_parts(env, self.teacher.program.parts[:1])
        return self.states.keep(env)

    @torch.no_grad()
    def _advanced(
        self,
        executor: LocalExecutor,
        parts: Sequence[Part],
        segment: Segment,
        before: Mapping[int, Values],
        tensors: Tensors | None = None,
    ) -> dict[int, Values]:
        """What is read after a segment, by batch, from what was there before it."""
        later = read_after(segment, self.teacher.program, self.student.program)
        params = bound(parts, tensors or {})
        after = {}
        for index, values in before.items():
            made = run_parts(executor, parts, self._on_device(values), params)
            after[index] = only(values, later) | self.states.keep(only(made, later))
        return after

    def _distilled(
        self,
        segment: Segment,
        inputs: Mapping[int, Values],
        targets: Mapping[int, Values],
        bar: tqdm,
    ) -> tuple[SegmentHistory, Tensors]:
        """A segment's training, or what an earlier run found."""
        scales = NormScales(self.student.program, segment.parts)

        def loss(tensors: Mapping[str, Tensor], batch: int) -> Tensor:
            given, params = self._on_device(inputs[batch]), scales.bound(tensors)
            made = run_parts(self.student, segment.parts, given, params)
            wanted = self._on_device({name: targets[batch][name] for name in segment.outputs})
            return torch.stack([F.mse_loss(made[name], wanted[name]) for name in wanted]).mean()

        tensors = trainable(self.teacher, segment.original)
        if self.settings.rank_local_norms:
            tensors |= scales.ones(tensors)
        judged = self._judged(self.training)
        wanted = [targets[batch][name] for batch in judged for name in segment.outputs]
        power = sum(float(value.float().square().mean()) for value in wanted) / len(wanted)
        settings = self._scaled(self.settings.training, loss, tensors, judged, power)
        entry, found = self._trained(
            segment.layers, "mse", tensors, loss, self.training, settings, bar
        )
        return entry, scales.folded(found)

    def _judged(self, training: Sequence[int]) -> Sequence[int]:
        """Batches on which it is seen how wrong something is before it is trained."""
        return (self.held_out or training)[:_BATCHES_JUDGED]

    def _scaled(
        self,
        settings: TrainingSettings,
        loss: Loss,
        tensors: Tensors,
        batches: Sequence[int],
        whole: float,
    ) -> TrainingSettings:
        if not self.settings.scale_rate:
            return settings
        return with_rate_for(loss, tensors, batches, whole, settings)

    def _by_logits(self, first: int, changed: Tensors, bar: tqdm) -> tuple[SegmentHistory, Tensors]:
        """The training of all blocks from the first one trained on, by the model's logits."""
        teacher, student = self.teacher.program, self.student.program
        place = next(place for place, part in enumerate(teacher.parts) if part.layer == first)
        originals, parts = teacher.parts[place:], student.parts[place:]
        begin, ends = self._around(place)

        def loss(tensors: Mapping[str, Tensor], batch: int) -> Tensor:
            made = run_parts(
                self.student, parts, self._on_device(begin[batch]), bound(parts, tensors)
            )
            with torch.no_grad():
                wanted = run_parts(self.teacher, originals[-1:], self._on_device(ends[batch]), {})
            return _divergence(wanted[teacher.output], made[student.output])

        tensors = {**trainable(self.teacher, originals[:-1]), **changed}
        layers = tuple(part.layer for part in parts if part.layer is not None)
        judged = self._judged(self.logit_training)
        settings = self._scaled(self.settings.logit_training, loss, tensors, judged, _ALL_WRONG)
        return self._trained(layers, "kl", tensors, loss, self.logit_training, settings, bar)

    @torch.no_grad()
    def _around(self, place: int) -> tuple[dict[int, Values], dict[int, Values]]:
        """What parts from a place on read, and what the original's last one does, by batch."""
        programs = (self.teacher.program, self.student.program)
        begin, ends = {}, {}
        for index in (*self.logit_training, *self.held_out):
            env = self._on_device(self._start(index))
            self.teacher.run_parts(env, self.teacher.program.parts[1:place])
            begin[index] = self.states.keep(only(env, read_from(place, *programs)))
            self.teacher.run_parts(env, self.teacher.program.parts[place:-1])
            ends[index] = self.states.keep(only(env, read_from(-1, self.teacher.program)))
        return begin, ends

    def _trained(
        self,
        layers: tuple[int, ...],
        kind: str,
        tensors: Tensors,
        loss: Loss,
        training: Sequence[int],
        settings: TrainingSettings,
        bar: tqdm,
    ) -> tuple[SegmentHistory, Tensors]:
        """Training by a loss, or what an earlier run found."""
        name = f"{kind} of layers {layers[0]}-{layers[-1]}"
        known, tensors_known = self.record.get(name), self.record.get_tensors(name)
        if known is not None and tensors_known is not None:
            bar.update(settings.steps_over(len(training)))
            entry = SegmentHistory(**{**known, "layers": tuple(known["layers"])})
            return entry, tensors_known
        trained = train(
            tensors,
            loss,
            training=training,
            held_out=self.held_out,
            settings=settings,
            advance=bar.update,
        )
        entry = SegmentHistory(layers, trained.before, trained.after, trained.steps, kind)
        self.record.put_tensors(name, trained.tensors)
        self.record.put(name, asdict(entry))
        return entry, trained.tensors

    def _on_device(self, values: Values) -> Values:
        return {name: tensor.to(self.teacher.device) for name, tensor in values.items()}


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean KL(wanted || found) per token of logits [B, S, V], in nats."""
    wanted, found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()

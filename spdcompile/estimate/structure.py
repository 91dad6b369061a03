"""A model captured once, whose programs for any plan are counted without weights."""

from __future__ import annotations

from functools import cached_property

import torch

from spdcompile.errors import RefusalError, UsageError
from spdcompile.estimate.work import Step, Work, work_of
from spdcompile.models import ModelSource, resolve_model
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.capture import decoder_layers
from spdcompile.passes.pipeline import Lowering
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.plan import HeadGroups, Plan


class Structure:
    """The programs of one model.

    Args:
        model: a model, a local directory or a configuration; weights are not read.
        dtype: of its parameters; that of the configuration by default.
        vocabulary: whether token embeddings are split.
    """

    def __init__(
        self,
        model: ModelSource,
        dtype: torch.dtype | None = None,
        vocabulary: Vocabulary = Vocabulary.BY_SIZE,
    ) -> None:
        self.model = resolve_model(model, weights=False, dtype=dtype)
        self._vocabulary = vocabulary
        self._bases: list[tuple[int, HeadGroups, Lowering]] = []
        self._works: dict[tuple[str, Step], Work] = {}
        self._programs: dict[str, tuple[Program, Program | RefusalError]] = {}

    @cached_property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model)[1])

    @cached_property
    def _captured(self) -> Lowering:
        return pipeline.start(self.model)

    def work(self, plan: Plan, step: Step) -> Work:
        """What a rank does in a step.

        Raises:
            UsageError: the program does not take sequences of that length.
            RefusalError: a sync point cannot be dropped, or the step has a context and the model
                cannot run on new tokens alone.
        """
        key = plan.content_hash, step
        if key not in self._works:
            self._works[key] = self._counted(plan, step)
        return self._works[key]

    def _counted(self, plan: Plan, step: Step) -> Work:
        plain, remembering = self._of(plan)
        if isinstance(remembering, Program):
            program = remembering
        elif step.context:
            raise remembering
        else:
            program = plain
        longest = program.max_length
        if longest is not None and step.context + step.new > longest:
            raise UsageError(
                "The sequence is too long.",
                where=f"{step.new} new tokens after {step.context}",
                needed=f"at most {longest} in all, beyond which the model takes another path",
            )
        return work_of(program, step)

    def remembering(self, plan: Plan) -> Program:
        """The program of a plan that runs on new tokens alone.

        Raises:
            RefusalError: there is none, or a sync point cannot be dropped.
        """
        _, remembering = self._of(plan)
        if isinstance(remembering, RefusalError):
            raise remembering
        return remembering

    def lowering(self, plan: Plan) -> Lowering:
        """The program of a plan, and how it came about."""
        return pipeline.advance(self._base(plan), pipeline.changing(plan.dropped, plan.router))

    def _base(self, plan: Plan) -> Lowering:
        for tp, groups, lowering in self._bases:
            if (tp, groups) == (plan.tp, plan.head_groups):
                return lowering
        steps = pipeline.preserving(plan.tp, plan.head_groups, self._vocabulary)
        lowering = pipeline.advance(self._captured, steps)
        self._bases.append((plan.tp, plan.head_groups, lowering))
        return lowering

    def _of(self, plan: Plan) -> tuple[Program, Program | RefusalError]:
        """The program of a plan, and the one that remembers, or why there is none."""
        key = plan.content_hash
        if key not in self._programs:
            lowering = self.lowering(plan)
            try:
                remembering = pipeline.advance(lowering, pipeline.remembering()).program
            except RefusalError as refusal:
                self._programs[key] = lowering.program, refusal
            else:
                self._programs[key] = lowering.program, remembering
        return self._programs[key]

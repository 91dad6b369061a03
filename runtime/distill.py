"""Block-to-block distillation (SPD, arXiv 2502.20727): a block without its sync point learns to
give what the original block gives.

Each block is trained on its own, by MSE between its output and the original block's, only its own
parameters moving. It runs as extracted from the program, all ranks at once, and what comes out is
an ordinary checkpoint again: shards are disjoint, and what is replicated stays one tensor.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from spdcompile.errors import RefusalError
from spdcompile.passes import pipeline
from spdcompile.passes.base import Part
from spdcompile.passes.drop import PointName
from spdcompile.plan import Router
from spdcompile.runtime.data import batches_of
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.weights import bind, unbind

Values = dict[str, Tensor]


class StudentInput(enum.Enum):
    """What the student block is fed; the target is the original block's output in both."""

    TEACHER = "teacher"
    """The original model's hidden states: every block is trained for itself."""
    PROGRESSIVE = "progressive"
    """The hidden states that the blocks replaced so far give: a block also mends what they left."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How a block is trained.

    Args:
        student_input: see StudentInput.
        steps: optimiser steps a block.
        learning_rate: the peak; it rises over the first tenth of the steps and falls to zero.
        batch_size: chunks a step.
        seed: for the order of the batches.
    """

    student_input: StudentInput = StudentInput.PROGRESSIVE
    steps: int = 80
    learning_rate: float = 1e-3
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BlockHistory:
    """How a block's training went.

    Args:
        before, after: MSE over the whole calibration set.
    """

    layer: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Distilled:
    """What distillation changed.

    Args:
        tensors: new global tensors under their state_dict names.
        history: one entry a distilled block, in order.
    """

    tensors: Mapping[str, Tensor]
    history: tuple[BlockHistory, ...] = field(default=())

    def apply_to(self, model: PreTrainedModel) -> None:
        """Writes the new tensors into a model, in its own dtype."""
        own = model.state_dict()
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)


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
    """Trains every block that loses a sync point to give what the original block gives.

    Args:
        base: the program before anything is dropped.
        teacher: runs it, eagerly; its weights stay as they are; float32 is advised.
        tokens: calibration chunks, int64 [chunks, length].
        points: the sync points to drop; the last one of each block must stay.
        router: what routers read where a dropped point is pending.

    Raises:
        RefusalError: a point cannot be dropped.
        UsageError: the tokens do not fit.
    """
    settings = settings or DistillSettings()
    dropped = pipeline.advance(base, pipeline.changing(points, router)).program
    trainer = _Trainer(teacher, teacher.with_program(dropped), settings)
    return trainer.run(list(batches_of(tokens, settings.batch_size)), progress)


class _Trainer:
    """Goes through the blocks once, carrying the teacher's and the student's hidden states."""

    def __init__(self, teacher: Executor, student: Executor, settings: DistillSettings) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.student.params = dict(teacher.params)

    def run(self, batches: list[Tensor], progress: bool) -> Distilled:
        """Distils block by block."""
        teaching = [self._start(batch) for batch in batches]
        learning = [dict(env) for env in teaching]
        changed: dict[str, Tensor] = {}
        history = []
        pairs = zip(self.teacher.program.parts, self.student.program.parts, strict=True)
        blocks = [pair for pair in pairs if pair[0].layer is not None]
        _check_outputs(blocks)
        for original, part in tqdm(blocks, desc="distil", unit="block", disable=not progress):
            targets = [self._advance(self.teacher, original, env) for env in teaching]
            if part.dropped:
                progressive = self.settings.student_input is StudentInput.PROGRESSIVE
                inputs = learning if progressive else teaching
                history.append(self._train(part, inputs, targets))
                changed.update(unbind(part, self.student.params[part.name]))
            for env in learning:
                self._advance(self.student, part, env, keep=True)
            for env, target in zip(teaching, targets, strict=True):
                env.update(target)
        return Distilled(changed, tuple(history))

    @torch.no_grad()
    def _start(self, batch: Tensor) -> Values:
        env = program_inputs(self.teacher.program, batch.to(self.teacher.device))
        self.teacher.run_parts(env, self.teacher.program.parts[:1])
        return env

    @torch.no_grad()
    def _advance(
        self, executor: Executor, part: Part, env: Values, *, keep: bool = False
    ) -> Values:
        outputs = executor.call(part, env)
        if keep:
            env.update(outputs)
        return outputs

    def _train(self, part: Part, inputs: list[Values], targets: list[Values]) -> BlockHistory:
        """Trains one block; its parameters in the student are replaced."""
        fixed = self.student.params[part.name]
        params = {k: v.detach().clone() for k, v in fixed.items() if v.is_floating_point()}
        before = self._error(part, params, inputs, targets)
        optimizer = torch.optim.AdamW(
            params.values(), lr=self.settings.learning_rate, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        gradient = torch.func.grad(self._loss, argnums=1)
        for batch in self._order(len(inputs)):
            gradients = gradient(part, params, inputs[batch], targets[batch])
            for name, param in params.items():
                spec = part.shards.get(name)
                param.grad = gradients[name] if spec is None else spec.tied(gradients[name])
            optimizer.step()
            schedule.step()
        self._replace(part, params)
        after = self._error(part, self.student.params[part.name], inputs, targets)
        assert part.layer is not None, "only blocks are trained"
        return BlockHistory(part.layer, before, after)

    def _loss(self, part: Part, params: Values, env: Values, target: Values) -> Tensor:
        outputs = self.student.call(part, env, params)
        losses = [F.mse_loss(outputs[name], target[name]) for name in target]
        return torch.stack(losses).mean()

    def _rate(self, step: int) -> float:
        warm = max(1, self.settings.steps // 10)
        rising, falling = (step + 1) / warm, (self.settings.steps - step) / self.settings.steps
        return min(rising, falling)

    def _order(self, count: int) -> Iterator[int]:
        """Which batch each step takes: all of them, shuffled, again and again."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order: list[int] = []
        for _ in range(self.settings.steps):
            order = order or torch.randperm(count, generator=generator).tolist()
            yield order.pop()

    def _replace(self, part: Part, params: Values) -> None:
        """Takes the trained parameters over, by way of the checkpoint's own tensors."""
        program = self.student.program
        whole = dict(unbind(part, {**self.student.params[part.name], **params}))
        trained = bind(program, part, whole, self.student.device)
        self.student.params = {**self.student.params, part.name: trained}

    @torch.no_grad()
    def _error(
        self, part: Part, params: Mapping[str, Tensor], inputs: list[Values], targets: list[Values]
    ) -> float:
        losses = [
            float(self._loss(part, dict(params), env, target))
            for env, target in zip(inputs, targets, strict=True)
        ]
        return sum(losses) / len(losses)


def _check_outputs(blocks: list[tuple[Part, Part]]) -> None:
    for original, part in blocks:
        if part.outputs != original.outputs:
            raise RefusalError(
                f"{part.name} cannot be distilled by itself.",
                point=", ".join(f"{part.name}.{name}" for name in part.dropped) or part.name,
                reason="it passes partial sums on to the next block, so it has no output of its "
                "own to compare with the original's",
                fix="keep the block's last sync point",
            )

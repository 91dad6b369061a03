"""How distillation is done."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spdcompile.errors import UsageError
from spdcompile.runtime.training import Optimizer, Schedule, TrainingSettings

_MOST_HELD_OUT = 16


class StudentInput(enum.Enum):
    """What a student segment is fed; the target is the original's output in both."""

    TEACHER = "teacher"
    """The original model's hidden states: every segment is trained for itself."""
    PROGRESSIVE = "progressive"
    """The hidden states that the segments replaced so far give: one also mends what they left."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How segments are trained; docs/distillation.md compares settings.

    Args:
        student_input: see StudentInput.
        steps: optimiser steps a segment; None to count epochs.
        epochs: passes over the training chunks, where steps is None.
        logit_steps: further steps in the end, in which all blocks from the first trained one on
            learn together to give the original's logits (KL divergence); they take the weights
            and activations of the whole model. 0 for none.
        optimizer, schedule: see there.
        learning_rate: the peak, of AdamW's scale for every optimiser.
        scale_rate: whether a segment's rate is that times the fourth root of its relative error
            (MSE over the mean square of the target; 1 at most), so that one which is nearly right
            is not disturbed. That of the logits is scaled by their KL divergence, in nats.
        logit_learning_rate: the peak of the steps for the logits.
        warmup: share of the steps in which the rate rises to it.
        rank_local_norms: whether each rank has norm weights of its own while a segment is trained;
            they are multiplied into its linears in the end (norm_scales.py).
        batch_size: chunks a step.
        held_out: share of the batches in use that are not trained on, and by which the best tensors
            are chosen, rounded to whole batches, at most 16; with none the last tensors are taken.
        checks: how often they are chosen, evenly spread over the steps.
        patience: end a segment after so many checks in a row that are no better; None for never.
        seed: for the order of the batches.
        memory_bytes: of hidden states, how much to keep in memory; None for all. What is beyond
            goes to mapped files.
        scratch: directory in which those are made; the system's own by default.
        resume: directory for what is finished, from which a run that was killed goes on.

    Raises:
        UsageError: a number with which nothing can be trained.
    """

    student_input: StudentInput = StudentInput.PROGRESSIVE
    steps: int | None = 150
    epochs: float = 10.0
    logit_steps: int = 0
    optimizer: Optimizer = Optimizer.MUON
    schedule: Schedule = Schedule.LINEAR
    learning_rate: float = 6e-3
    scale_rate: bool = True
    logit_learning_rate: float = 2e-3
    warmup: float = 0.05
    rank_local_norms: bool = False
    batch_size: int = 4
    held_out: float = 0.06
    checks: int = 8
    patience: int | None = None
    seed: int = 0
    memory_bytes: int | None = 2**30
    scratch: str | Path | None = None
    resume: str | Path | None = None

    def __post_init__(self) -> None:
        for name, holds, needed in (
            ("steps", self.steps is None or self.steps >= 1, "1 at least, or None"),
            ("epochs", self.epochs > 0, "a number above 0"),
            ("logit_steps", self.logit_steps >= 0, "0 or more"),
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("logit_learning_rate", self.logit_learning_rate > 0, "a number above 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("batch_size", self.batch_size >= 1, "1 at least"),
            ("held_out", 0 <= self.held_out < 1, "a share from 0 to below 1"),
            ("checks", self.checks >= 1, "1 at least"),
            ("patience", self.patience is None or self.patience >= 1, "1 at least, or None"),
        ):
            if not holds:
                raise UsageError(
                    "Nothing can be distilled like that.",
                    where=name,
                    found=str(getattr(self, name)),
                    needed=needed,
                )

    @classmethod
    def paper(cls, learning_rate: float = 5e-5, **others: Any) -> DistillSettings:
        """The paper's: 10 epochs at a constant rate, every block by itself.

        Which optimiser it used, and whether a block is fed the original model's hidden states, is
        not published; AdamW and the original's are taken here.

        Args:
            learning_rate: 5e-5 for LLaMA-2, 1e-6 for OPT.
            others: settings that are to differ.
        """
        settings = {
            "student_input": StudentInput.TEACHER,
            "steps": None,
            "epochs": 10.0,
            "optimizer": Optimizer.ADAMW,
            "schedule": Schedule.CONSTANT,
            "scale_rate": False,
            "warmup": 0.0,
            "held_out": 0.0,
        }
        return cls(**{**settings, "learning_rate": learning_rate, **others})

    def batches(self, count: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Which of so many batches segments are trained on, which the logits, which are held out.

        As many as the steps take, evenly spaced over the text; those held out are its last.
        """
        left = count if self.steps is None else max(self.steps, self.logit_steps)
        used = min(count, math.ceil(left / (1 - self.held_out)))
        held = min(round(used * self.held_out), _MOST_HELD_OUT, count - 1)
        rest = count - held
        training = _spaced(rest, rest if self.steps is None else self.steps)
        return training, _spaced(rest, self.logit_steps), range(rest, count)

    @property
    def training(self) -> TrainingSettings:
        """What concerns the training loop."""
        return TrainingSettings(
            steps=self.steps,
            epochs=self.epochs,
            optimizer=self.optimizer,
            schedule=self.schedule,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            checks=self.checks,
            patience=self.patience,
            seed=self.seed,
        )

    @property
    def logit_training(self) -> TrainingSettings:
        """The same for the logits."""
        rate = self.logit_learning_rate
        return replace(self.training, steps=self.logit_steps, learning_rate=rate)


def _spaced(count: int, wanted: int) -> Sequence[int]:
    """At most so many of the first numbers, evenly spaced."""
    taken = min(count, wanted)
    return [place * count // taken for place in range(taken)]

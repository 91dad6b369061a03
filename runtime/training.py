"""Training tensors by a loss: the loop that every distillation runs.

What is trained are the checkpoint's own tensors, whole; the loss cuts them into the ranks' shards.
So what several ranks hold stays one tensor, and an optimiser sees matrices and not shards.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""(tensors, which batch) -> its loss, a scalar."""


class Optimizer(enum.Enum):
    """What turns gradients into steps."""

    MUON = "muon"
    """torch.optim.Muon for matrices, AdamW for the rest, both with steps of AdamW's size."""
    ADAMW = "adamw"


class Schedule(enum.Enum):
    """The learning rate over the steps, after a warm-up in a straight line."""

    LINEAR = "linear"
    """Falls to zero in a straight line."""
    COSINE = "cosine"
    """Falls to zero as half a cosine."""
    CONSTANT = "constant"

    def at(self, done: float) -> float:
        """The share of the peak rate.

        Args:
            done: share of the steps taken, from 0 to 1.
        """
        if self is Schedule.LINEAR:
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if self is Schedule.COSINE else 1.0


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How tensors are trained.

    Args:
        steps: optimiser steps, or None to count epochs.
        epochs: passes over the training batches, where steps is None.
        learning_rate: the peak.
        warmup: share of the steps in which the rate rises to it.
        checks: how often the held-out loss is taken, evenly spread; the best tensors are kept.
            With no batches held out, it is taken at the end alone.
        patience: end after so many checks in a row that are no better; None for never.
        seed: for the order of the batches.
    """

    steps: int | None
    epochs: float
    optimizer: Optimizer
    schedule: Schedule
    learning_rate: float
    warmup: float
    checks: int
    patience: int | None
    seed: int

    def steps_over(self, batches: int) -> int:
        """The number of steps, with so many training batches."""
        return max(1, round(self.epochs * batches)) if self.steps is None else self.steps


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gave.

    Args:
        tensors: the best found.
        before, after: their loss on the held-out batches, or on all if none are held out.
        steps: those taken.
    """

    tensors: Tensors
    before: float
    after: float
    steps: int


def train(
    tensors: Mapping[str, Tensor],
    loss: Loss,
    *,
    training: Sequence[int],
    held_out: Sequence[int],
    settings: TrainingSettings,
    advance: Callable[[int], object] = lambda steps: None,
) -> Trained:
    """Lowers a loss by training tensors, and gives the best that were found.

    Args:
        tensors: where training begins; they stay as they are.
        training, held_out: the batches to train on and to choose by.
        advance: told how many steps are done, those not taken included.
    """
    params = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    judged = held_out or training
    before = _mean(params, loss, judged)
    best, least, worse, steps = dict(tensors), before, 0, settings.steps_over(len(training))
    optimizers = _optimizers(params, settings)
    checks = settings.checks if held_out else 1
    checked = {math.ceil(steps * (place + 1) / checks) for place in range(checks)}
    taken = 0
    for batch in _order(training, steps, settings.seed):
        rate = settings.learning_rate * _share(taken, steps, settings)
        _step(params, loss, batch, optimizers, rate)
        taken += 1
        advance(1)
        if taken not in checked:
            continue
        found = _mean(params, loss, judged)
        worse = 0 if found < least else worse + 1
        if found < least:
            least, best = found, {name: param.detach().clone() for name, param in params.items()}
        if worse == settings.patience:
            break
    advance(steps - taken)
    return Trained(best, before, least, taken)


@torch.no_grad()
def with_rate_for(
    loss: Loss,
    tensors: Mapping[str, Tensor],
    batches: Sequence[int],
    whole: float,
    settings: TrainingSettings,
) -> TrainingSettings:
    """The settings with a rate that does not disturb what is nearly right.

    Args:
        batches: on which it is seen how wrong the tensors are before training.
        whole: the loss of what is all wrong; the rate is multiplied by the fourth root of the loss
            as a share of it, 1 at most.
    """
    share = _mean(tensors, loss, batches) / whole if whole else 1.0
    return replace(settings, learning_rate=settings.learning_rate * min(1.0, share**0.25))


def _step(
    params: Tensors, loss: Loss, batch: int, optimizers: list[torch.optim.Optimizer], rate: float
) -> None:
    for param in params.values():
        param.requires_grad_()
    value = loss(params, batch)
    # A tensor that the loss does not reach has no gradient, and stays.
    gradients = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    for param, gradient in zip(params.values(), gradients, strict=True):
        param.requires_grad_(False)
        param.grad = gradient
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def _optimizers(params: Tensors, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    muon = settings.optimizer is Optimizer.MUON
    matrices = [param for param in params.values() if muon and param.dim() == 2]
    rest = [param for param in params.values() if not (muon and param.dim() == 2)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        optimizers.append(torch.optim.AdamW(rest, weight_decay=0.0))
    return optimizers


def _share(taken: int, steps: int, settings: TrainingSettings) -> float:
    """The share of the peak rate at a step."""
    rising = (taken + 1) / max(1.0, settings.warmup * steps)
    return min(rising, settings.schedule.at(taken / steps))


def _order(batches: Sequence[int], steps: int, seed: int) -> Iterator[int]:
    """Which batch each step takes: all of them, shuffled, again and again."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[left.pop()]


@torch.no_grad()
def _mean(params: Mapping[str, Tensor], loss: Loss, batches: Sequence[int]) -> float:
    return sum(float(loss(params, batch)) for batch in batches) / len(batches)

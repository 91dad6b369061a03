"""A tiny model to tune, and text on which dropping its sync points costs something."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile import Budget, DistillSettings, Points, Tuned, TuneSettings
from spdcompile.compiled import CompiledModel
from spdcompile.tuning.ladder import Effort, Rung
from tests.models import tiny

TP, LAYERS = 2, 3
SETTINGS = TuneSettings(
    distill=DistillSettings(steps=12, batch_size=4),
    search=DistillSettings(steps=4, batch_size=4),
    order_chunks=4,
    batch_size=4,
    effort=Effort(full_runs=2, rungs=(Rung.ZERO_SHOT, Rung.DISTIL)),
)
ZERO_SHOT = replace(SETTINGS, effort=Effort(rungs=(Rung.ZERO_SHOT,)))


@cache
def model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@cache
@torch.no_grad()
def tokens() -> Tensor:
    """24 chunks of 16 tokens; 3 of them are held out.

    Drawn from the model itself, sharpened: on random text a drop may even do good.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 96, (24, 1), generator=generator)
    for _ in range(15):
        chances = (2 * model()(drawn).logits[:, -1]).softmax(-1)
        drawn = torch.cat([drawn, torch.multinomial(chances, 1, generator=generator)], 1)
    return drawn


@cache
def compiled_model() -> CompiledModel:
    return spdcompile.compile(model(), tp=TP, executor="local", backend="eager")


def tuned(
    budget: Budget,
    settings: TuneSettings = SETTINGS,
    points: Points = Points.ATTENTION,
    validation: Tensor | None = None,
) -> Tuned:
    """Tunes the model, by default with distillation and for attention points."""
    return spdcompile.tune(
        compiled_model(),
        tokens(),
        tp=TP,
        budget=budget,
        points=points,
        validation=validation,
        settings=settings,
        progress=False,
    )

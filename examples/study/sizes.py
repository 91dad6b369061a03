"""How much of everything the study measures: the one place where its time is decided."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the study.

    Args:
        tps: numbers of ranks; the last one is the main one, with the whole curves.
        length: tokens a chunk.
        heldout: held-out chunks, on which all quality is reported.
        calibration: calibration chunks for distillation.
        scoring: chunks for sensitivity scores.
        choosing: calibration chunks on which assignments and layers are chosen.
        grouping: calibration chunks for head distances and norms.
        draws: random head groupings.
        shares: shares of the attention sync points, in percent.
        steps: optimiser steps a unit of distillation.
        batch: chunks a step.
        prompts: greedy continuations.
        prompt_length: tokens a prompt.
        new_tokens: tokens a continuation.
        decode_chunks: chunks that are decoded token by token.
        decode_length: tokens of each.
    """

    tps: tuple[int, ...] = (2, 4, 8)
    length: int = 256
    heldout: int = 32
    calibration: int = 128
    scoring: int = 8
    choosing: int = 8
    grouping: int = 4
    draws: int = 10
    shares: tuple[int, ...] = (25, 50, 75, 100)
    steps: int = 60
    batch: int = 4
    prompts: int = 32
    prompt_length: int = 64
    new_tokens: int = 64
    decode_chunks: int = 16
    decode_length: int = 128

    @property
    def main_tp(self) -> int:
        """The number of ranks with the whole curves."""
        return self.tps[-1]


FULL = Sizes()
QUICK = Sizes(
    tps=(2,),
    length=32,
    heldout=2,
    calibration=4,
    scoring=2,
    choosing=2,
    grouping=1,
    draws=1,
    shares=(50, 100),
    steps=2,
    batch=2,
    prompts=2,
    prompt_length=8,
    new_tokens=4,
    decode_chunks=2,
    decode_length=8,
)
QUICK_LAYERS = 3  # of the model's blocks, the first ones

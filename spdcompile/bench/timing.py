"""Times steps of variants: twice to get ready, then all of them in turn, round by round."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.bench.meeting import Meeting
from spdcompile.bench.settings import Step
from spdcompile.bench.subject import NotMeasuredError, Subject
from spdcompile.bench.variants import Variant


@dataclass(slots=True)
class Timed:
    """What was measured of a step of a variant, on one rank.

    Args:
        samples: seconds, of each prompt (TTFT) or each further token (TPOT).
        error: the largest difference of a logit from the reference, relative to the reference's
            largest logit, over all calls; None without a reference.
        first, second: seconds of the first call, which compiles, and of the one after it; of
            TPOT, a call is the context and all further tokens.
    """

    samples: list[float] = field(default_factory=list)
    error: float | None = None
    first: float = 0.0
    second: float = 0.0


@dataclass(slots=True)
class Entrant:
    """A variant of a run.

    Args:
        subject: what is called; None on the ranks that a variant of one process leaves out, and
            where it could not be made.
        timed: by the step's name.
        load: seconds that it took to make.
        reason: why it is not measured, or "".
    """

    variant: Variant
    subject: Subject | None
    timed: Mapping[str, Timed]
    load: float = 0.0
    reason: str = ""


class Course:
    """Takes variants through the steps, on every rank alike.

    Args:
        steps: what is timed.
        vocabulary: of the model, for the tokens.
        reference: of each step's name the logits to compare with; empty for no comparison.
    """

    def __init__(
        self,
        meeting: Meeting,
        steps: Sequence[Step],
        vocabulary: int,
        reference: Mapping[str, Tensor],
    ) -> None:
        self._meeting, self._steps, self._reference = meeting, steps, reference
        self._ids = {step.name: step.input_ids(vocabulary) for step in steps}

    def get_ready(self, entrant: Entrant) -> None:
        """Runs every step twice, so that all is compiled."""
        for step in self._steps:
            timed = entrant.timed[step.name]
            for name in ("first", "second"):
                began = time.perf_counter()
                self._turn(entrant, step)
                setattr(timed, name, time.perf_counter() - began)
            timed.samples.clear()

    def rounds(
        self, entrants: Sequence[Entrant], count: int, tell: Callable[[int], object]
    ) -> None:
        """Every step of every variant once a round, in an order that changes from round to round.

        Args:
            tell: is given the number of each round that has ended.
        """
        turns = [(entrant, step) for entrant in entrants for step in self._steps]
        gc.collect()
        gc.freeze()  # else each variant would pay for looking through what the others have made
        for number in range(count):
            random.Random(number).shuffle(turns)
            for entrant, step in turns:
                self._turn(entrant, step)
            tell(number + 1)
        gc.unfreeze()

    def _turn(self, entrant: Entrant, step: Step) -> None:
        """One step of one variant; all ranks leave it together, and know whether it failed."""
        if entrant.reason:
            return
        variant = entrant.variant
        torch.set_num_threads(variant.threads)
        _, entrant.reason = self._meeting.attempt(
            lambda: self._take(entrant, step), alone=variant.ranks == 1
        )

    @torch.no_grad()
    def _take(self, entrant: Entrant, step: Step) -> None:
        subject, timed, ids = entrant.subject, entrant.timed[step.name], self._ids[step.name]
        assert subject is not None, "this rank was told to make it"
        cache = subject.new_cache(ids, step.tokens)
        pieces = [ids]
        if step.new:
            subject.fill(ids[:, : step.tokens], cache)
            pieces = list(ids[:, step.tokens :].split(1, 1))
        if entrant.variant.ranks > 1:
            dist.barrier()
        logits = []
        for piece in pieces:
            found, seconds = subject.timed(piece, cache)
            logits.append(found)
            timed.samples.append(seconds)
        if self._reference:
            error = _error(torch.stack(logits), self._reference[step.name])
            timed.error = max(error, timed.error or 0.0)


def _error(logits: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's largest logit.

    Raises:
        NotMeasuredError: a logit is not finite.
    """
    error = float((logits.float() - reference).abs().max() / reference.abs().max())
    if not math.isfinite(error):
        raise NotMeasuredError("its logits are not finite")
    return error

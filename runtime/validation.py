"""How good programs are on a held-out text, chunk by chunk, beside the one that drops nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from spdcompile.runtime.data import batches_of
from spdcompile.runtime.evaluate import Quality, Values, compared, read_by
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.hidden import HiddenStates
from spdcompile.runtime.inputs import program_inputs


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a program is worth on held-out chunks.

    Args:
        losses: of each chunk, the mean negative log-likelihood of its tokens after the first.
        kl, agreement: as in `Quality`.
    """

    losses: tuple[float, ...]
    kl: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(fmean(self.losses))

    @property
    def quality(self) -> Quality:
        """The same over all chunks."""
        return Quality(self.perplexity, self.kl, self.agreement)

    def increase(self, undropped: HeldOut) -> float:
        """The perplexity that is added, as a share of the undropped program's."""
        return self.perplexity / undropped.perplexity - 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"losses": list(self.losses), "kl": self.kl, "agreement": self.agreement}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeldOut:
        """What `to_dict` gave."""
        return cls(tuple(data["losses"]), data["kl"], data["agreement"])


def is_better(one: HeldOut, other: HeldOut) -> bool:
    """Whether one has the lower loss by more than the standard error of the difference.

    The chunks are the same, so the difference is taken chunk by chunk: most of what makes chunks
    differ is in both. Of a single chunk nothing is known, and the lower loss wins.
    """
    gains = [theirs - own for own, theirs in zip(one.losses, other.losses, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return fmean(gains) > error


class Validation:
    """Measures programs on held-out chunks.

    Args:
        plain: runs the program that drops nothing.
        tokens: int64 [chunks, length].
        states: keeps what the undropped program's last part reads.
    """

    def __init__(
        self, plain: Executor, tokens: Tensor, *, states: HiddenStates, batch_size: int = 8
    ) -> None:
        self._plain, self._states = plain, states
        self._batches = list(batches_of(tokens, batch_size))
        self._kept: list[Values] = []

    @torch.no_grad()
    def measure(self, executor: Executor) -> HeldOut:
        """Losses, KL divergence to the undropped program, and agreement with it.

        Args:
            executor: runs a program of the same model, whatever it drops and however it is split.
        """
        self._kept = self._kept or [self._before_last(tokens) for tokens in self._batches]
        postlude, output = self._plain.program.parts[-1], self._plain.program.output
        sums = []
        for tokens, kept in zip(self._batches, self._kept, strict=True):
            there = {name: tensor.to(self._plain.device) for name, tensor in kept.items()}
            plain = self._plain.call(postlude, there)[output]
            sums.append(compared(executor.run(self._inputs(executor, tokens)), plain, tokens))
        by_chunk = torch.cat(sums) / (self._batches[0].shape[1] - 1)
        kl, agreement = by_chunk[:, 1:].mean(0).tolist()
        return HeldOut(tuple(by_chunk[:, 0].tolist()), kl, agreement)

    def _before_last(self, tokens: Tensor) -> Values:
        """What the undropped program's last part reads."""
        env = self._inputs(self._plain, tokens)
        *parts, postlude = self._plain.program.parts
        self._plain.run_parts(env, parts)
        return self._states.keep({name: env[name] for name in read_by([postlude])})

    @staticmethod
    def _inputs(executor: Executor, tokens: Tensor) -> Values:
        return program_inputs(executor.program, tokens.to(executor.device))

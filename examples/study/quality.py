"""How good a program is beside the undropped model, on one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Run = Callable[[Tensor], Tensor]
"""int64 [B, S] -> logits [B, S, V], or [R, B, S, V] where each rank has its own."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a program is worth on a text.

    Args:
        perplexity: exp of the mean negative log-likelihood.
        increase: of the perplexity over the undropped model's, in percent.
        error: standard error of the increase over the chunks, in percentage points.
        kl: mean KL(undropped || this), in nats a token.
        agreement: share of tokens with the same likeliest next one.
    """

    perplexity: float
    increase: float
    error: float
    kl: float
    agreement: float

    def __str__(self) -> str:
        return f"{percent(self.increase)} ± {self.error:.2f}"


def percent(value: float) -> str:
    """A change in percent, with its sign and three digits that count."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:+.{digits}f} %"  # no -0.00


class Yardstick:
    """Compares programs with the model itself on one text.

    Args:
        model: the unsharded model.
        tokens: int64 [chunks, length].
        batch: chunks at a time.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, batch: int = 4) -> None:
        self.tokens, self._batch = tokens, batch
        self._log_probs = [self._model_log_probs(model, part) for part in tokens.split(batch)]
        losses = [_losses(x, part) for x, part in self._pairs()]
        self._losses = torch.cat(losses)
        self.perplexity = math.exp(float(self._losses.mean()))

    def score(self, run: Run) -> Score:
        """Scores a program; where each rank has logits of its own, their mean."""
        rows = [self._compared(run(part), own, part) for own, part in self._pairs()]
        losses, kl, agreement = torch.cat(rows, 1)
        added = losses - self._losses
        ratio = math.exp(float(added.mean()))
        error = float(added.std()) / math.sqrt(len(added)) if len(added) > 1 else 0.0
        return Score(
            self.perplexity * ratio,
            100 * (ratio - 1),
            100 * ratio * error,
            float(kl.mean()),
            float(agreement.mean()),
        )

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._log_probs, self.tokens.split(self._batch), strict=True)

    @staticmethod
    @torch.no_grad()
    def _model_log_probs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
        return model(tokens).logits[:, :-1].float().log_softmax(-1)

    @staticmethod
    @torch.no_grad()
    def _compared(logits: Tensor, model: Tensor, tokens: Tensor) -> Tensor:
        """Loss, KL and agreement of each chunk, float64 [3, B]."""
        ranks = logits if logits.dim() == 4 else logits[None]
        rows = []
        for rank in ranks:
            own = rank[:, :-1].float().log_softmax(-1)
            kl = (model.exp() * (model - own)).sum(-1).double().mean(1)
            equal = (own.argmax(-1) == model.argmax(-1)).double().mean(1)
            rows.append(torch.stack([_losses(own, tokens), kl, equal]))
        return torch.stack(rows).mean(0)


def _losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each chunk's tokens after its first, float64 [B]."""
    return -log_probs.gather(-1, tokens[:, 1:, None])[..., 0].double().mean(1)

"""What distillation gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class SegmentHistory:
    """How a segment's training went.

    Args:
        layers: its decoder layers.
        before, after: its loss over the held-out chunks, or over all of them if none are held out.
        steps: those taken.
        loss: "mse" of hidden states, or "kl", the divergence of the logits in nats per token.
    """

    layers: tuple[int, ...]
    before: float
    after: float
    steps: int
    loss: str = "mse"


@dataclass(frozen=True, slots=True)
class Distilled:
    """What distillation changed.

    Args:
        tensors: new global tensors under their state_dict names.
        history: one entry a distilled segment, in order.
    """

    tensors: Mapping[str, Tensor]
    history: tuple[SegmentHistory, ...] = field(default=())

    def apply_to(self, model: PreTrainedModel) -> None:
        """Writes the new tensors into a model, in its own dtype."""
        own = model.state_dict()
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)

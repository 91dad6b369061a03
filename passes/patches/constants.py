"""Methods that make a constant of a size, and state that a first call changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cpmant_mask(
    self: Any, input_ids: Tensor, span: Tensor, context: Tensor, length: Tensor
) -> Tensor:
    """CpmAntModel._prepare_attention_mask, whose left padding is a list of the tokens' numbers."""
    (batch, size), device = input_ids.shape, input_ids.device
    places = torch.arange(size, device=device)
    causal = context[:, :, None].logical_not() & (places <= places.view(-1, 1))
    seen = context[:, None, :].bool() | causal
    seen = seen & (span[:, None, :] == span[:, :, None])
    left = torch.arange(size - self.prompt_length, device=device).flip(0) < length[:, None]
    prompt = torch.ones(batch, self.prompt_length, dtype=torch.bool, device=device)
    filled = torch.cat((prompt, left), dim=1)
    return filled.view(batch, size, 1) & filled.view(batch, 1, size) & seen


def rescale_rwkv(model: Any) -> None:
    """What RwkvModel does to its weights before its first call in eval mode."""
    if model.training == model.layers_are_rescaled:
        model._rescale_layers()

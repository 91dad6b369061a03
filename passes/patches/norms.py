"""Norms that are a list of modules, one for each head, as one norm over all heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def stablelm_norms(self: Any, hidden: Tensor) -> Tensor:
    """StableLmLayerNormPerHead.forward: hidden [B, H, S, D] -> [B, H, S, D]."""
    first = self.norms[0]
    hidden = F.layer_norm(hidden, first.normalized_shape, eps=first.eps)
    if first.weight is not None:
        hidden = hidden * torch.stack([norm.weight for norm in self.norms]).unsqueeze(1)
    if first.bias is not None:
        hidden = hidden + torch.stack([norm.bias for norm in self.norms]).unsqueeze(1)
    return hidden

"""Mixtures of experts that loop over the experts that data chose, as grouped products.

Each function replaces a method of transformers' and computes the same: tokens are sorted by expert,
and one product takes each group of rows with its expert's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.ops import GROUPED_MM

Experts = Callable[[Tensor, Tensor], Tensor]  # sorted tokens, where groups end -> their results


def dbrx_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """DbrxExperts.forward: hidden [B, S, C], experts and their weights [B * S, k] -> [B, S, C]."""
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    gate, up, down = (weight.view(shape) for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))

    def experts(tokens: Tensor, ends: Tensor) -> Tensor:
        gated = self.mlp.activation_fn(GROUPED_MM(tokens, gate.mT, ends))
        return GROUPED_MM(gated * GROUPED_MM(tokens, up.mT, ends), down, ends)

    tokens = hidden.reshape(-1, self.hidden_size)
    return _mixed(experts, self.num_experts, tokens, chosen, weights).view(hidden.shape)


def longcat_flash_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """LongcatFlashExperts.forward: hidden [T, C], experts and their weights [T, k] -> [T, C].

    Experts beyond the routed ones give their input back.
    """
    if not self.num_routed_experts:
        return hidden * weights.sum(1, keepdim=True)

    def experts(tokens: Tensor, ends: Tensor) -> Tensor:
        gate_up = self.gate_up_proj[: self.num_routed_experts]
        gate, up = GROUPED_MM(tokens, gate_up.mT, ends).chunk(2, -1)
        return GROUPED_MM(self.act_fn(gate) * up, self.down_proj.mT, ends)

    idle = chosen >= self.num_routed_experts  # their rows come last, where the products are zero
    mixed = _mixed(experts, self.num_routed_experts, hidden, chosen, weights)
    return mixed + hidden * weights.masked_fill(~idle, 0.0).sum(1, keepdim=True).to(hidden.dtype)


def jetmoe_gating(self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """JetMoeTopKGating.forward, with the number of rows of each expert as a tensor.

    Returns: the order that sorts choices by expert [T * k], the tokens in that order, their
        weights, rows by expert [E], logits [T, E].
    """
    logits = self.layer(hidden).float()
    top, chosen = logits.topk(self.top_k, dim=1)
    weights = torch.softmax(top, dim=1).type_as(hidden).flatten()
    sorted_experts, order = chosen.flatten().sort(0)
    rows = _ends(sorted_experts, self.num_experts).diff(prepend=order.new_zeros(1))
    return order, order.div(self.top_k, rounding_mode="trunc"), weights[order], rows, logits


def jetmoe_experts(self: Any, inputs: Tensor, rows: Tensor) -> Tensor:
    """JetMoeParallelExperts.forward: inputs sorted by expert [T, C], rows of each [E]."""
    return GROUPED_MM(inputs, self.weight.mT, rows.cumsum(0).to(torch.int32))


def _mixed(
    experts: Experts, num_experts: int, tokens: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts; tokens [T, C], chosen and weights [T, k]."""
    sorted_experts, order = chosen.reshape(-1).sort()
    ends = _ends(sorted_experts, num_experts).to(torch.int32)
    out = experts(tokens[order // chosen.shape[1]], ends)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    return out[order.argsort()].view(*chosen.shape, -1).sum(1).to(tokens.dtype)


def _ends(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end, int64 [E]."""
    experts = torch.arange(num_experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, experts, right=True)

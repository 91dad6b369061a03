"""Attention as one operator: split by heads, a KV head with the query heads that share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import (
    Call,
    Operand,
    Placed,
    R,
    Replicate,
    Shard,
    placed,
)

_HEADS = 1
# Where the heads lie in a further operand, by its number of dims: a mask [B, H, S, T] or
# [H, S, T], sinks [H].
_EXTRA_HEADS = {4: 1, 3: 0, 1: 0}


@dataclass(frozen=True, slots=True)
class Attention:
    """Rule of attention over q [B, H, S, D], k and v [B, Hkv, T, D].

    Args:
        heads_out: the dim of the result that holds the heads.
    """

    heads_out: int

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """A query head's channels belong with those of its K and V head."""
        q, k, v, *rest = call.operands()
        merged = None
        for operand in (q, k, v):
            if operand.ids is not None:
                head = channels.merge_along(operand.ids, (0, 2, 3))
                repeats = q.shape[_HEADS] // operand.shape[_HEADS]
                merged = channels.merge(merged, head.repeat_interleave(repeats, _HEADS))
        for operand in rest:
            if operand.ids is not None:
                merged = channels.merge(merged, self._rest_heads(operand, q, channels))
        if merged is None:
            return None
        return merged.transpose(_HEADS, self.heads_out).expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """q, k and v split along their heads, group by group; masks whole; sinks by head."""
        q, k, v, *rest = call.operands()
        placements = [operand.placement for operand in (q, k, v)]
        cuts = self._rest_cuts(q, rest)
        if cuts is None:
            return None
        if all(isinstance(p, Replicate) for p in placements):
            return placed(R)
        if not all(isinstance(p, Shard) and p.dim == _HEADS for p in placements):
            return None
        heads, groups = q.placement.layout, k.placement.layout
        repeats = q.shape[_HEADS] // k.shape[_HEADS]
        if heads.region != groups.region or groups != v.placement.layout:
            return None
        if not np.array_equal(heads.owners, np.repeat(groups.owners, repeats)):
            return None
        return Placed(Shard(self.heads_out, q.placement.layout), cuts)

    @staticmethod
    def _rest_cuts(q: Operand, rest: list[Operand]) -> dict[int, Shard] | None:
        """Cuts for per-head extras (masks [., H, ., .], sinks [H]); None if one is not whole."""
        cuts: dict[int, Shard] = {}
        for index, operand in enumerate(rest, start=3):
            if not isinstance(operand.placement, Replicate):
                return None
            if isinstance(q.placement, Shard):
                dim = _EXTRA_HEADS.get(len(operand.shape))
                if dim is not None and operand.shape[dim] == q.shape[_HEADS] > 1:
                    cuts[index] = Shard(dim, q.placement.layout)
        return cuts

    @staticmethod
    def _rest_heads(operand: Operand, q: Operand, channels: Channels) -> Tensor:
        """Ids of an extra by query head, [1, H, 1, 1]; all in one class if it has no heads."""
        heads = _EXTRA_HEADS.get(len(operand.shape))
        others = tuple(dim for dim in range(len(operand.shape)) if dim != heads)
        merged = channels.merge_along(operand.ids, others) if others else operand.ids
        return merged.reshape(1, -1, 1, 1).expand(1, q.shape[_HEADS], 1, 1)


RULES = {
    ATTENTION: Attention(heads_out=2),
    torch.ops.aten.scaled_dot_product_attention.default: Attention(heads_out=1),
}

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


@dataclass(frozen=True, slots=True)
class Attention:
    """Rule of attention over q [B, H, S, D], k and v [B, Hkv, T, D].

    Args:
        heads_out: the dim of the result that holds the heads.
    """

    heads_out: int

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """A query head's channels belong with those of its K and V head."""
        q, k, v, *_ = call.operands()
        merged = None
        for operand in (q, k, v):
            if operand.ids is not None:
                head = channels.merge_along(operand.ids, (0, 2, 3))
                repeats = q.shape[_HEADS] // operand.shape[_HEADS]
                merged = channels.merge(merged, head.repeat_interleave(repeats, _HEADS))
        if merged is None:
            return None
        return merged.transpose(_HEADS, self.heads_out).expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """q, k and v split along their heads, group by group; masks whole; sinks by head."""
        q, k, v, *rest = call.operands()
        placements = [operand.placement for operand in (q, k, v)]
        cuts = self._rest_cuts(q, rest)
        if all(isinstance(p, Replicate) for p in placements):
            return placed(R) if not cuts else None
        if cuts is None or not all(isinstance(p, Shard) and p.dim == _HEADS for p in placements):
            return None
        repeats = q.shape[_HEADS] // k.shape[_HEADS]
        groups = np.repeat(k.placement.layout.owners, repeats)
        if not np.array_equal(q.placement.layout.owners, groups):
            return None
        if k.placement.layout != v.placement.layout:
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
                dim = {4: _HEADS, 1: 0}.get(len(operand.shape))
                if dim is not None and operand.shape[dim] == q.shape[_HEADS] > 1:
                    cuts[index] = Shard(dim, q.placement.layout)
        return cuts


RULES = {
    ATTENTION: Attention(heads_out=2),
    torch.ops.aten.scaled_dot_product_attention.default: Attention(heads_out=1),
}

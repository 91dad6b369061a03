"""Attention as one operator: split by heads, a KV head with the query heads that share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdcompile.passes.layout import Layout
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
                if repeats > 1:
                    channels.note_hubs(operand.ids)
                merged = channels.merge(merged, head.repeat_interleave(repeats, _HEADS))
        for operand in rest:
            if operand.ids is not None:
                merged = channels.merge(merged, self._rest_heads(operand, q, channels))
        if merged is None:
            return None
        return merged.transpose(_HEADS, self.heads_out).expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """q, k and v split along their heads, group by group; masks whole; sinks by head.

        A K or V that is whole is cut as q is, or serves all of q's heads as its one head.
        """
        q, k, v, *rest = call.operands()
        placements = [operand.placement for operand in (q, k, v)]
        cuts = self._rest_cuts(q, rest)
        if cuts is None:
            return None
        if all(isinstance(p, Replicate) for p in placements):
            return placed(R)
        if not (isinstance(q.placement, Shard) and q.placement.dim == _HEADS):
            return None
        heads = q.placement.layout
        for index, operand in ((1, k), (2, v)):
            whole = isinstance(operand.placement, Replicate)
            if whole and operand.shape[_HEADS] == q.shape[_HEADS]:
                cuts[index] = q.placement
        groups = [cuts.get(index, operand.placement) for index, operand in ((1, k), (2, v))]
        if groups[0] != groups[1] or not self._belong(heads, groups[0], q, k):
            return None
        return Placed(Shard(self.heads_out, heads), cuts)

    @staticmethod
    def _belong(heads: Layout, groups: Any, q: Operand, k: Operand) -> bool:
        """Whether each unit's query heads find their K/V heads on the unit, in their order."""
        if isinstance(groups, Replicate):
            return k.shape[_HEADS] == 1
        if not isinstance(groups, Shard) or groups.dim != _HEADS:
            return False
        layout, repeats = groups.layout, q.shape[_HEADS] // k.shape[_HEADS]
        if (layout.region, layout.num_units) != (heads.region, heads.num_units):
            return False
        if np.array_equal(heads.owners, np.repeat(layout.owners, repeats)):
            return True
        if len(heads.runs) != 1 or len(layout.runs) != 1:
            return False
        for unit in range(heads.num_units):
            own, shared = (part.indices((unit,), 1) for part in (heads, layout))
            here, rest = divmod(len(own), len(shared))
            if rest or not np.array_equal(own // repeats, np.repeat(shared, here)):
                return False
        return True

    @staticmethod
    def _rest_cuts(q: Operand, rest: list[Operand]) -> dict[int, Shard] | None:
        """Cuts for per-head extras (masks [., H, ., .], sinks [H]) that are whole.

        Returns: None if an extra lies otherwise than the heads of q.
        """
        cuts: dict[int, Shard] = {}
        for index, operand in enumerate(rest, start=3):
            dim = _EXTRA_HEADS.get(len(operand.shape))
            own = None
            if dim is not None and operand.shape[dim] == q.shape[_HEADS] > 1:
                own = Shard(dim, q.placement.layout) if isinstance(q.placement, Shard) else None
            if isinstance(operand.placement, Replicate):
                if own is not None:
                    cuts[index] = own
            elif own is None or operand.placement != own:
                return None
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

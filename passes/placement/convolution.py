"""Convolutions over time.

A convolution with a filter of its own for each channel acts on each channel by itself; one that
mixes all channels is a matrix product over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.layout import UnevenLayoutError
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.movement import Movement, Resize
from spdcompile.passes.placement.types import (
    Call,
    P,
    Partial,
    Placed,
    R,
    Replicate,
    Shard,
    placed,
)

aten = torch.ops.aten
_GROUPS = 6


@dataclass(frozen=True, slots=True)
class Convolution(Movement):
    """Rule of conv1d(x [B, I, T], weight [O, I / groups, K], bias [O] or None, ..., groups)."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """A channel's times belong together, and the channels of a group."""
        x, weight, *bias = call.operands()
        groups, merged = _groups(call), None
        if x.ids is not None:
            ids = channels.merge_along(x.ids, (2,)).unflatten(1, (groups, -1))
            ids = channels.merge_along(ids, (2,))
            ids = ids.expand(-1, -1, weight.shape[0] // groups, -1).flatten(1, 2)
            merged = ids.expand(call.out_shape)
        for operand in (weight, *bias):
            if operand.ids is not None:
                rest = tuple(range(1, len(operand.shape)))
                ids = channels.merge_along(operand.ids, rest) if rest else operand.ids
                merged = channels.merge(merged, ids.reshape(1, -1, 1).expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """All operands split by channels, or the products of a split sum."""
        x, weight, *bias = (operand.placement for operand in call.operands())
        if all(isinstance(p, Replicate) for p in (x, weight, *bias)):
            return placed(R)
        if not bias and (x, weight) in ((P, R), (R, P)):
            return placed(P)
        if any(isinstance(p, Partial) for p in (x, weight, *bias)):
            return None
        if _groups(call) == 1:
            return self._place_product(call, x, weight, bias)
        return self._place_channels(call)

    @staticmethod
    def _place_product(call: Call, x: Any, weight: Any, bias: list[Any]) -> Placed | None:
        match x, weight:
            case Shard(1, a), Shard(1, b) if a == b and a.times_held == 1 and not bias:
                return placed(P)
            case Replicate(), Shard(0, b) if all(p in (R, Shard(0, b)) for p in bias):
                cuts = {2: Shard(0, b)} if R in bias else {}
                return Placed(Shard(1, b), cuts)
        return None

    @staticmethod
    def _place_channels(call: Call) -> Placed | None:
        """Filters of their own: one group, one input and one output channel each."""
        operands = call.operands()
        if not operands[0].shape[1] == operands[1].shape[0] == _groups(call):
            return None
        layout = next(o.placement.layout for o in operands if isinstance(o.placement, Shard))
        cuts = {}
        for index, operand in enumerate(operands):
            needed = Shard(0 if index else 1, layout)
            if operand.placement == R:
                cuts[index] = needed
            elif operand.placement != needed:
                return None
        return Placed(Shard(1, layout), cuts)

    def localize(self, call: Call, args: tuple[Any, ...], out: Any, resize: Resize) -> Any:
        """A rank has as many groups as channels."""
        if _groups(call) == 1 or not isinstance(out, Shard):
            return args
        if len(args) <= _GROUPS:
            raise UnevenLayoutError("a convolution whose number of groups is not an argument")
        local = resize.size(len(out.layout), out.layout)
        return (*args[:_GROUPS], local, *args[_GROUPS + 1 :])


def _groups(call: Call) -> int:
    return call.args[_GROUPS] if len(call.args) > _GROUPS else call.kwargs.get("groups", 1)


RULES = {aten.conv1d.default: Convolution()}

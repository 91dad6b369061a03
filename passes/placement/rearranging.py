"""Operators that move elements along some dims, or fill some in, and leave other dims alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.movement import Movement
from spdcompile.passes.placement.rows import match_rows, rows
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


@dataclass(frozen=True, slots=True)
class Within(Movement):
    """Rule of data movement along `dims(call)`, none of which may be split."""

    dims: Callable[[Call], tuple[int, ...]]

    def place(self, call: Call) -> Placed | None:
        """A split along any other dim stays."""
        placement = call.operands()[0].placement
        if isinstance(placement, Shard) and placement.dim in self.dims(call):
            return None
        return Movement.place(self, call)


@dataclass(frozen=True, slots=True)
class Filled:
    """Rule of an operator that keeps some elements and fills in a number for the rest.

    Args:
        dims: along which it tells elements apart; none of them may be split.
        number: what it fills in.
    """

    dims: Callable[[Call], tuple[int, ...]]
    number: Callable[[Call], Any]

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """Kept elements keep their channels."""
        x = call.operands()[0]
        if x.ids is None:
            return None
        kept = call.run([torch.ones(x.shape)]) != call.run([torch.zeros(x.shape)])
        return torch.where(kept, call.run([x.ids]), -1)

    def place(self, call: Call) -> Placed | None:
        """A split along any other dim stays; zeros keep an unreduced sum one."""
        match call.operands()[0].placement:
            case Replicate():
                return placed(R)
            case Partial() if self.number(call) == 0:
                return placed(P)
            case Shard(dim, layout) if dim not in self.dims(call):
                return placed(Shard(dim, layout))
        return None


# Of the second operand, only the shape is read.
_EXPAND_AS = rows("S(i) <- S(i) S(i)", "P <- P R", "P <- P P", "R <- R P")


@dataclass(frozen=True, slots=True)
class ExpandAs:
    """Rule of expand_as(x, like): x in the shape of another operand."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """The channels of x alone."""
        x = call.operands()[0]
        if x.ids is None:
            return None
        if x.shape != call.out_shape:
            channels.note_hubs(x.ids)
        return x.ids.expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """Matches the rows."""
        return match_rows(_EXPAND_AS, call.operands(), len(call.out_shape))


def _padded(call: Call) -> tuple[int, ...]:
    """The dims that constant_pad_nd(x, [before, after of the last dim, ...]) makes longer."""
    ndim, sizes = len(call.operands()[0].shape), call.args[1]
    return tuple(ndim - 1 - n // 2 for n, size in enumerate(sizes) if size != 0)


def _last_two(call: Call) -> tuple[int, ...]:
    ndim = len(call.operands()[0].shape)
    return ndim - 2, ndim - 1


def _listed(position: int) -> Callable[[Call], tuple[int, ...]]:
    """Reads the dims off an argument; an empty one stands for all of them."""

    def dims(call: Call) -> tuple[int, ...]:
        ndim = len(call.operands()[0].shape)
        given = call.args[position] if len(call.args) > position else []
        given = given if isinstance(given, list | tuple) else [given]
        return tuple(dim % ndim for dim in given) or tuple(range(ndim))

    return dims


RULES = {
    aten.flip.default: Within(_listed(1)),
    aten.roll.default: Within(_listed(2)),
    aten.unfold.default: Within(_listed(1)),
    aten.constant_pad_nd.default: Filled(
        _padded, lambda call: call.args[2] if len(call.args) > 2 else 0
    ),
    aten.tril.default: Filled(_last_two, lambda call: 0),
    aten.triu.default: Filled(_last_two, lambda call: 0),
    aten.expand_as.default: ExpandAs(),
}

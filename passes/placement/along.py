"""Operators that combine the elements along some dims: norms, softmax, means, sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
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
class Along:
    """Rule of an operator that mixes elements along `dims(call)` of its first operand.

    Args:
        reduces: the dims are gone, or 1, in the result.
        additive: the result is a sum of the elements, so a split along a mixed dim gives P.
    """

    dims: Callable[[Call], tuple[int, ...]]
    reduces: bool = False
    additive: bool = False

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """All channels along the dims belong together."""
        first, *weights = call.operands()
        merged = None
        if first.ids is not None:
            along = channels.merge_along(first.ids, self.dims(call))
            merged = along.reshape(call.out_shape) if self.reduces else along.expand(first.shape)
        for operand in weights:
            if operand.ids is not None:
                merged = channels.merge(merged, operand.ids.expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """A split along any other dim stays; the weights of a norm stay whole."""
        first, *rest = call.operands()
        if not all(isinstance(operand.placement, Replicate) for operand in rest):
            return None
        match first.placement:
            case Replicate():
                return placed(R)
            case Partial() if self.additive:
                return placed(P)
            case Shard(dim, layout) if dim not in self.dims(call):
                return placed(Shard(self._result_dim(call, dim), layout))
            case Shard(_, layout) if self.additive and layout.times_held == 1:
                return placed(P)
        return None

    def _result_dim(self, call: Call, dim: int) -> int:
        """Where a kept dim of the operand lies in the result."""
        ndim = len(call.operands()[0].shape)
        if not self.reduces or len(call.out_shape) == ndim:
            return dim
        return dim - sum(mixed < dim for mixed in self.dims(call))


def _argument(call: Call) -> tuple[int, ...]:
    """The dims given as second argument, an int or a list; none given means all of them."""
    ndim = len(call.operands()[0].shape)
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if given is None or given == []:
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in (given if isinstance(given, list | tuple) else [given]))


def _normalized(call: Call) -> tuple[int, ...]:
    """The last dims, as many as `normalized_shape` has."""
    ndim = len(call.operands()[0].shape)
    return tuple(range(ndim - len(call.args[1]), ndim))


RULES = {
    aten.softmax.int: Along(_argument),
    aten._softmax.default: Along(_argument),
    aten.layer_norm.default: Along(_normalized),
    aten.rms_norm.default: Along(_normalized),
    aten.amax.default: Along(_argument, reduces=True),
    aten.std.dim: Along(_argument, reduces=True),
    aten.sum.dim_IntList: Along(_argument, reduces=True, additive=True),
}

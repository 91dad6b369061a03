"""More operators along dims: extremes and orders, which are linear in nothing, and linear ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.along import Along
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
class Linear(Along):
    """Rule of a linear operator that is no sum: the ranks' means do not add up to the mean."""

    def place(self, call: Call) -> Placed | None:
        """As any operator along dims; an unreduced sum passes through."""
        (first,) = call.operands()
        return placed(P) if isinstance(first.placement, Partial) else Along.place(self, call)


@dataclass(frozen=True, slots=True)
class Pair(Along):
    """Rule of an operator with two results, the values and where they were."""

    def follow(self, call: Call, channels: Channels) -> list[Tensor | None]:
        """The same channels in both."""
        x = call.operands()[0]
        if x.ids is None:
            return [None, None]
        united = channels.merge_along(x.ids, self.dims(call))
        if self.reduces and not _keeps_dim(call):
            united = united.squeeze(self.dims(call)[0])
        return [united, united]

    def place(self, call: Call) -> Placed | None:
        """A split along any other dim stays in both."""
        x = call.operands()[0]
        dims = self.dims(call)
        match x.placement:
            case Replicate():
                return placed(R)
            case Shard(dim, layout) if dim not in dims:
                gone = self.reduces and not _keeps_dim(call) and dims[0] < dim
                shard = Shard(dim - gone, layout)
                return placed([shard, shard])
        return None


@dataclass(frozen=True, slots=True)
class Choice(Along):
    """Rule of an operator that chooses or orders by its operand, as the router of experts does.

    Args:
        results: how many there are.
    """

    results: int = 1

    def follow(self, call: Call, channels: Channels) -> list[None] | None:
        """What is chosen by must be whole, and then says nothing of channels."""
        x = call.operands()[0]
        if x.ids is not None:
            channels.need_whole(x.ids, f"{call.target} chooses by them")
        return None if self.results == 1 else [None] * self.results

    def place(self, call: Call) -> Placed | None:
        """A split along any other dim stays."""
        if self.results == 1:
            return Along.place(self, call)
        return Pair.place(self, call)


def _keeps_dim(call: Call) -> bool:
    return bool(call.args[2] if len(call.args) > 2 else call.kwargs.get("keepdim", False))


def _given(position: int, default: int | None) -> Callable[[Call], tuple[int, ...]]:
    """Reads the dims off an argument; a default of None stands for all dims."""

    def dims(call: Call) -> tuple[int, ...]:
        ndim = len(call.operands()[0].shape)
        given = (
            call.args[position] if len(call.args) > position else call.kwargs.get("dim", default)
        )
        if given is None or given == []:
            return tuple(range(ndim))
        return tuple(dim % ndim for dim in (given if isinstance(given, list | tuple) else [given]))

    return dims


def _every(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.operands()[0].shape)))


_FIRST = _given(1, None)
_REDUCES = (
    *(aten.amin.default, aten.var.dim, aten.var.correction, aten.std.correction),
    *(aten.any.dim, aten.all.dim, aten.logsumexp.default, aten.prod.dim_int),
)
_WHOLLY = (aten.max.default, aten.min.default, aten.any.default, aten.all.default)
_STAYS = (aten.cumprod.default, aten.log_softmax.int, aten.logcumsumexp.default)

RULES = {
    **dict.fromkeys(_REDUCES, Along(_FIRST, reduces=True)),
    **dict.fromkeys(_WHOLLY, Along(_every, reduces=True)),
    **dict.fromkeys(_STAYS, Along(_FIRST)),
    aten.mean.dim: Linear(_FIRST, reduces=True),
    aten.mean.default: Linear(_every, reduces=True),
    aten.cumsum.default: Linear(_FIRST),
    aten.sum.default: Along(_every, reduces=True, additive=True),
    aten.linalg_vector_norm.default: Along(_given(2, None), reduces=True),
    aten.max.dim: Pair(_FIRST, reduces=True),
    aten.min.dim: Pair(_FIRST, reduces=True),
    aten.topk.default: Choice(_given(2, -1), results=2),
    aten.sort.default: Choice(_given(1, -1), results=2),
    aten.sort.stable: Choice(_given(1, -1), results=2),
    aten.argsort.default: Choice(_given(1, -1)),
    aten.argmax.default: Choice(_FIRST, reduces=True),
    aten.argmin.default: Choice(_FIRST, reduces=True),
    aten.histc.default: Choice(_every, reduces=True),
}

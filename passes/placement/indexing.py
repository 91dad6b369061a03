"""Operators that read or write entries chosen by data: rows of experts, tokens in sorted order.

The chosen entries are copied as they are, so a split along any dim in which nothing is chosen
stays, and so does an unreduced sum. What chooses must be the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.rows import Row, match_rows, rows
from spdcompile.passes.placement.types import (
    Call,
    Operand,
    P,
    Partial,
    Placed,
    R,
    Replicate,
    Shard,
    no_ids,
    placed,
)

aten = torch.ops.aten
_CHOOSES = "an operator chooses entries by them"


@dataclass(frozen=True, slots=True)
class _Lookup:
    """How the dims of x[..., i, ...] lie in the result: those of the indices take one place.

    Args:
        dims: the dims of x that are indexed.
        shape: of the indices, broadcast.
        ndim: number of dims of x.
    """

    dims: tuple[int, ...]
    shape: tuple[int, ...]
    ndim: int

    @property
    def kept(self) -> list[int]:
        """The dims of x that are not indexed."""
        return [dim for dim in range(self.ndim) if dim not in self.dims]

    @property
    def at(self) -> int:
        """Where the dims of the indices begin: in front, if those of x do not lie together."""
        first, last = self.dims[0], self.dims[-1]
        return first if last - first + 1 == len(self.dims) else 0

    def out_dim(self, dim: int) -> int:
        """Where a kept dim lies in the result."""
        position = self.kept.index(dim)
        return position if position < self.at else position + len(self.shape)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result for an x of the given shape."""
        kept = [shape[dim] for dim in self.kept]
        return *kept[: self.at], *self.shape, *kept[self.at :]

    def read(self, united: Tensor) -> Tensor:
        """From x's dims, the indexed ones of size 1, to the result's, those of the indices too."""
        kept = united.reshape([united.shape[dim] for dim in self.kept])
        return kept.reshape(
            *kept.shape[: self.at], *(1 for _ in self.shape), *kept.shape[self.at :]
        )

    def write(self, united: Tensor) -> Tensor:
        """The way back."""
        sizes = {dim: united.shape[self.out_dim(dim)] for dim in self.kept}
        return united.reshape([sizes.get(dim, 1) for dim in range(self.ndim)])

    def index_dims(self) -> tuple[int, ...]:
        """The result's dims that come from the indices."""
        return tuple(range(self.at, self.at + len(self.shape)))


def _lookup(call: Call) -> _Lookup:
    """The lookup of (x, indices, ...), with None for other dims, or of (x, dim, index, ...)."""
    x, indices, *rest = call.args
    ndim = len(x.shape)
    if isinstance(indices, int):
        return _Lookup((indices % ndim,), rest[0].shape, ndim)
    dims = tuple(dim for dim, index in enumerate(indices) if index is not None)
    shape = torch.broadcast_shapes(*(indices[dim].shape for dim in dims))
    return _Lookup(dims, tuple(shape), ndim)


def _need_whole(indices: list[Operand], channels: Channels) -> None:
    for index in indices:
        if index.ids is not None:
            channels.need_whole(index.ids, _CHOOSES)


@dataclass(frozen=True, slots=True)
class Read:
    """Rule of x[..., i, ...]: `index`, `index_select`."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """All entries along an indexed dim belong together; what chooses must be whole."""
        x, *indices = call.operands()
        _need_whole(indices, channels)
        if x.ids is None:
            return None
        lookup = _lookup(call)
        if lookup.out_shape(x.shape) != call.out_shape:  # a mask of several dims
            every = tuple(range(len(x.shape)))
            return channels.merge_along(x.ids, every).reshape(-1)[0].expand(call.out_shape)
        return lookup.read(channels.merge_along(x.ids, lookup.dims)).expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """A split along a dim that is not indexed stays."""
        x, *indices = call.operands()
        lookup = _lookup(call)
        if not all(isinstance(index.placement, Replicate) for index in indices):
            return None
        match x.placement:
            case Replicate():
                return placed(R)
            case Partial():
                return placed(P)
            case Shard(dim, layout) if dim not in lookup.dims:
                if lookup.out_shape(x.shape) == call.out_shape:
                    return placed(Shard(lookup.out_dim(dim), layout))
        return None


@dataclass(frozen=True, slots=True)
class Write:
    """Rule of x with x[..., i, ...] = or += values: `index_put`, `index_add`, `index_copy`.

    Both x and the values are unreduced sums, or neither: (x + values) is linear in the two at once.
    """

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """A value with what it may be written to; what chooses must be whole."""
        x, *indices, values = call.operands()
        _need_whole(indices, channels)
        lookup, merged = _lookup(call), x.ids
        if values.ids is not None:
            whole = values.ids.expand(lookup.out_shape(x.shape))
            united = lookup.write(channels.merge_along(whole, lookup.index_dims()))
            merged = channels.merge(merged, united.expand(x.shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """x and the values split alike along a dim that is not indexed, or both partial."""
        x, *indices, values = call.operands()
        lookup = _lookup(call)
        if not all(isinstance(index.placement, Replicate) for index in indices):
            return None
        match x.placement, values.placement:
            case Replicate(), Replicate():
                return placed(R)
            case Partial(), Partial():
                return placed(P)
            case Partial(), _:
                return None
            case _, Partial():
                return None
        return self._place_split(x, values, len(indices) + 1, lookup)

    @staticmethod
    def _place_split(x: Operand, values: Operand, position: int, lookup: _Lookup) -> Placed | None:
        offset = lookup.ndim - len(lookup.dims) + len(lookup.shape) - len(values.shape)
        if isinstance(x.placement, Shard):
            shard = x.placement
        else:
            dim = values.placement.dim + offset
            kept = [d for d in lookup.kept if lookup.out_dim(d) == dim]
            if not kept or x.shape[kept[0]] != values.shape[values.placement.dim]:
                return None
            shard = Shard(kept[0], values.placement.layout)
        if shard.dim in lookup.dims:
            return None
        cuts = {} if x.placement == shard else {0: shard}
        dim = lookup.out_dim(shard.dim) - offset
        if dim >= 0 and values.shape[dim] > 1:
            needed = Shard(dim, shard.layout)
            if values.placement == R:
                cuts[position] = needed
            elif values.placement != needed:
                return None
        elif values.placement != R:
            return None
        return Placed(shard, cuts)


# Copies, so linear: from an unreduced sum comes another. Written into one, an unreduced sum.
GATHER = rows("S(i) <- S(i) S(i)", "P <- P R")
SCATTER = rows("S(i) <- S(i) S(i) S(i)", "P <- P R P")
SCATTER_NUMBER = rows("S(i) <- S(i) S(i)")
SCATTER_ZERO = (*SCATTER_NUMBER, *rows("P <- P R"))


@dataclass(frozen=True, slots=True)
class ByPosition:
    """Rule of (x, dim, index, ...) that chooses along `dim` for each position of the other dims.

    Args:
        table: rows of placements; a split along `dim` fits none.
        writes: the operator changes x at the index, rather than reading there.
    """

    table: tuple[Row, ...]
    writes: bool = False

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """What lies along the dim belongs together; what is not written to is left as it is."""
        x, *others = call.operands()
        merged, dim = x.ids, self._dim(call)
        if x.ids is not None and not self.writes:
            united = channels.merge_along(x.ids, (dim,))
            merged = united[tuple(slice(size) for size in call.out_shape)].expand(call.out_shape)
        for operand in others:
            if operand.ids is not None:
                along = operand.ids
                if self.writes:
                    along = _padded(channels.merge_along(along, (dim,)), call.out_shape, dim)
                merged = channels.merge(merged, along)
        return merged

    def place(self, call: Call) -> Placed | None:
        """Matches the rows; the operands have one size along a split dim."""
        operands = call.operands()
        for operand in operands:
            if isinstance(operand.placement, Shard):
                dim = operand.placement.dim
                if dim == self._dim(call) or len({o.shape[dim] for o in operands}) > 1:
                    return None
        table = SCATTER_ZERO if self._writes_zero(call) else self.table
        return match_rows(table, operands, len(call.out_shape))

    @staticmethod
    def _dim(call: Call) -> int:
        return call.args[1] % len(call.args[0].shape)

    def _writes_zero(self, call: Call) -> bool:
        return self.table is SCATTER_NUMBER and call.args[3] == 0


def _padded(united: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Ids of a part of each dim, one for all of `dim`, in the whole shape."""
    sizes = [*united.shape]
    sizes[dim] = shape[dim]
    whole = no_ids(shape)
    whole[tuple(slice(size) for size in sizes)] = united.expand(sizes)
    return whole


RULES = {
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), Read()),
    **dict.fromkeys((aten.index_add.default, aten.index_copy.default), Write()),
    aten.index_put.default: Write(),
    aten.gather.default: ByPosition(GATHER),
    aten.scatter.src: ByPosition(SCATTER, writes=True),
    aten.scatter_add.default: ByPosition(SCATTER, writes=True),
    aten.scatter.value: ByPosition(SCATTER_NUMBER, writes=True),
}

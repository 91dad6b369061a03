"""Operators that only move data: views, transposes, slices, concatenations.

Their rule is the operator itself, run on a small tensor that holds, for every element, the unit
that owns it (or its channel id): whatever the operator does to the data, it does to the owners.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.layout import Layout, UnevenLayoutError
from spdcompile.passes.placement.channels import Channels
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


@dataclass(frozen=True, slots=True)
class Movement:
    """Rule of an operator that moves elements without changing them."""

    def follow(self, call: Call, channels: Channels) -> Any:
        """Channel ids move as the data does."""
        operands = call.operands()
        if all(operand.ids is None for operand in operands):
            return None
        return _move(call, [no_ids(o.shape) if o.ids is None else o.ids for o in operands])

    def place(self, call: Call) -> Placed | None:
        """All replicated, all partial, or all split in one region."""
        operands = call.operands()
        kinds = {type(operand.placement) for operand in operands}
        if kinds == {Replicate}:
            return placed(R)
        if kinds == {Partial}:
            return placed(P)
        if kinds != {Shard} or len({o.placement.layout.region for o in operands}) > 1:
            return None
        moved = _move(call, [owner_tensor(operand) for operand in operands])
        layout = operands[0].placement.layout
        pieces = moved if isinstance(moved, list | tuple) else [moved]
        shards = [split_of(piece, layout) for piece in pieces]
        if any(shard is None for shard in shards):
            return None
        return placed(shards if isinstance(moved, list | tuple) else shards[0])

    def localize(self, call: Call, args: tuple[Any, ...], out: Any, resize: Resize) -> Any:
        """The arguments with which a rank runs the operator on its share.

        Args:
            call: the global call, placements filled in.
            args: the arguments to rewrite: the call's own, or graph nodes in their place.
            out: placement of the result, a list for a list of results.
            resize: turns a size along a split dim into the local one.

        Raises:
            UnevenLayoutError: no arguments make every rank compute its share.
        """
        source = call.operands()[0].placement
        arguments = list(args)
        if call.target in _SIZED and isinstance(out, Shard):
            sizes = list(args[1])
            if not (isinstance(sizes[out.dim], int) and sizes[out.dim] == -1):
                sizes[out.dim] = resize.size(sizes[out.dim], out.layout)
            arguments[1] = sizes
        elif call.target is aten.unflatten.int and isinstance(out, Shard):
            arguments[2] = _unflattened(list(args[2]), out.dim - _dim_of(call), out, resize)
        elif call.target in _SQUEEZES and resize.size(len(source.layout), source.layout) == 1:
            if call.target is aten.squeeze.default or _dim_of(call) == source.dim:
                raise UnevenLayoutError("a squeeze would drop a split dim with one index a rank")
        elif call.target in _CUTS and _dim_of(call) == source.dim:
            _CUTS[call.target](arguments, source.layout, out, resize)
        return tuple(arguments)


class Resize:
    """Turns global sizes and offsets into a rank's own.

    Args:
        units_per_rank: region name -> units that each rank holds.
    """

    def __init__(self, units_per_rank: Mapping[str, int]) -> None:
        self.units_per_rank = units_per_rank

    def size(self, size: Any, layout: Layout) -> Any:
        """The local size of a dim, which may have the batch folded into it."""
        return size // len(layout) * layout.local_size(self.units_per_rank[layout.region])

    def offset(self, index: int, layout: Layout) -> int:
        """Where an offset along a split dim lies on a rank."""
        if index < 0:
            index += len(layout)
        return layout.local_offset(index, self.units_per_rank[layout.region])


def _move(call: Call, tensors: list[Tensor]) -> Any:
    """Runs the operator on small tensors."""
    moved = call.run(tensors)
    # A batch or length of 1 is squeezed away here, but not in the program.
    return moved.reshape(call.out_shape) if call.target in _SQUEEZES else moved


def _unflattened(sizes: list[Any], position: int, out: Shard, resize: Resize) -> list[Any]:
    """The sizes of unflatten(x, dim, sizes) with the split one made local."""
    if 0 <= position < len(sizes) and not (
        isinstance(sizes[position], int) and sizes[position] == -1
    ):
        sizes[position] = resize.size(sizes[position], out.layout)
    return sizes


def _cut_slice(args: list[Any], layout: Layout, _: Any, resize: Resize) -> None:
    """slice(x, dim, start, end, step=1); an end beyond the dim holds for a folded batch too."""
    if len(args) > 4 and args[4] != 1:
        raise UnevenLayoutError("a strided slice along a split dim")
    for position in range(2, min(len(args), 4)):
        if args[position] is not None and args[position] <= len(layout):
            args[position] = resize.offset(args[position], layout)


def _cut_narrow(args: list[Any], layout: Layout, out: Shard, resize: Resize) -> None:
    """narrow(x, dim, start, length)."""
    args[2] = resize.offset(args[2], layout)
    args[3] = resize.size(args[3], out.layout)


def _cut_sizes(args: list[Any], _: Layout, out: list[Shard], resize: Resize) -> None:
    """split_with_sizes(x, sizes, dim)."""
    args[1] = [resize.size(len(piece.layout), piece.layout) for piece in out]


def _cut_size(args: list[Any], _: Layout, out: list[Shard], resize: Resize) -> None:
    """split(x, size, dim)."""
    args[1] = resize.size(len(out[0].layout), out[0].layout)


def _dim_of(call: Call) -> int:
    """The dim that a slicing operator works on."""
    position = 2 if call.target in _DIM_IS_THIRD else 1
    dim = call.args[position] if len(call.args) > position else call.kwargs.get("dim", 0)
    return dim % len(call.operands()[0].shape)


@dataclass(frozen=True, slots=True)
class GetItem:
    """Rule of taking one result out of an operator's list of results."""

    def follow(self, call: Call, channels: Channels) -> Any:
        """The ids of that result."""
        ids = call.operands()[0].ids
        return None if ids is None else ids[call.args[1]]

    def place(self, call: Call) -> Placed | None:
        """The placement of that result."""
        given = call.operands()[0].placement
        return placed(given[call.args[1]] if isinstance(given, list | tuple) else given)


def owner_tensor(operand: Operand) -> Tensor:
    """The unit that owns each element of a split operand."""
    shard = operand.placement
    view = [-1 if dim == shard.dim else 1 for dim in range(len(operand.shape))]
    return torch.from_numpy(shard.layout.owners).view(view).expand(operand.shape).contiguous()


def split_of(owners: Tensor, like: Layout) -> Shard | None:
    """The one dim along which the owners change, as a split; None if there is no such dim."""
    for dim in range(owners.dim()):
        flat = owners.movedim(dim, 0).reshape(owners.shape[dim], -1)
        along = flat[:, 0]
        if bool((flat == along[:, None]).all()) and len(along.unique()) > 1:
            try:
                return Shard(dim, Layout(like.region, like.num_units, along.numpy().copy()))
            except UnevenLayoutError:
                return None
    return None


MOVES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.contiguous.default, aten.clone.default, aten.alias.default),
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.split.Tensor),
    *(aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.cat.default),
    *(aten.stack.default, aten.repeat_interleave.self_int, aten.repeat.default),
    *(aten.broadcast_to.default, aten.detach.default, aten.dropout.default),
    *(aten.lift_fresh_copy.default,),
)
# Operators with the result's sizes as second argument.
_SIZED = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.broadcast_to.default,),
)
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.default)
_DIM_IS_THIRD = (aten.split.Tensor, aten.split_with_sizes.default)
_CUTS = {
    aten.slice.Tensor: _cut_slice,
    aten.narrow.default: _cut_narrow,
    aten.split_with_sizes.default: _cut_sizes,
    aten.split.Tensor: _cut_size,
}
RULES = {**{op: Movement() for op in MOVES}, operator.getitem: GetItem()}

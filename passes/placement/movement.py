"""Operators that only move data: views, transposes, slices, concatenations.

Their rule is the operator itself, run on a small tensor that holds, for every element, the unit
that owns it (or its channel id): whatever the operator does to the data, it does to the owners.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.layout import EVERY, Layout, UnevenLayoutError
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
        if call.target in _REPEATS:
            channels.note_hubs(operands[0].ids, tied=True)
        return _move(call, [no_ids(o.shape) if o.ids is None else o.ids for o in operands])

    def place(self, call: Call) -> Placed | None:
        """All replicated, all partial, or all split in one region; what joins a split is cut."""
        operands = call.operands()
        cuts = _cuts(call, operands)
        operands = [replace(o, placement=cuts.get(n, o.placement)) for n, o in enumerate(operands)]
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
        outs = [placement_of(piece, layout) for piece in pieces]
        if any(out is None for out in outs):
            return None
        return Placed(outs if isinstance(moved, list | tuple) else outs[0], cuts)

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


def _cuts(call: Call, operands: list[Operand]) -> dict[int, Shard]:
    """Cuts for whole operands that a cat or stack joins to split ones along another dim."""
    shard = next((o.placement for o in operands if isinstance(o.placement, Shard)), None)
    if call.target not in _JOINS or shard is None:
        return {}
    return {
        number: shard
        for number, operand in enumerate(operands)
        if isinstance(operand.placement, Replicate)
        and operand.shape[shard.dim] == len(shard.layout)
        and not (call.target is aten.cat.default and _dim_of(call) == shard.dim)
    }


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
        _check_stride(args, layout)
        return
    for position in range(2, min(len(args), 4)):
        if args[position] is not None and args[position] <= len(layout):
            args[position] = resize.offset(args[position], layout)


def _check_stride(args: list[Any], layout: Layout) -> None:
    """A stride along the whole dim is a rank's own too if each unit holds whole strides.

    Raises:
        UnevenLayoutError: it is another one.
    """
    start, end, step = args[2] or 0, args[3], args[4]
    whole = start < step and (end is None or end >= len(layout))
    if not whole or any(run.each % step or run.start % step for run in layout.runs):
        raise UnevenLayoutError("a strided slice along a split dim")
    if any(not run.each and run.length % step for run in layout.runs):
        raise UnevenLayoutError("a strided slice along a split dim")


def _cut_narrow(args: list[Any], layout: Layout, out: Any, resize: Resize) -> None:
    """narrow(x, dim, start, length)."""
    args[2] = resize.offset(args[2], layout)
    args[3] = _local_size(out, args[3], resize)


def _cut_select(args: list[Any], layout: Layout, _: Any, resize: Resize) -> None:
    """select(x, dim, index)."""
    args[2] = resize.offset(args[2], layout)


def _cut_sizes(args: list[Any], _: Layout, out: list[Any], resize: Resize) -> None:
    """split_with_sizes(x, sizes, dim)."""
    sizes = zip(out, args[1], strict=True)
    args[1] = [_local_size(piece, size, resize) for piece, size in sizes]


def _cut_size(args: list[Any], _: Layout, out: list[Any], resize: Resize) -> None:
    """split(x, size, dim); the last piece may be smaller."""
    if not all(isinstance(piece, Shard) for piece in out):
        raise UnevenLayoutError("pieces of which some are whole")
    *sizes, last = (resize.size(len(piece.layout), piece.layout) for piece in out)
    if len(set(sizes)) > 1 or any(last > size for size in sizes):
        raise UnevenLayoutError("pieces of different sizes on a rank")
    args[1] = sizes[0] if sizes else last


def _cut_chunks(_: list[Any], __: Layout, out: list[Any], resize: Resize) -> None:
    """chunk(x, chunks, dim): a rank's pieces must be equal too."""
    if len({_local_size(piece, 0, resize) for piece in out}) > 1:
        raise UnevenLayoutError("pieces of different sizes on a rank")


def _local_size(piece: Any, size: Any, resize: Resize) -> Any:
    """A rank's size of a piece that is split, or that every rank has whole."""
    return resize.size(len(piece.layout), piece.layout) if isinstance(piece, Shard) else size


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
    """The unit that owns each element of a split operand, of its shape but without its size."""
    shard = operand.placement
    view = [-1 if dim == shard.dim else 1 for dim in range(len(operand.shape))]
    return torch.from_numpy(shard.layout.owners).view(view).expand(operand.shape)


def placement_of(owners: Tensor, like: Layout) -> Shard | Replicate | None:
    """The one dim along which the owners change, as a split; None if there is no such dim."""
    for dim, stride in enumerate(owners.stride()):
        if stride == 0:  # one value along the whole dim, stored once
            owners = owners.narrow(dim, 0, 1)
    if bool((owners == EVERY).all()):
        return R
    for dim in range(owners.dim()):
        flat = owners.movedim(dim, 0).reshape(owners.shape[dim], -1)
        along = flat[:, 0]
        if bool((flat == along[:, None]).all()) and len(along.unique()) > 1:
            try:
                layout = Layout(like.region, like.num_units, along.numpy().copy(), like.copies)
                return Shard(dim, layout)
            except UnevenLayoutError:
                return None
    return None


MOVES = (
    *(aten.reshape.default, aten.expand.default),
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
    *(aten.reshape.default, aten.expand.default),
    *(aten.broadcast_to.default,),
)
# Operators that put one element in several places.
_REPEATS = (
    *(aten.expand.default, aten.broadcast_to.default, aten.repeat.default),
    *(aten.repeat_interleave.self_int,),
)
_JOINS = (aten.cat.default, aten.stack.default)
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.default)
_DIM_IS_THIRD = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_CUTS = {
    aten.slice.Tensor: _cut_slice,
    aten.narrow.default: _cut_narrow,
    aten.split_with_sizes.default: _cut_sizes,
    aten.split.Tensor: _cut_size,
    aten.select.int: _cut_select,
    aten.chunk.default: _cut_chunks,
}
RULES = {**{op: Movement() for op in MOVES}, operator.getitem: GetItem()}

"""Brings data movement to the operators that have rules: writes into a part become `cat`.

One function a rewrite, as in normalize.py. In a graph without side effects a write into a part of a
tensor is a `slice_scatter` into the whole one, and what is read next is a slice of the result.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from spdcompile.passes.base import ParamRef, add_call

aten = torch.ops.aten

# The same operator by another name.
_NAMES = {
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.negative.default: aten.neg.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.clip.default: aten.clamp.default,
}

_NEW = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}


def other_name(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """An operator under the name that has a rule."""
    target = _NAMES.get(node.target)
    if target is None:
        return None
    with node.graph.inserting_before(node):
        return add_call(node.graph, target, node.args, node.meta, node.kwargs)


def as_other(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """x.reshape_as(y) and the like as a reshape to the sizes of y, whose values do not matter."""
    if node.target not in (aten.reshape_as.default, aten.view_as.default):
        return None
    x, other = node.args
    with node.graph.inserting_before(node):
        sizes = [
            size
            if isinstance(size, int)
            else add_call(node.graph, aten.sym_size.int, (other, dim), {"val": size})
            for dim, size in enumerate(other.meta["val"].shape)
        ]
        return add_call(node.graph, aten.reshape.default, (x, sizes), node.meta)


def given_sizes(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """x.new_zeros(sizes) and the like read no more of x than what a fake tensor knows too."""
    target = _NEW.get(node.target)
    if target is None:
        return None
    value = node.meta["val"]
    kwargs = {"dtype": value.dtype, "device": value.device}
    with node.graph.inserting_before(node):
        return add_call(node.graph, target, node.args[1:], node.meta, kwargs)


def padding(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """pad(x, sizes, "constant", value)."""
    if node.target is not aten.pad.default:
        return None
    x, sizes, mode, value = (*node.args, *("constant", None)[len(node.args) - 2 :])
    if mode != "constant" or node.kwargs:
        return None
    with node.graph.inserting_before(node):
        args = (x, sizes, 0 if value is None else value)
        return add_call(node.graph, aten.constant_pad_nd.default, args, node.meta)


def overwrite(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """copy(old, new): the new values in the shape and dtype of the old."""
    if node.target is not aten.copy.default:
        return None
    old, new, graph = node.args[0], node.args[1], node.graph
    with graph.inserting_before(node):
        if new.meta["val"].dtype != old.meta["val"].dtype:
            cast = new.meta["val"].to(old.meta["val"].dtype)
            args = (new, cast.dtype)
            new = add_call(graph, aten.to.dtype, args, node.meta, val=cast)
        if _sizes(new) != _sizes(old):
            new = add_call(graph, aten.expand_as.default, (new, old), node.meta)
    return new


def write_slice(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """slice_scatter(x, new, dim, start, end): x before, the new part, x after."""
    if node.target is not aten.slice_scatter.default or node.kwargs:
        return None
    x, new, *rest = node.args
    found = _range(x, rest)
    return None if found is None else _written(node, x, new, *found)


def write_index(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """select_scatter(x, new, dim, index): the same with a part one index long."""
    if node.target is not aten.select_scatter.default or node.kwargs:
        return None
    x, new, dim, index = node.args
    found = _range(x, (dim, index, index + 1 or None))
    if found is None:
        return None
    dim, start, stop = found
    value = new.meta["val"].unsqueeze(dim)
    with node.graph.inserting_before(node):
        args = (new, dim)
        new = add_call(node.graph, aten.unsqueeze.default, args, node.meta, val=value)
    return _written(node, x, new, dim, start, stop)


def read_slice(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """A slice that is just some parts of a `cat`."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return None
    x, *rest = node.args
    found = _range(x, rest)
    if found is None or x.target is not aten.cat.default:
        return None
    parts = _parts(x, *found)
    return None if parts is None else _joined(node, parts, found[0])


def fixed_index(
    node: fx.Node, params: dict[str, ParamRef], constants: Mapping[str, Tensor]
) -> fx.Node | None:
    """index(x, [..., c]) with a constant c of successive indices: a slice."""
    if node.target is not aten.index.Tensor:
        return None
    x, indices = node.args
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    (dim,) = given
    size, index = x.meta["val"].shape[dim], _constant(indices[dim], params, constants)
    if index is None or index.dim() != 1 or not len(index) or not isinstance(size, int):
        return None
    if index.dtype != torch.int64:
        return None
    start = int(index[0]) % size
    if (index % size).tolist() != list(range(start, start + len(index))):
        return None
    with node.graph.inserting_before(node):
        args = (x, dim, start, start + len(index))
        return add_call(node.graph, aten.slice.Tensor, args, node.meta)


def _constant(
    node: fx.Node, params: dict[str, ParamRef], constants: Mapping[str, Tensor]
) -> Tensor | None:
    """The data of a node that is a constant tensor or a copy of one."""
    while node.target in (aten.clone.default, aten.lift_fresh_copy.default):
        node = node.args[0]
    ref = params.get(node.name)
    data = constants.get(ref.fqn) if ref is not None and ref.constant else None
    return None if data is None or data.is_meta else data


def _range(x: fx.Node, args: Any) -> tuple[int, int, int | None] | None:
    """(dim, start, stop) of slice arguments, a stop of None for the end; None if unknown."""
    dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) :])
    dim %= x.meta["val"].dim()
    size = x.meta["val"].shape[dim]
    start = 0 if start is None else start
    stop = sys.maxsize if stop is None else stop
    if step != 1 or not isinstance(start, int) or not isinstance(stop, int):
        return None
    if not isinstance(size, int):
        if start < 0 or stop < 0:
            return None
        return dim, start, None if stop == sys.maxsize else max(start, stop)
    start, stop, _ = slice(start, stop).indices(size)
    return dim, start, None if stop == size else max(start, stop)


def _written(
    node: fx.Node, x: fx.Node, new: fx.Node, dim: int, start: int, stop: int | None
) -> fx.Node:
    """x with its part from start to stop replaced, in front of `node`."""
    before = [] if start == 0 else _sliced(node, x, dim, 0, start)
    after = [] if stop is None else _sliced(node, x, dim, stop, None)
    return _joined(node, [*before, new, *after], dim)


def _sliced(node: fx.Node, x: fx.Node, dim: int, start: int, stop: int | None) -> list[fx.Node]:
    """Parts that make up a slice of x."""
    parts = _parts(x, dim, start, stop)
    if parts is not None:
        return parts
    end = sys.maxsize if stop is None else stop
    args = (x, dim, start, end)
    with node.graph.inserting_before(node):
        value = aten.slice.Tensor(x.meta["val"], dim, start, end)
        return [add_call(node.graph, aten.slice.Tensor, args, node.meta, val=value)]


def _parts(x: fx.Node, dim: int, start: int, stop: int | None) -> list[fx.Node] | None:
    """The parts of a `cat` that make up a slice of it, or the whole x; None if it cuts one."""
    if start == 0 and stop is None:
        return [x]
    if x.target is not aten.cat.default or not x.args[0]:
        return None
    given = x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)
    if given % x.meta["val"].dim() != dim:
        return None
    sizes = [part.meta["val"].shape[dim] for part in x.args[0]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    bounds = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    stop = bounds[-1] if stop is None else stop
    if start not in bounds or stop not in bounds or start == stop:
        return None
    return [p for p, at in zip(x.args[0], bounds, strict=False) if start <= at < stop]


def _joined(node: fx.Node, parts: list[fx.Node], dim: int) -> fx.Node:
    if len(parts) == 1:
        return parts[0]
    with node.graph.inserting_before(node):
        return add_call(node.graph, aten.cat.default, (parts, dim), node.meta)


def _sizes(node: fx.Node) -> list[str]:
    """The sizes of a value as text, so that comparing symbolic ones asks nothing of them."""
    return [str(size) for size in node.meta["val"].shape]

"""Brings a captured graph to one form: one operator a projection, nothing that does nothing.

One function a rewrite; each returns what takes the node's place, or None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import sympy
import torch
from torch import fx

from spdcompile.passes.base import BlockGraph, ParamRef, PassResult, Program, add_call
from spdcompile.passes.experts import grouped_mm
from spdcompile.passes.moves import (
    as_other,
    fixed_index,
    given_sizes,
    other_name,
    overwrite,
    padding,
    read_slice,
    write_index,
    write_slice,
)

aten = torch.ops.aten

_ASSERTS = (aten._assert_tensor_metadata.default,)
_ALIASES = (aten.alias.default, aten.detach.default, aten.detach_.default)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
# With dims that swap, for the last two; of a 2-D weight there are no others.
_TRANSPOSES = (*(aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default),)

Rewrite = Callable[[fx.Node, dict[str, ParamRef]], fx.Node | None]


def normalize(program: Program) -> PassResult:
    """Rewrites the one graph of a captured program."""
    (part,) = program.parts
    module = program.graphs[part.graph].copied().module
    params = dict(part.params)
    table = (*_REWRITES, partial(fixed_index, constants=program.constants))
    rewrites = sum(_rewrite(node, params, table) for node in list(module.graph.nodes))
    rewrites += sum(_settle_extreme(node) for node in list(module.graph.nodes))
    _erase_dead(module.graph)
    module.recompile()
    part = replace(part, params=params)
    graphs = {part.graph: BlockGraph(module)}
    return PassResult(replace(program, graphs=graphs, parts=(part,)), rewrites)


def _rewrite(node: fx.Node, params: dict[str, ParamRef], table: tuple[Rewrite, ...]) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _ASSERTS:
        node.graph.erase_node(node)
        return True
    for rewrite in table:
        instead = rewrite(node, params)
        if instead is not None:
            node.replace_all_uses_with(instead)
            node.graph.erase_node(node)
            return True
    return False


def _alias(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    return node.args[0] if node.target in _ALIASES else None


def _idle_dropout(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    return node.args[0] if node.target is aten.dropout.default and not node.args[2] else None


def _cast(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """A cast to the dtype that is there already goes; a program knows no device."""
    if node.target not in _CASTS:
        return None
    source, wanted = node.args[0], node.meta["val"].dtype
    if source.meta["val"].dtype == wanted:
        return source
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    return _insert(node, aten.to.dtype, (source, wanted))


def _view(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """A view holds for certain strides only, and those of a share may be others."""
    return _insert(node, aten.reshape.default, node.args) if node.target in _VIEWS else None


def _addmm(node: fx.Node, params: dict[str, ParamRef]) -> fx.Node | None:
    """addmm(b, x, W) with W [in, out], as GPT-2 has it."""
    if node.target is not aten.addmm.default or node.kwargs:
        return None
    bias, x, weight = node.args
    if not _transpose_param(weight, params):
        return None
    return _insert(node, aten.linear.default, (x, weight, bias))


def _matrix_transpose(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """x.mT"""
    if node.target is not aten.mT.default:
        return None
    ndim = node.meta["val"].dim()
    return _insert(node, aten.transpose.int, (node.args[0], ndim - 2, ndim - 1))


def _matmul(node: fx.Node, params: dict[str, ParamRef]) -> fx.Node | None:
    """x @ W.T, as Falcon has it; x @ W with W [in, out]."""
    if node.target not in (aten.matmul.default, aten.mm.default):
        return None
    x, weight = node.args
    if weight.op == "call_function" and weight.target in _TRANSPOSES:
        source = weight.args[0]
        swapped = weight.target is not aten.permute.default or list(weight.args[1]) == [1, 0]
        if swapped and source.name in params and source.meta["val"].dim() == 2:
            return _insert(node, aten.linear.default, (x, source))
    if _transpose_param(weight, params):
        return _insert(node, aten.linear.default, (x, weight))
    return None


def _cat_of_nothing(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """cat([x, empty]): a rotary embedding over the whole head leaves an empty rest."""
    if node.target is not aten.cat.default:
        return None
    filled = [part for part in node.args[0] if not any(_is_zero(n) for n in part.meta["val"].shape)]
    return filled[0] if len(filled) == 1 else None


def _is_zero(size: object) -> bool:
    return isinstance(size, int) and size == 0


_REWRITES: tuple[Rewrite, ...] = (
    *(_alias, _idle_dropout, _cast, _view, _addmm, _matrix_transpose, _matmul, _cat_of_nothing),
    grouped_mm,
    *(other_name, as_other, given_sizes, padding, overwrite, write_slice, write_index, read_slice),
)


def _settle_extreme(node: fx.Node) -> bool:
    """max(1 - length, 0) is 0; Inductor, which does not see it, reads past the end of x[that:]."""
    if node.target not in (torch.sym_max, torch.sym_min):
        return False
    sizes = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    first, second = (size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    difference = sympy.sympify(first - second)
    named = {s: sympy.Symbol(s.name, integer=True, positive=True) for s in difference.free_symbols}
    larger = difference.subs(named)
    if not (larger.is_nonnegative or larger.is_nonpositive):
        return False
    wants_first = bool(larger.is_nonnegative) == (node.target is torch.sym_max)
    settled = node.args[0 if wants_first else 1]
    for user in list(node.users):
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda a: settled if a is node else a)
        user.args, user.kwargs = args, kwargs
    node.graph.erase_node(node)
    return True


def _insert(node: fx.Node, target: Callable[..., object], args: tuple[object, ...]) -> fx.Node:
    with node.graph.inserting_before(node):
        return add_call(node.graph, target, args, node.meta)


def _transpose_param(weight: fx.Node, params: dict[str, ParamRef]) -> bool:
    """Makes the placeholder of a 2-D weight with one user the transposed weight."""
    ref = params.get(weight.name)
    if ref is None or ref.constant or len(ref.shape) != 2 or len(weight.users) != 1:
        return False
    params[weight.name] = replace(ref, shape=ref.shape[::-1], transposed=not ref.transposed)
    weight.meta = {**weight.meta, "val": weight.meta["val"].t()}
    return True


def _erase_dead(graph: fx.Graph) -> None:
    """Removes nodes that nobody uses; placeholders stay."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)

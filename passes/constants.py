"""Rewrites of operators whose index is a constant of the program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from spdcompile.passes.base import ParamRef, add_call

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.lift_fresh_copy.default, aten.alias.default)


def slice_constant_indices(
    graph: fx.Graph, params: Mapping[str, ParamRef], constants: Mapping[str, Tensor]
) -> int:
    """Writes x[..., [i, i + 1, ...], ...] as a slice, which can be followed; returns how many."""
    rewrites = 0
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        source, indices = node.args
        given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        if len(given) != 1:
            continue
        dim, index = given[0]
        values = _constant(index, params, constants)
        size = source.meta["val"].shape[dim]
        if values is None or values.dim() != 1 or not isinstance(size, int) or not len(values):
            continue
        start = int(values[0]) % size
        if not torch.equal(values % size, torch.arange(start, start + len(values))):
            continue
        with graph.inserting_before(node):
            args = (source, dim, start, start + len(values))
            piece = add_call(graph, aten.slice.Tensor, args, node.meta)
        node.replace_all_uses_with(piece)
        graph.erase_node(node)
        rewrites += 1
    return rewrites


def _constant(
    node: fx.Node, params: Mapping[str, ParamRef], constants: Mapping[str, Tensor]
) -> Tensor | None:
    """The data of an integer constant, or of a copy of one."""
    while node.target in _COPIES:
        node = node.args[0]
    ref = params.get(node.name)
    value = constants.get(ref.fqn) if ref is not None and ref.constant else None
    known = value is not None and not value.is_meta and value.dtype == torch.int64
    return value if known else None

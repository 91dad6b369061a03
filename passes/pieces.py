"""Rewrites operators that mix tokens, so that they run on new tokens and what is remembered.

Each value is computed for the tokens that `passes/spans.py` found to be needed, and cut to the new
ones where they alone are. What is followed token by token and needed of all is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import add_call
from spdcompile.passes.columns import Columns, refuse
from spdcompile.passes.following import COUNTING
from spdcompile.passes.ops import ATTENTION, GATHER, SYNC, TAKE
from spdcompile.passes.spans import SIZED, SPANS, Dims, Span, operands_of
from spdcompile.passes.tokens import TOKENS

aten = torch.ops.aten
_END = 2**63 - 1
_EXCHANGES = (SYNC, GATHER, TAKE)  # what other passes put in
_SIZES_FIRST = {
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
}


class Pieces:
    """The mixing operators of one graph."""

    def __init__(self, columns: Columns) -> None:
        self.columns, self.graph = columns, columns.graph
        self.cuts: dict[tuple[fx.Node, Dims], fx.Node] = {}
        self.of_all: Callable[[fx.Node], fx.Node] = self._remembering()

    def run(self) -> None:
        """Rewrites them in place."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                node.args = (tuple(self._handed_on(arg) for arg in node.args[0]),)
            elif node.op == "call_function" and SPANS in node.meta:
                self._rewrite(node)
            elif node.op == "call_function":
                self._take_new(node)

    def _remembering(self) -> Callable[[fx.Node], fx.Node]:
        """What makes values of all tokens from those that are remembered."""
        pairs = [
            pair
            for node in self.graph.nodes
            if node.op == "call_function" and SPANS in node.meta and node.target not in _EXCHANGES
            for pair in zip(operands_of(node), node.meta[SPANS].needs, strict=False)
            if SPANS not in pair[0].meta and TOKENS in pair[0].meta
        ]
        wanted = tuple(dict.fromkeys(node for node, dims in pairs if Span.ALL in dims))
        queries = [node for node, dims in pairs if Span.NEW in dims]
        cut = self.columns.narrowest(queries, wanted) or wanted
        for node in cut:
            if self.columns.size_per_token(node) == math.inf:
                raise refuse(f"a cache cannot hold what {node.target} makes")
        return self.columns.recomputing(cut)

    def _handed_on(self, arg: fx.Node) -> fx.Node:
        follows = SPANS in arg.meta and arg.meta[SPANS].follows
        return self._version(arg, _new(arg)) if follows else arg

    def _take_new(self, node: fx.Node) -> None:
        """An operator on new tokens alone gets those of its operands."""
        mask = node.args[3] if node.target is ATTENTION else None
        for arg in node.all_input_nodes:
            if SPANS in arg.meta and arg is not mask:
                with self.graph.inserting_before(node):
                    new = self._version(arg, _new(arg))
                if new is not arg:
                    node.replace_input_with(arg, new)

    def _rewrite(self, node: fx.Node) -> None:
        spans, operands = node.meta[SPANS], operands_of(node)
        needs = list(spans.needs)
        if node.target in _EXCHANGES:
            needs = [spans.own, *[()] * (len(operands) - 1)]
        elif node.target is not spans.target or len(operands) != len(needs):
            raise refuse(f"{node.target} was put where tokens are mixed")
        with self.graph.inserting_before(node):
            versions = iter([self._version(*pair) for pair in zip(operands, needs, strict=True)])
            args = self._resized(node, spans.own)

        def swap(arg: fx.Node) -> fx.Node:
            return next(versions) if _is_tensor(arg) else arg

        node.args, node.kwargs = fx.map_arg((args, node.kwargs), swap)

    def _version(self, node: fx.Node, dims: Dims) -> fx.Node:
        """A value for the given tokens."""
        if SPANS not in node.meta:
            remembered = Span.ALL in dims and TOKENS in node.meta
            return self.of_all(node) if remembered else node
        own = node.meta[SPANS].own
        cuts = [dim for dim, pair in enumerate(zip(own, dims, strict=True)) if pair[0] != pair[1]]
        if any(dims[dim] is Span.ALL for dim in cuts):
            raise refuse(f"{node.target} gives new tokens alone")
        if (node, dims) not in self.cuts:
            self.cuts[node, dims] = self._cut(node, cuts)
        return self.cuts[node, dims]

    def _cut(self, node: fx.Node, dims: list[int]) -> fx.Node:
        """A value's new tokens along some dims."""
        made = node
        for dim in dims:
            if not self.columns.is_length(node.meta["val"].shape[dim]):
                raise refuse(f"{node.target} folds tokens into another dim")
            args = (made, dim, self.columns.first_new(), self.columns.num_all())
            made = add_call(self.graph, aten.slice.Tensor, args, node.meta)
        return made

    def _resized(self, node: fx.Node, own: Dims) -> tuple[Any, ...]:
        """The arguments with which an operator gives the tokens that are its own."""
        args, columns = node.args, self.columns
        if node.target in SIZED:
            at = 0 if node.target in _SIZES_FIRST else 1
            sizes = zip(args[at], own, strict=True)
            new = [size if span is Span.NEW else columns.of_all(size) for size, span in sizes]
            return (*args[:at], new, *args[at + 1 :])
        if node.target in COUNTING and own == (Span.NEW,):
            node.target = aten.arange.start
            return columns.first_new(), columns.num_all()
        if node.target is aten.slice.Tensor and len(args) == 4 and own[args[1]] is Span.NEW:
            x, dim, _, _ = args
            if isinstance(x.meta["val"].shape[dim], torch.SymInt):
                return x, dim, 0, _END
            return x, dim, columns.first_new(), columns.num_all()
        return fx.map_arg(args, columns.of_all)


def _new(node: fx.Node) -> Dims:
    return tuple(span and Span.NEW for span in node.meta[SPANS].own)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor | list | tuple)

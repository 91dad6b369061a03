"""Finds which values have to be there for all tokens at each step, and which for new ones alone.

Operators that mix tokens are asked from the end what they need: new tokens of their result alone.
What the rule table says of an operator split along a dim holds for new tokens along it: to give
them, it takes the operands' new tokens along the dims that are split with it, and all of every
other (the keys of a product, the columns of a softmax). Where there is no rule, all are taken.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import Program
from spdcompile.passes.concrete import call_of
from spdcompile.passes.following import LAYOUT, MIXED, SHAPE_ONLY, Follower, numbers
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.types import R, Shard

aten = torch.ops.aten
# Key of a node's meta: the `Spans` of a value that is computed for other tokens than the new ones.
SPANS = "spans"
_SDPA = aten.scaled_dot_product_attention.default
# Operators whose sizes are those of their result.
SIZED = {
    *(aten.reshape.default, aten.expand.default, aten.broadcast_to.default),
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    *(aten.new_empty.default,),
}
_EXPANDS = (aten.expand.default, aten.broadcast_to.default)


class Span(enum.Enum):
    """Which tokens a dim runs over."""

    NEW = "new tokens"
    ALL = "all tokens"


Dims = tuple[Span | None, ...]
"""The span of each dim of a value, None for those that do not run over tokens."""


@dataclass(frozen=True, slots=True)
class Spans:
    """What is computed of a value, and what it takes of its operands.

    Args:
        own: of the value; for a list of values, of none of them.
        needs: of each tensor operand, in order.
        target: the operator, None for what a graph is given.
        follows: whether the value is followed token by token from there on.
    """

    own: Dims
    needs: tuple[Dims, ...] = ()
    target: Any = None
    follows: bool = False


def find_spans(program: Program, followers: Mapping[str, Follower]) -> dict[fx.Node, Spans]:
    """The spans of all values that are free or lie behind a mixing operator."""
    graphs = {
        key: _Graph(block.module.graph, followers[key]) for key, block in program.graphs.items()
    }
    wanted: dict[str, Dims | None] = {}
    before: dict[str, Dims | None] | None = None
    while wanted != before:
        before = dict(wanted)
        for part in reversed(program.parts):
            graph = graphs[part.graph]
            graph.run([wanted.get(name) for name in part.outputs])
            wanted |= zip(part.outputs, graph.results(), strict=True)
            for name, value in part.inputs.items():
                if name in graph.given:
                    # Equal blocks share a graph, and so what they are given.
                    graph.given[name] = join(graph.given[name], wanted.get(value))
                    wanted[value] = graph.given[name]
        mask = program.inputs[1]
        wanted[mask] = (None, Span.ALL)
    return {node: spans for graph in graphs.values() for node, spans in graph.found().items()}


def join(a: Dims | None, b: Dims | None) -> Dims | None:
    """What serves both: all tokens where either needs them."""
    if a is None or b is None:
        return a or b
    return tuple(Span.ALL if Span.ALL in pair else pair[0] for pair in zip(a, b, strict=True))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensors, and lists of them, among a call's arguments, in order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return [arg for arg in found if isinstance(arg.meta["val"], torch.Tensor | list | tuple)]


class _Graph:
    """What one graph needs, of its own values and of what it is given."""

    def __init__(self, graph: fx.Graph, follower: Follower) -> None:
        self.graph, self.follower = graph, follower
        self.given: dict[str, Dims | None] = {}
        self.spans: dict[fx.Node, Spans] = {}
        self._out: list[Dims | None] = [None] * len(graph.output_node().args[0])

    def run(self, out: Iterable[Dims | None]) -> None:
        """Follows the needs from the end to the placeholders.

        Args:
            out: what later parts need of the results.
        """
        self._out = list(map(join, self._out, out))
        needs: dict[fx.Node, Dims | None] = {}

        def need(node: fx.Node, dims: Dims | None) -> None:
            if self.computes(node):
                needs[node] = join(needs.get(node), dims)

        for node, dims in zip(self.graph.output_node().args[0], self._out, strict=True):
            # What is followed again is handed on as all such values are: for new tokens.
            need(node, self._new(node) if self._follows(node) else dims)
        for node in reversed(self.graph.nodes):
            if node.op == "placeholder" and self.computes(node):
                self.given[node.name] = join(self.given.get(node.name), needs.get(node))
            elif node.op == "call_function" and self.computes(node):
                self.spans[node] = spans = self._spans(node, needs.get(node) or self._new(node))
                for arg, dims in zip(operands_of(node), spans.needs, strict=True):
                    need(arg, dims)
            elif node.op == "call_function":
                mask = node.args[3] if node.target is ATTENTION else None
                for arg in node.all_input_nodes:
                    if arg is not mask:
                        need(arg, self._new(arg))

    def results(self) -> list[Dims | None]:
        """The spans of the results, None for those that are followed token by token."""
        results = self.graph.output_node().args[0]
        own = [None if self._follows(n) else self.spans.get(n) for n in results]
        return [spans and spans.own for spans in own]

    def found(self) -> dict[fx.Node, Spans]:
        """The spans of all values, those of the placeholders too."""
        placeholders = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        given = {
            node: Spans(self.given.get(name) or self._new(node))
            for name, node in placeholders.items()
            if self.computes(node)
        }
        return given | self.spans

    def computes(self, node: fx.Node) -> bool:
        """Whether a value is not followed token by token, but made for the tokens needed."""
        follower = self.follower
        placement = follower.placements.get(node, R)
        mixed = MIXED in placement if isinstance(placement, list) else placement is MIXED
        return mixed or node in follower.free or node in follower.mixing

    def _new(self, node: fx.Node) -> Dims:
        return self._dims(node, Span.NEW)

    def _dims(self, node: fx.Node, span: Span) -> Dims:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(span if self.follower.depends(size) else None for size in value.shape)

    def _spans(self, node: fx.Node, want: Dims) -> Spans:
        """What a node takes to give what is wanted, and what it gives."""
        operands = operands_of(node)
        own = list(self._dims(node, Span.ALL))
        taken: list[tuple[int, int]] = []
        for dim, span in enumerate(want if self._is_adjustable(node) else ()):
            split = self._split(node, operands, dim) if span is Span.NEW else None
            if split is not None and not set(split) & set(taken):
                own[dim] = Span.NEW
                taken += split
        needs = []
        # Of the operand of new_zeros nothing but the dtype is read.
        rest = Span.NEW if node.target in SHAPE_ONLY & SIZED else Span.ALL
        for number, operand in enumerate(operands):
            dims = list(self._dims(operand, rest))
            for dim in (dim for other, dim in taken if other == number):
                dims[dim] = Span.NEW
            needs.append(tuple(dims))
        return Spans(tuple(own), tuple(needs), node.target, self._follows(node))

    def _follows(self, node: fx.Node) -> bool:
        return node in self.follower.mixing and node not in self.follower.free

    def _is_adjustable(self, node: fx.Node) -> bool:
        """Whether it can be told to give fewer tokens."""
        follower = self.follower
        sized = any(map(follower.depends, numbers(node)))
        listed = node.target in SIZED or node.target is aten.slice.Tensor
        return not sized or listed or follower.counts_tokens(node)

    def _split(
        self, node: fx.Node, operands: list[fx.Node], dim: int
    ) -> list[tuple[int, int]] | None:
        """The dims of operands, by number, whose new tokens give those of a dim of the result.

        None if there are no such dims.
        """
        if node.target in SHAPE_ONLY:
            return [] if node.target in SIZED else [(0, dim)]
        if self.follower.counts_tokens(node):
            return []
        if not self.follower.is_length(node.meta["val"].shape[dim]):
            return None
        if node.target is _SDPA:
            return _split_attention(node, operands, dim, self._dims)
        if self._is_made(node, operands[0], dim):
            return []
        call = call_of(node, lambda _: (R, None), self.follower.size)
        rule = RULES.get(node.target)
        for choice in self._choices(operands) if rule is not None else ():
            placements = [R if at is None else Shard(at, LAYOUT) for at in choice]
            answer = rule.place(call.with_placements(placements))
            if answer is not None and not answer.cuts and answer.out == Shard(dim, LAYOUT):
                return [(number, at) for number, at in enumerate(choice) if at is not None]
        return None

    def _is_made(self, node: fx.Node, source: fx.Node, dim: int) -> bool:
        """Whether an operator repeats one entry along a dim, or takes a table's first entries."""
        columns = self.follower.takes_columns(node) and node.args[1] == dim
        if not columns and node.target not in _EXPANDS:
            return False
        shape, ndim = source.meta["val"].shape, node.meta["val"].dim()
        at = dim - (ndim - len(shape))
        return at < 0 or not self.follower.depends(shape[at])

    def _choices(self, operands: list[fx.Node]) -> Iterator[tuple[int | None, ...]]:
        """A dim of tokens, or none, of each operand; of more operands first."""
        options = [[None, *self._lengths(arg.meta["val"])] for arg in operands]
        choices = sorted(product(*options), key=lambda choice: choice.count(None))
        return iter(choices[:-1])

    def _lengths(self, value: Any) -> list[int]:
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        return [dim for dim, size in enumerate(shape) if self.follower.is_length(size)]


def _split_attention(
    node: fx.Node,
    operands: list[fx.Node],
    dim: int,
    dims_of: Callable[[fx.Node, Span], Dims],
) -> list[tuple[int, int]] | None:
    """Queries and the rows of the mask; without a mask, rows are numbered from the first token."""
    q, _, _, *masks = operands
    causal = node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5])
    if causal or dim != q.meta["val"].dim() - 2:
        return None
    rows = [(0, dim)]
    for mask in masks:
        at = mask.meta["val"].dim() - 2
        if dims_of(mask, Span.ALL)[at] is not None:
            rows.append((3, at))
    return rows

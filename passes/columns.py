"""A graph that is to run on new tokens alone: its numbers of tokens, and the caches it is given.

Of T tokens, S are new: columns T - S to T. The program's attention mask is [B, T]; its further
input `start` [B] is the column of each sequence's first new token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from spdcompile.errors import RefusalError
from spdcompile.passes.base import BlockGraph, CacheSpec, Part, add_call
from spdcompile.passes.cut import narrowest_cut
from spdcompile.passes.ops import APPEND
from spdcompile.passes.placement.types import P, Placement, R, Shard
from spdcompile.passes.spans import SPANS
from spdcompile.passes.tokens import SUBJECT, TOKENS

aten = torch.ops.aten
START = "start"


def refuse(reason: str) -> RefusalError:
    """The error of a program that has no cache."""
    return RefusalError("The model cannot run on new tokens alone.", point=SUBJECT, reason=reason)


def _length_of(node: fx.Node) -> torch.SymInt:
    return node.meta["val"].shape[node.meta[TOKENS]]


class Columns:
    """What the rewrites of one graph share.

    Args:
        block: the graph, a copy.
        part: one of the parts that call it.
        masks: its placeholders of the attention mask; one is added where it is needed.
    """

    def __init__(self, block: BlockGraph, part: Part, masks: list[str]) -> None:
        self.block, self.part, self.masks = block, part, masks
        self.graph = block.module.graph
        self.starts: list[str] = []
        self.caches: dict[str, CacheSpec] = {}
        self.counts = False  # whether new tokens must begin at one column for all sequences
        self.inputs = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        followed = (self.inputs[name] for name in part.inputs)
        followed = (node for node in followed if TOKENS in node.meta)
        self.like = next(node for node in followed if _length_of(node).node.expr.is_Symbol)
        self.length = _length_of(self.like)
        self._sizes: dict[str, fx.Node] = {}
        self._totals: dict[fx.Node, fx.Node] = {}

    # ---- numbers of tokens

    def take_sizes_elsewhere(self) -> None:
        """The number of new tokens is read off a value that has no others."""
        for node in self.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            if TOKENS not in node.args[0].meta or SPANS in node.args[0].meta:
                node.args = self._with_size(node)

    def _with_size(self, node: fx.Node) -> tuple[fx.Node, int]:
        size = node.meta["val"]
        for name in self.part.inputs:
            if TOKENS in self.inputs[name].meta:
                for dim, other in enumerate(self.inputs[name].meta["val"].shape):
                    if str(other) == str(size):
                        return self.inputs[name], dim
        if self._depends(size):
            raise refuse(f"it computes with the size {size}")
        return node.args

    def num_all(self) -> fx.Node:
        """T."""
        if "all" not in self._sizes:
            self._sizes["all"] = self._size(self.mask(), 1)
        return self._sizes["all"]

    def first_new(self) -> fx.Node:
        """T - S."""
        if "first" not in self._sizes:
            new = self._size(self.like, self.like.meta[TOKENS])
            total = self.num_all()
            with self.graph.inserting_after(max(total, new)):
                meta = {"val": self.length, "placement": R}
                self._sizes["first"] = add_call(self.graph, operator.sub, (total, new), meta)
        self.counts = True
        return self._sizes["first"]

    def _size(self, source: fx.Node, dim: int) -> fx.Node:
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            meta = {"val": self.length, "placement": R}
            return add_call(self.graph, aten.sym_size.int, (source, dim), meta)

    def of_all(self, size: Any) -> Any:
        """A size with T for S."""
        if not isinstance(size, fx.Node) or not self._depends(size.meta["val"]):
            return size
        if size.target is aten.sym_size.int:
            if not self.is_length(size.meta["val"]):
                raise refuse(f"it computes with the size {size.meta['val']}")
            return self.num_all()
        if size not in self._totals:  # in graph order, so that it is there for all that follow
            args = fx.map_arg(size.args, self.of_all)
            self._totals[size] = add_call(self.graph, size.target, args, size.meta)
        return self._totals[size]

    def is_length(self, size: Any) -> bool:
        """Whether a size is the number of new tokens."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.length.node.expr

    def _depends(self, size: Any) -> bool:
        symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
        return self.length.node.expr in symbols

    # ---- what the graph is given besides

    def mask(self) -> fx.Node:
        """The attention mask."""
        if not self.masks:
            shape = (self.like.meta["val"].shape[0], self.length)
            value = self.like.meta["val"].new_empty(shape, dtype=torch.long)
            self.masks.append(self._placeholder("all_tokens", value, R).name)
        return self.inputs[self.masks[0]]

    def start(self) -> fx.Node:
        """The column of each sequence's first new token."""
        if not self.starts:
            value = self.mask().meta["val"].new_empty(self.mask().meta["val"].shape[:1])
            self.starts.append(self._placeholder(START, value, R).name)
        return self.inputs[self.starts[0]]

    def cache(self, node: fx.Node, span: int = 0) -> fx.Node:
        """A cache for what a node makes.

        Args:
            span: how many tokens back are seen, 0 for all.
        """
        value, dim, placement = (node.meta[key] for key in ("val", TOKENS, "placement"))
        made = self._placeholder(f"cache_{len(self.caches)}", value, placement)
        shape = tuple(self._local_shape(node))
        self.caches[made.name] = CacheSpec(shape, value.dtype, dim, span, per_rank=placement != R)
        return made

    def _placeholder(self, name: str, value: torch.Tensor, placement: Placement) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.meta = {"val": value, "placement": placement}
        self.inputs[node.name] = node
        return node

    # ---- what is remembered

    def narrowest(
        self, queries: Iterable[fx.Node], wanted: tuple[fx.Node, ...]
    ) -> tuple[fx.Node, ...] | None:
        """What is remembered in place of some values; None if they are themselves."""
        return narrowest_cut(queries, wanted, self.size_per_token)

    def size_per_token(self, node: fx.Node) -> float:
        """Numbers a token that a rank would remember; infinite for what a cache cannot hold."""
        if not isinstance(node.meta.get(TOKENS), int) or node.meta["placement"] == P:
            return math.inf
        shape, symbolic = self._local_shape(node), node.meta["val"].shape
        plain = not isinstance(symbolic[0], int) and symbolic[0].node.expr.is_Symbol
        if not plain or shape.count(0) != 2 or not self.is_length(symbolic[node.meta[TOKENS]]):
            return math.inf
        return math.prod(size for size in shape if size)

    def _local_shape(self, node: fx.Node) -> list[int]:
        """A rank's shape, 0 for the batch and for the tokens."""
        placement = node.meta["placement"]
        shape = [size if isinstance(size, int) else 0 for size in node.meta["val"].shape]
        if isinstance(placement, Shard) and shape[placement.dim]:
            units = max(map(len, self.part.assignments[placement.layout.region]))
            shape[placement.dim] = placement.layout.local_size(units)
        return shape

    def recomputing(self, cut: Iterable[fx.Node]) -> Callable[[fx.Node], fx.Node]:
        """What makes a value of all tokens, from what is remembered of them.

        Args:
            cut: what is remembered.
        """
        kept, copies = set(cut), dict[fx.Node, fx.Node]()

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                if node in kept:
                    copies[node] = self._remembered(node)
                elif isinstance(node.meta["val"], torch.SymInt):
                    copies[node] = self.of_all(node)
                elif TOKENS in node.meta:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), copy)
                    copies[node] = add_call(self.graph, node.target, args, node.meta, kwargs)
                else:
                    copies[node] = node
            return copies[node]

        return copy

    def _remembered(self, node: fx.Node) -> fx.Node:
        """Writes new tokens into a cache, and reads all."""
        cache, dim = self.cache(node), node.meta[TOKENS]
        add_call(self.graph, APPEND, (node, cache, self.start(), dim), node.meta)
        args = (cache, dim, 0, self.num_all())
        return add_call(self.graph, aten.slice.Tensor, args, node.meta)

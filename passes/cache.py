"""Makes a program that runs on new tokens alone: its attention remembers keys and values.

Each attention gets two caches, of its keys and of its values, laid out over the ranks as they are.
Where keys and values are computed from fewer numbers a token than they have themselves, by
operators that serve nothing else (the latents of MLA), those numbers are remembered, and the keys
and values of all tokens computed from them at each step.

The program's attention mask is [B, T], over the tokens before and the S new ones; a further input,
`start` [B], is the column of each sequence's first new token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from spdcompile.errors import RefusalError
from spdcompile.passes.base import BlockGraph, CacheSpec, Part, PassResult, Program, add_call
from spdcompile.passes.cut import narrowest_cut
from spdcompile.passes.ops import APPEND, ATTEND, ATTEND_CACHED, ATTENTION
from spdcompile.passes.placement.types import P, Placement, R, Shard
from spdcompile.passes.tokens import COLUMNS, COUNTING, SUBJECT, TOKENS, count_of

aten = torch.ops.aten
START = "start"


def remember(program: Program) -> PassResult:
    """Gives every attention its caches, and the program the input `start`.

    Raises:
        RefusalError: the program mixes tokens outside attention, or asks for more than a cache of
            keys and values.
    """
    for refusal in program.refusals:
        if refusal.subject == SUBJECT:
            raise RefusalError(
                "The model cannot run on new tokens alone.", point=SUBJECT, reason=refusal.reason
            )
    mask, graphs, made = program.inputs[1], {}, {}
    parts = []
    for part in program.parts:
        if part.graph not in made:
            names = [name for name, value in part.inputs.items() if value == mask]
            block = program.graph_of(part)
            rewriter = _Rewriter(block.copied(), part, names)
            graphs[part.graph] = rewriter.run()
            made[part.graph] = rewriter
        rewriter = made[part.graph]
        given = {**part.inputs, **dict.fromkeys(rewriter.masks, mask)}
        given |= dict.fromkeys(rewriter.starts, START)
        parts.append(replace(part, inputs=given, caches=rewriter.caches))
    program = replace(
        program,
        graphs=graphs,
        parts=tuple(parts),
        inputs=(*program.inputs, START),
        one_start=any(rewriter.counts for rewriter in made.values()),
    )
    return PassResult(program, sum(len(rewriter.caches) for rewriter in made.values()))


@dataclass
class _Rewriter:
    """Rewrites one graph.

    Args:
        block: the graph, a copy.
        part: one of the parts that call it.
        masks: its placeholders of the attention mask; `run` adds one where it is needed.
    """

    block: BlockGraph
    part: Part
    masks: list[str]
    starts: list[str] = field(default_factory=list)
    caches: dict[str, CacheSpec] = field(default_factory=dict)
    counts: bool = False

    def __post_init__(self) -> None:
        self.graph = self.block.module.graph
        self.inputs = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        self.columns: fx.Node | None = None
        like = next(self.inputs[name] for name in self.part.inputs if name not in self.masks)
        self.length = like.meta["val"].shape[like.meta[TOKENS]]

    def run(self) -> BlockGraph:
        self._take_sizes_elsewhere()
        for node in list(self.graph.nodes):
            if node.target is ATTENTION:
                self._remember(node)
            elif node.target in COUNTING and COLUMNS in node.meta:
                self._count_on(node)
        self.graph.eliminate_dead_code()
        self.block.module.recompile()
        return self.block

    def _take_sizes_elsewhere(self) -> None:
        """The mask covers all tokens, so that the number of new ones is read off another input."""
        for node in self.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            if node.args[0].name in self.masks:
                node.args = self._with_size(node.meta["val"])

    def _with_size(self, size: Any) -> tuple[fx.Node, int]:
        for name in self.part.inputs:
            if name not in self.masks:
                for dim, other in enumerate(self.inputs[name].meta["val"].shape):
                    if str(other) == str(size):
                        return self.inputs[name], dim
        raise AssertionError("every part receives a value of all tokens")

    def _count_on(self, node: fx.Node) -> None:
        """arange(S) becomes arange(T - S, T): the columns of the new tokens."""
        _, length, _ = count_of(node)
        with self.graph.inserting_before(node):
            last = self._num_columns()
            first = add_call(self.graph, operator.sub, (last, length), length.meta)
            args = (first, last)
            columns = add_call(self.graph, aten.arange.start, args, node.meta, node.kwargs)
        node.replace_all_uses_with(columns)
        self.graph.erase_node(node)
        self.counts = True

    def _num_columns(self) -> fx.Node:
        """T, the number of tokens before and new."""
        if self.columns is None:
            mask = self._mask()
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                args, meta = (mask, 1), {"val": self.length, "placement": R}
                self.columns = add_call(self.graph, aten.sym_size.int, args, meta)
        return self.columns

    def _mask(self) -> fx.Node:
        if not self.masks:
            like = next(self.inputs[name] for name in self.part.inputs)
            shape = (like.meta["val"].shape[0], self.length)
            value = like.meta["val"].new_empty(shape, dtype=torch.long)
            self.masks.append(self._placeholder("all_tokens", value, R).name)
        return self.inputs[self.masks[0]]

    def _start(self) -> fx.Node:
        if not self.starts:
            value = self._mask().meta["val"].new_empty(self._mask().meta["val"].shape[:1])
            self.starts.append(self._placeholder(START, value, R).name)
        return self.inputs[self.starts[0]]

    def _placeholder(self, name: str, value: torch.Tensor, placement: Placement) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.meta = {"val": value, "placement": placement}
        self.inputs[node.name] = node
        return node

    def _remember(self, node: fx.Node) -> None:
        q, k, v, valid, sinks, *settings = node.args
        _, _, window, _, chunk = (*settings, 0)[:5]
        tail = (valid, self._start(), sinks, *settings)
        cut = narrowest_cut(q, (k, v), self._size_per_token)
        with self.graph.inserting_before(node):
            if cut is None:
                span = min((size for size in (window, chunk) if size), default=0)
                caches = [self._cache(x, span) for x in (k, v)]
                out = add_call(self.graph, ATTEND_CACHED, (q, k, v, *caches, *tail), node.meta)
            else:
                k, v = self._recomputed(cut, (k, v))
                out = add_call(self.graph, ATTEND, (q, k, v, *tail), node.meta)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def _size_per_token(self, node: fx.Node) -> float:
        """Numbers a token that a rank would remember; infinite for what a cache cannot hold."""
        if not isinstance(node.meta[TOKENS], int) or node.meta["placement"] == P:
            return math.inf
        shape = self._local_shape(node)
        if shape[0] != 0 or shape.count(0) != 2 or shape[node.meta[TOKENS]] != 0:
            return math.inf
        return math.prod(size for size in shape if size)

    def _local_shape(self, node: fx.Node) -> list[int]:
        """A rank's shape, 0 for the batch and for the tokens."""
        placement = node.meta["placement"]
        shape = [size if isinstance(size, int) else 0 for size in node.meta["val"].shape]
        if isinstance(placement, Shard):
            units = max(map(len, self.part.assignments[placement.layout.region]))
            shape[placement.dim] = placement.layout.local_size(units)
        return shape

    def _cache(self, node: fx.Node, span: int) -> fx.Node:
        """A cache for what a node makes.

        Args:
            span: how many tokens back are seen, 0 for all.
        """
        value, dim, placement = (node.meta[key] for key in ("val", TOKENS, "placement"))
        name = f"cache_{len(self.caches)}"
        made = self._placeholder(name, value, placement)
        shape = tuple(self._local_shape(node))
        self.caches[made.name] = CacheSpec(shape, value.dtype, dim, span, per_rank=placement != R)
        return made

    def _recomputed(
        self, cut: Iterable[fx.Node], wanted: tuple[fx.Node, ...]
    ) -> tuple[fx.Node, ...]:
        """Keys and values of all tokens, from what is remembered of them."""
        columns, start = self._num_columns(), self._start()
        copies: dict[fx.Node, fx.Node] = {}
        for node in cut:
            cache, dim = self._cache(node, 0), node.meta[TOKENS]
            add_call(self.graph, APPEND, (node, cache, start, dim), node.meta)
            args = (cache, dim, 0, columns)
            copies[node] = add_call(self.graph, aten.slice.Tensor, args, node.meta)

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                size = node.meta["val"]
                if node.target is aten.sym_size.int:
                    copies[node] = self._of_all_tokens(node)
                elif TOKENS in node.meta or isinstance(size, torch.SymInt):
                    args, kwargs = fx.map_arg((node.args, node.kwargs), copy)
                    copies[node] = add_call(self.graph, node.target, args, node.meta, kwargs)
                else:
                    copies[node] = node
            return copies[node]

        return tuple(copy(node) for node in wanted)

    def _of_all_tokens(self, node: fx.Node) -> fx.Node:
        size = node.meta["val"].node.expr
        length = self.length.node.expr
        if size == length:
            return self._num_columns()
        if length in size.free_symbols:
            raise RefusalError(
                "The model cannot run on new tokens alone.",
                point=SUBJECT,
                reason=f"its keys are made by way of the size {size}",
            )
        return node

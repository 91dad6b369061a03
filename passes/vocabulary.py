"""Splits the table of token embeddings over the vocabulary.

A rank looks up the tokens whose rows it holds, has zeros for the others, and the ranks' results are
summed: a sync point of its own, which cannot be dropped. Exact, since one summand is not zero.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import fx

from spdcompile.passes.base import (
    BlockGraph,
    ParamRef,
    Part,
    PassResult,
    Program,
    Refusal,
    SyncPoint,
    add_call,
)
from spdcompile.passes.export import INPUTS
from spdcompile.passes.layout import Assignment, Layout, even_split, shard_spec
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement.types import P, R, Shard, V

aten = torch.ops.aten
POINT = "embed"
_ROWS = "embed_rows"
# A table of 256 MiB at tp 4 takes 192 MiB less on each rank, for one all-reduce a forward pass.
_LARGE = 2**28
_REFUSAL = "each rank looks up the tokens whose rows it holds; without the sum the others are zero"
_RESHAPES = (aten.reshape.default, aten.view.default)


class Vocabulary(enum.Enum):
    """Whether the table of token embeddings is split."""

    SPLIT = "split"
    WHOLE = "whole"
    BY_SIZE = "by size"


@dataclass(frozen=True, slots=True)
class SplitVocabulary:
    """Splits the tables that the token ids choose from; runs on a localized program.

    Args:
        setting: whether to; by size, tables of 256 MiB and more.
    """

    setting: Vocabulary

    def __call__(self, program: Program) -> PassResult:
        """Refuses a table that something else than one lookup reads."""
        prelude, *rest = program.parts
        graph = program.graph_of(prelude)
        if self.setting is Vocabulary.WHOLE or program.tp == 1:
            return PassResult(program, 0)
        found = [n for n in graph.module.graph.nodes if self._wanted(n, prelude)]
        if not found:
            return PassResult(program, 0)
        if len(found) > 1 or len(found[0].args[0].users) > 1:
            reason = "more than one operator reads the embeddings of tokens"
            return PassResult(program, 0, (Refusal(POINT, reason, found[0].name, prelude.graph),))
        graph = graph.copied()
        (node,) = (n for n in graph.module.graph.nodes if n.name == found[0].name)
        assignment = even_split(node.args[0].meta["val"].shape[0], program.tp)
        part, data = _split(node, prelude, assignment)
        graph.module.recompile()
        graph = _with_point(graph)
        program = replace(
            program,
            graphs={**program.graphs, prelude.graph: graph},
            parts=(part, *rest),
            constants={**program.constants, _ROWS: data},
        )
        return PassResult(program, 1)

    def _wanted(self, node: fx.Node, part: Part) -> bool:
        if node.target is not aten.embedding.default:
            return False
        table, ids = node.args[:2]
        ref = part.params.get(table.name)
        while ids.target in _RESHAPES:
            ids = ids.args[0]
        if ref is None or table.meta["placement"] != R or part.inputs.get(ids.name) != INPUTS[0]:
            return False
        large = prod(ref.shape) * ref.dtype.itemsize >= _LARGE
        return large or self.setting is Vocabulary.SPLIT


def _with_point(block: BlockGraph) -> BlockGraph:
    """The block with its sync points in the order in which they now come."""
    known = {point.name: point for point in block.sync_points}
    known[POINT] = SyncPoint(POINT, refusal=_REFUSAL)
    names = [n.args[1] for n in block.module.graph.nodes if n.target is SYNC]
    points = tuple(known[name] for name in names)
    return replace(block, sync_points=points, partials=(POINT, *block.partials))


def _split(node: fx.Node, part: Part, assignment: Assignment) -> tuple[Part, torch.Tensor]:
    """Rewrites the lookup; returns the part, and each rank's first row and the one after all."""
    graph, table, ids = node.graph, node.args[0], node.args[1]
    tp, units = len(assignment), sum(map(len, assignment))
    ends = np.cumsum([0, *map(len, assignment)])
    data = torch.from_numpy(np.stack([ends[:-1], ends[1:]], axis=1))
    with graph.inserting_before(next(iter(graph.nodes))):
        rows = graph.placeholder(_ROWS)
    by_rank = Layout(POINT, tp, np.arange(tp))
    rows.meta = {"val": data.to("meta"), "placement": Shard(0, by_rank)}
    table.meta["placement"] = Shard(0, Layout(POINT, units, np.arange(units)))
    own = {"placement": V}
    with graph.inserting_before(node):
        first, stop = (
            add_call(graph, aten.select.int, (rows, 1, i), rows.meta, **own) for i in (0, 1)
        )
        place = add_call(graph, aten.sub.Tensor, (ids, first), ids.meta, **own)
        after = add_call(graph, aten.ge.Tensor, (ids, first), ids.meta, **own)
        before = add_call(graph, aten.lt.Tensor, (ids, stop), ids.meta, **own)
        held = add_call(graph, aten.logical_and.default, (after, before), ids.meta, **own)
        index = add_call(graph, aten.mul.Tensor, (place, held), ids.meta, **own)
        found = add_call(graph, aten.embedding.default, (table, index), node.meta, **own)
        mask = add_call(graph, aten.unsqueeze.default, (held, -1), node.meta, **own)
        partial = add_call(graph, aten.mul.Tensor, (found, mask), node.meta, placement=P)
        total = add_call(graph, SYNC, (partial, POINT), node.meta, placement=R)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    shards = {
        table.name: shard_spec(table.meta["placement"].layout, 0, assignment),
        _ROWS: shard_spec(by_rank, 0, even_split(tp, tp)),
    }
    ref = ParamRef(_ROWS, tuple(data.shape), data.dtype, constant=True)
    made = replace(part, params={**part.params, _ROWS: ref}, shards={**part.shards, **shards})
    return made, data

"""Rewrites global sizes and offsets in the graphs into each rank's own."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from spdcompile.passes.base import BlockGraph, PassResult, Program, add_call
from spdcompile.passes.concrete import call_of
from spdcompile.passes.layout import Layout
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.movement import Movement, Resize
from spdcompile.passes.placement.types import Shard


def localize(program: Program) -> PassResult:
    """Makes every distinct graph one that a rank can run on its own shards."""
    rewrites = 0
    program = program.map_graphs(lambda _, block: block.copied())
    for key, block in program.graphs.items():
        part = next(part for part in program.parts if part.graph == key)
        per_rank = {name: max(map(len, units)) for name, units in part.assignments.items()}
        rewrites += _localize(block, per_rank)
    return PassResult(program, rewrites)


def _localize(block: BlockGraph, units_per_rank: dict[str, int]) -> int:
    graph, rewrites = block.module.graph, 0
    for node in list(graph.nodes):
        rule = RULES.get(node.target)
        if node.op != "call_function" or not isinstance(rule, Movement):
            continue
        call = call_of(node, lambda arg: (arg.meta["placement"], None))
        if not any(isinstance(operand.placement, Shard) for operand in call.operands()):
            continue
        resize = _GraphResize(units_per_rank, node)
        args = rule.localize(call, node.args, node.meta["placement"], resize)
        if args != node.args:
            node.args = args
            rewrites += 1
    block.module.recompile()
    return rewrites


class _GraphResize(Resize):
    """Resizes sizes that are nodes too: a batch folded into a split dim."""

    def __init__(self, units_per_rank: dict[str, int], node: fx.Node) -> None:
        super().__init__(units_per_rank)
        self.node = node

    def size(self, size: Any, layout: Layout) -> Any:
        if isinstance(size, int):
            return super().size(size, layout)
        local = layout.local_size(self.units_per_rank[layout.region])
        with self.node.graph.inserting_before(self.node):
            folded = self._call(operator.floordiv, (size, len(layout)), size)
            return self._call(operator.mul, (folded, local), size)

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        return add_call(self.node.graph, target, args, like.meta)

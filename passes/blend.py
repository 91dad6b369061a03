"""Between a kept and a dropped sync point: programs in which a number says how far it is dropped.

Where a rank sees R + P_i in a program with dropped points, it sees R + S + gate * (P_i - S) here,
S being the sum of P over the ranks. Gate 0 is the program that keeps the points, 1 the one that
drops them, and everything linear is the same for all gates. So the derivative by the gate at 0 is
the first-order change that the drop makes. Each sequence of the batch has a gate of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from spdcompile.errors import RefusalError
from spdcompile.passes.base import BlockGraph, Program, SyncPoint, add_call
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement.types import P, Placement, R, V

aten = torch.ops.aten
GATE = "gate"
"""The added input, [B]: for each sequence 0 to keep what was dropped, 1 to drop it."""


def blend(program: Program) -> Program:
    """A program with dropped points in which `GATE` says how far they are dropped.

    Args:
        program: after the pass `drop`; parts without dropped or pending values stay as they are.

    Raises:
        RefusalError: routers read the replicated part alone, which no gate leads to.
    """
    gated = {key for key, block in program.graphs.items() if _views(block.module.graph)}
    graphs = {
        key: _blended(key, block) if key in gated else block
        for key, block in program.graphs.items()
    }
    parts = tuple(
        replace(part, inputs={**part.inputs, GATE: GATE}) if part.graph in gated else part
        for part in program.parts
    )
    return replace(program, graphs=graphs, parts=parts, inputs=(*program.inputs, GATE))


def _views(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(reader, partial sum) wherever a rank sees its own share of a pending sum."""
    return [
        (node, arg)
        for node in graph.nodes
        if node.op == "call_function" and node.meta.get("placement") == V
        for arg in node.all_input_nodes
        if arg.meta.get("placement") == P
    ]


def _blended(key: str, block: BlockGraph) -> BlockGraph:
    if block.routers:
        raise RefusalError(
            "There is no first-order estimate of this drop.",
            point=key,
            reason=f"{block.routers[0]} reads another value as soon as the point is dropped at all",
            fix="leave the first-order estimate out, or set router='exact'",
        )
    block = block.copied()
    graph = block.module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        gate = graph.placeholder(GATE)
    gate.meta = {"placement": R, "val": torch.empty(1, device="meta")}
    seen: dict[fx.Node, fx.Node] = {}
    for reader, partial in _views(graph):
        if partial not in seen:
            with graph.inserting_before(reader):
                seen[partial] = _blended_sum(graph, partial, gate)
        reader.replace_input_with(partial, seen[partial])
    block.module.recompile()
    added = tuple(SyncPoint(f"{GATE}_{number}") for number in range(len(seen)))
    return replace(block, sync_points=(*block.sync_points, *added))


def _blended_sum(graph: fx.Graph, partial: fx.Node, gate: fx.Node) -> fx.Node:
    """S + gate * (P - S); the batch is the outer part of P's first dim, or all of it."""

    def add(target: Any, *args: Any, placement: Placement = V) -> fx.Node:
        return add_call(graph, target, args, partial.meta, placement=placement)

    total = add(SYNC, partial, GATE, placement=R)
    missing = add(aten.sub.Tensor, partial, total)
    sequences = add(aten.sym_size.int, gate, 0, placement=R)
    by_sequence = add(aten.reshape.default, missing, [sequences, -1])
    alike = add(aten.type_as.default, gate, missing)  # or the product would be in the gate's dtype
    column = add(aten.unsqueeze.default, alike, 1)
    share = add(aten.mul.Tensor, by_sequence, column)
    return add(aten.add.Tensor, total, add(aten.view_as.default, share, missing))

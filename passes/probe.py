"""Programs that give what lies inside a block: what attention reads, and what the ranks add up.

A probe is a program of the same parts, whose blocks give other values than their outputs. It is
run block by block on values of the program that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from spdcompile.passes.base import BlockGraph, Part, Program, SyncPoint
from spdcompile.passes.ops import ATTENTION, SYNC
from spdcompile.passes.placement.types import P, Replicate

PARTIAL = "attention_partial"
"""The added input of `mlp_probe`: what each rank adds up at the attention's sync point."""
_TENSORS = {"q": 0, "k": 1, "valid": 3, "sinks": 4}  # where attention's arguments are


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What a block's attention reads.

    Args:
        stacked: by name (q, k, valid, sinks; sinks only if there are any), whether each rank has
            its own.
        settings: the arguments after the tensors.
    """

    stacked: Mapping[str, bool]
    settings: tuple[Any, ...]


def attention_of(block: BlockGraph) -> AttentionInputs | None:
    """What a block's attention reads; None unless it is one call of one operator."""
    nodes = _attention_nodes(block)
    if len(nodes) != 1:
        return None
    (node,) = nodes
    stacked = {
        name: not isinstance(value.meta["placement"], Replicate)
        for name, value in _tensors(node).items()
    }
    return AttentionInputs(stacked, tuple(node.args[len(_TENSORS) + 1 :]))


def _tensors(attention: fx.Node) -> dict[str, fx.Node]:
    """The tensors that attention compares, by name; without sinks where there are none."""
    given = {name: attention.args[place] for name, place in _TENSORS.items()}
    return {name: value for name, value in given.items() if isinstance(value, fx.Node)}


def attention_probe(program: Program, layers: frozenset[int]) -> Program:
    """Blocks that give what their attention reads, by the names of `AttentionInputs.stacked`.

    Args:
        layers: those of the blocks; each has one attention.
    """

    def rewrite(graph: fx.Graph) -> list[fx.Node]:
        (node,) = graph.find_nodes(op="call_function", target=ATTENTION)
        return list(_tensors(node).values())

    def outputs(block: BlockGraph) -> tuple[str, ...]:
        inputs = attention_of(block)
        assert inputs is not None, "asked for of blocks that have one attention"
        return tuple(inputs.stacked)

    return _probe(program, layers, rewrite, outputs)


def partial_probe(program: Program, layers: frozenset[int], point: str) -> Program:
    """Blocks that give what each rank adds up at a sync point, under `PARTIAL`."""
    return _probe(program, layers, lambda graph: [_partial(_sync(graph, point))], _one)


def mlp_probe(program: Program, layers: frozenset[int], point: str) -> Program:
    """Blocks that go on from a given share of a sync point's sum to what the next one adds up.

    Each rank goes on from its own share alone, as where the point is dropped. They read `PARTIAL`
    and give what each rank adds up at the next sync point, under that name.
    """

    def rewrite(graph: fx.Graph) -> list[fx.Node]:
        sync = _sync(graph, point)
        later = _next_sync(graph, sync)
        assert later is not None, "asked for of blocks in which another one follows"
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            given = graph.placeholder(PARTIAL)
        given.meta = {**_partial(sync).meta, "placement": P}
        sync.replace_all_uses_with(given)
        return [_partial(later)]

    probe = _probe(program, layers, rewrite, _one)
    parts = tuple(
        replace(part, inputs={**part.inputs, PARTIAL: PARTIAL}) if part.layer in layers else part
        for part in probe.parts
    )
    return replace(probe, parts=parts, inputs=(*probe.inputs, PARTIAL))


def follows(block: BlockGraph, point: str) -> bool:
    """Whether a sync point is followed by another one of its block that depends on it."""
    nodes = block.module.graph.find_nodes(op="call_function", target=SYNC)
    return any(n.args[1] == point and _next_sync(n.graph, n) is not None for n in nodes)


def _one(block: BlockGraph) -> tuple[str, ...]:
    return (PARTIAL,)


def _probe(program: Program, layers: frozenset[int], rewrite: Any, outputs: Any) -> Program:
    graphs = dict(program.graphs)
    parts: list[Part] = []
    for part in program.parts:
        if part.layer not in layers:
            parts.append(part)
            continue
        block = program.graph_of(part)
        key = f"{part.graph}-probe"
        if key not in graphs:
            graphs[key] = _giving(block, rewrite)
        parts.append(replace(part, graph=key, outputs=outputs(block)))
    return replace(program, graphs=graphs, parts=tuple(parts))


def _giving(block: BlockGraph, rewrite: Any) -> BlockGraph:
    """A copy whose outputs are the nodes that `rewrite` returns."""
    block = block.copied()
    graph = block.module.graph
    results: Sequence[fx.Node] = rewrite(graph)
    graph.output_node().args = (tuple(results),)
    graph.eliminate_dead_code()
    block.module.recompile()
    left = graph.find_nodes(op="call_function", target=SYNC)
    return replace(block, sync_points=tuple(SyncPoint(str(node.args[1])) for node in left))


def _attention_nodes(block: BlockGraph) -> list[fx.Node]:
    return block.module.graph.find_nodes(op="call_function", target=ATTENTION)


def _sync(graph: fx.Graph, point: str) -> fx.Node:
    nodes = graph.find_nodes(op="call_function", target=SYNC)
    return next(node for node in nodes if node.args[1] == point)


def _partial(sync: fx.Node) -> fx.Node:
    """What each rank adds up at a sync point."""
    (partial,) = sync.all_input_nodes
    return partial


def _next_sync(graph: fx.Graph, first: fx.Node) -> fx.Node | None:
    """The first sync point that depends on another one."""
    reached = {first}
    for node in graph.nodes:
        if node is not first and not reached.isdisjoint(node.all_input_nodes):
            if node.target is SYNC:
                return node
            reached.add(node)
    return None

"""Consecutive blocks as one graph: longer to compile, and fewer functions to call a step.

A call of a compiled function costs Python: it asks whether what was compiled holds for its inputs,
and takes them apart and its outputs together. With a small model on a fast machine that is a
noticeable share of a token's step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import fx

from spdcompile.errors import UsageError
from spdcompile.passes.base import BlockGraph, Part, Program


def check_blocks_per_graph(blocks: int) -> None:
    """Raises UsageError unless it is a number of blocks."""
    if not isinstance(blocks, int) or blocks < 1:
        raise UsageError(
            "A graph holds at least one block.",
            where="blocks_per_graph",
            found=repr(blocks),
            needed="an integer of at least 1",
        )


def join_blocks(program: Program, blocks: int) -> Program:
    """A program of the same operators in the same order, whose parts hold several blocks each.

    It is one to run, and no longer one for passes: a part that holds several has no layer.

    Args:
        blocks: how many blocks a part holds; the last part has the rest.
    """
    if blocks == 1:
        return program
    runs = _runs(program.parts, blocks)
    last_reader = {
        value: number
        for number, run in enumerate(runs)
        for part in run
        for value in part.inputs.values()
    }
    last_reader[program.output] = len(runs)
    graphs: dict[str, BlockGraph] = {}
    keys: dict[object, str] = {}
    parts = []
    for number, run in enumerate(runs):
        kept = {value for value, reader in last_reader.items() if reader > number}
        wiring = _wiring(run, kept)
        if wiring not in keys:
            keys[wiring] = run[0].graph if len(run) == 1 else f"blocks_{len(graphs)}"
            graphs[keys[wiring]] = (
                program.graph_of(run[0]) if len(run) == 1 else _joined_graph(program, run, kept)
            )
        parts.append(run[0] if len(run) == 1 else _joined_part(run, keys[wiring], kept))
    return replace(program, graphs=graphs, parts=tuple(parts))


def _runs(parts: tuple[Part, ...], blocks: int) -> list[list[Part]]:
    """Parts that are to be one, in order: blocks together, others by themselves."""
    runs: list[list[Part]] = []
    for part in parts:
        before = runs[-1] if runs else []
        if part.layer is not None and 0 < len(before) < blocks and before[0].layer is not None:
            before.append(part)
        else:
            runs.append([part])
    return runs


def _wiring(run: list[Part], kept: Collection[str]) -> object:
    """What two runs must have in common to be one graph."""
    if len(run) == 1:
        return run[0].graph
    numbers: dict[str, int] = {}  # value -> when the run first names it
    wires = []
    for part in run:
        for value in (*part.inputs.values(), *part.outputs):
            numbers.setdefault(value, len(numbers))
        inputs = tuple((name, numbers[value]) for name, value in part.inputs.items())
        outputs = tuple((numbers[value], value in kept) for value in part.outputs)
        wires.append((part.graph, inputs, outputs))
    return tuple(wires)


def _name(place: int, name: str) -> str:
    """A placeholder of the block at a place in its run; the same in runs of equal wiring."""
    return f"block_{place}_{name}"


def _outer(run: list[Part]) -> dict[str, str]:
    """Placeholder -> value, of what a run takes from parts before it; each value once."""
    known: set[str] = set()
    outer: dict[str, str] = {}
    for place, part in enumerate(run):
        for name, value in part.inputs.items():
            if value not in known:
                outer[_name(place, name)] = value
                known.add(value)
        known.update(part.outputs)
    return outer


def _joined_part(run: list[Part], graph: str, kept: Collection[str]) -> Part:
    def renamed(of: str) -> dict[str, object]:
        each: list[Mapping[str, object]] = [getattr(part, of) for part in run]
        return {
            _name(i, name): what for i, named in enumerate(each) for name, what in named.items()
        }

    return replace(
        run[0],
        name=f"layers.{run[0].layer} to {run[-1].layer}",
        layer=None,
        graph=graph,
        inputs=_outer(run),
        outputs=tuple(value for part in run for value in part.outputs if value in kept),
        dropped=(),
        module="",
        assignments={},
        **{of: renamed(of) for of in ("params", "shards", "caches")},
    )


def _joined_graph(program: Program, run: list[Part], kept: Collection[str]) -> BlockGraph:
    blocks = [program.graph_of(part) for part in run]
    graph, outer = fx.Graph(), _outer(run)
    values: dict[str, fx.Node] = {}
    copies: list[dict[fx.Node, fx.Node]] = []
    for place, (part, block) in enumerate(zip(run, blocks, strict=True)):
        copies.append({})
        for node in block.module.graph.find_nodes(op="placeholder"):
            name = _name(place, node.name)
            if node.name not in part.inputs or name in outer:
                new = graph.placeholder(name)
                new.meta = dict(node.meta)
                copies[-1][node] = new
                if name in outer:
                    values[outer[name]] = new
    for part, block, copied in zip(run, blocks, copies, strict=True):
        for node in block.module.graph.find_nodes(op="placeholder"):
            if node not in copied:
                copied[node] = values[part.inputs[node.name]]
        results = graph.graph_copy(block.module.graph, copied)
        values.update(zip(part.outputs, results, strict=True))
    graph.output(tuple(values[value] for part in run for value in part.outputs if value in kept))
    graph.lint()
    return BlockGraph(
        fx.GraphModule({}, graph),
        sync_points=tuple(point for block in blocks for point in block.sync_points),
    )

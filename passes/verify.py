"""The invariants of programs: what each one means, and its check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

from spdcompile.errors import CollectiveCountError, InvariantError
from spdcompile.passes.base import Invariant, Program
from spdcompile.passes.drop import all_points
from spdcompile.passes.functional import writes_in_place
from spdcompile.passes.layout import Assignment
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement.types import P, Placement, Shard, V

aten = torch.ops.aten
_NOT_NORMAL = (
    *(aten.addmm.default, aten.alias.default, aten._assert_tensor_metadata.default),
    *(aten.view.default, aten._unsafe_view.default),
)


def verify(program: Program, invariants: frozenset[Invariant]) -> None:
    """Checks a program.

    Raises:
        InvariantError: names the invariant and what breaks it.
    """
    for invariant in Invariant:
        if invariant in invariants:
            for fault in CHECKS[invariant](program):
                raise InvariantError(
                    f"The program is not {invariant.value}.", where=invariant.name, found=fault
                )


def count_sync_nodes(graph_module: fx.GraphModule) -> int:
    """How many sync points there are, in a graph and in all graphs nested in it."""
    count = 0
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            count += sum(node.target is SYNC for node in module.graph.nodes)
    return count


def check_collectives(program: Program, emitted: Mapping[str, int]) -> None:
    """Counts the emitted all-reduces of each part against the sync points that it keeps.

    Args:
        emitted: all-reduces per distinct graph, counted after lowering.

    Raises:
        CollectiveCountError: a part emits more or fewer than it keeps.
    """
    for part in program.parts:
        kept = len(program.graph_of(part).sync_points)
        if emitted[part.graph] != kept:
            raise CollectiveCountError(
                "The emitted all-reduces are not those that the plan keeps.",
                where=part.name,
                found=f"{emitted[part.graph]} all-reduces",
                needed=f"{kept}, one for each kept sync point",
            )


def _well_formed(program: Program) -> Iterator[str]:
    known = set(program.inputs)
    for part in program.parts:
        graph = program.graph_of(part).module.graph
        graph.lint()
        names = {node.name for node in graph.find_nodes(op="placeholder")}
        bound = {*part.params, *part.inputs, *part.caches}
        if names != bound:
            yield f"{part.name} binds {sorted(names ^ bound)} wrongly"
        if unknown := set(part.inputs.values()) - known:
            yield f"{part.name} reads {sorted(unknown)}, which no earlier part makes"
        if len(_results(graph)) != len(part.outputs):
            yield f"{part.name} names {len(part.outputs)} of {len(_results(graph))} outputs"
        known |= set(part.outputs)
    if program.output not in known:
        yield "no part makes the logits"


def _normal(program: Program) -> Iterator[str]:
    for key, node in _nodes(program):
        target = node.target
        if target in _NOT_NORMAL:
            yield f"{key} holds {target}"
        elif writes_in_place(node):
            # Dead-code removal and the split into parts know of results only.
            yield f"{key} holds {target}, which writes in place"


def _split(program: Program) -> Iterator[str]:
    names = [part.name for part in program.parts]
    blocks = [f"layers.{number}" for number in range(len(names) - 2)]
    if names != ["prelude", *blocks, "postlude"]:
        yield f"its parts are {names}"


def _assigned(program: Program) -> Iterator[str]:
    known: set[tuple[int, Assignment]] = set()
    for part in program.parts:
        for region in program.graph_of(part).regions:
            assignment = part.assignments.get(region.name, ())
            if (region.num_units, assignment) in known:
                continue
            known.add((region.num_units, assignment))
            units = sorted(unit for rank in assignment for unit in rank)
            if units != list(range(region.num_units)):
                yield f"{part.name}.{region.name} does not assign each unit once"


def _placed(program: Program) -> Iterator[str]:
    for key, node in _nodes(program):
        if node.op != "output" and "placement" not in node.meta:
            yield f"{key}: {node.name} has no placement"
    for part in program.parts:
        for node in program.graph_of(part).module.graph.find_nodes(op="placeholder"):
            split = isinstance(node.meta["placement"], Shard)
            if split != (node.name in part.shards) and node.name not in part.caches:
                yield f"{part.name}: {node.name} is {node.meta['placement']} but has no such shards"


def _synced(program: Program) -> Iterator[str]:
    points = set(all_points(program))
    for part in program.parts:
        block = program.graph_of(part)
        names = [node.args[1] for node in block.module.graph.nodes if node.target is SYNC]
        if names != [point.name for point in block.sync_points]:
            yield f"{part.name} syncs {names}, its points are {block.sync_points}"
        if part.layer is not None and any((part.layer, n) not in points for n in names):
            yield f"{part.name} has a nameless sync point"
    for key, node in _nodes(program):
        for reader in node.users:
            if node.meta.get("placement") == P and _needs_sum(reader):
                yield f"{key}: {reader.name} reads the partial sum {node.name}"


def _needs_sum(reader: fx.Node) -> bool:
    """A reader that is neither a sync point, nor an output of the block, nor partial itself."""
    placement: Placement | None = reader.meta.get("placement")
    if reader.target is SYNC or reader.op == "output" or placement in (P, V):
        return False
    return reader.target not in (aten.expand_as.default, aten.sym_size.int)


def _local(program: Program) -> Iterator[str]:
    for part in program.parts:
        for name, spec in part.shards.items():
            if len(spec.index) != program.tp:
                yield f"{part.name}: {name} is cut for {len(spec.index)} ranks"


def _nodes(program: Program) -> Iterator[tuple[str, fx.Node]]:
    for key, block in program.graphs.items():
        for node in block.module.graph.nodes:
            yield key, node


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return graph.output_node().args[0]


CHECKS: Mapping[Invariant, Callable[[Program], Iterator[str]]] = {
    Invariant.WELL_FORMED: _well_formed,
    Invariant.NORMAL: _normal,
    Invariant.SPLIT: _split,
    Invariant.ASSIGNED: _assigned,
    Invariant.PLACED: _placed,
    Invariant.SYNCED: _synced,
    Invariant.LOCAL: _local,
}
assert CHECKS.keys() == set(Invariant), "every invariant has a check"

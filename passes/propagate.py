"""Gives every value of a graph a placement: R, S(dim) or P.

Seeds are the regions' weights; each operator's rule says how its result lies. Where an operand
must be cut (R -> S, free of communication), a parameter is split itself and any other value gets
an `spd::take`. Where a partial sum meets an operator that needs the sum, the edge is left for the
sync pass. A split that meets an operator without a rule for it refuses its region: the region's
linears stay whole, which is correct and less parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from spdcompile.errors import NoRuleError
from spdcompile.passes.base import (
    BlockGraph,
    ParamRef,
    Part,
    PassResult,
    Program,
    Refusal,
    Region,
    RegionKind,
    add_call,
    module_path,
)
from spdcompile.passes.concrete import UnlikeSizes, call_of
from spdcompile.passes.layout import (
    Assignment,
    Layout,
    ShardSpec,
    UnevenLayoutError,
    shard_spec,
)
from spdcompile.passes.linearity import tensor_args
from spdcompile.passes.ops import GATHER, TAKE
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.folding import keeps_layouts
from spdcompile.passes.placement.movement import Movement, Resize
from spdcompile.passes.placement.types import Call, P, Placed, R, Shard, placed

aten = torch.ops.aten
_PICK = aten.index_select.default


class _RegionRefusedError(Exception):
    """A split met an operator that has no rule for it."""

    def __init__(self, region: str, reason: str, node: str) -> None:
        super().__init__(reason)
        self.region, self.reason, self.node = region, reason, node


def propagate(program: Program) -> PassResult:
    """Places every value of every distinct graph and cuts the parameters accordingly."""
    refusals: list[Refusal] = []
    constants = dict(program.constants)
    parts = {part.name: part for part in program.parts}
    graphs = {}
    for key, block in program.map_graphs(lambda _, given: given.copied()).graphs.items():
        users = [part for part in program.parts if part.graph == key]
        placer, refused = _place(block, users[0], program.tp)
        refusals += [replace(refusal, graph=key) for refusal in refused]
        placer.apply()
        graphs[key] = replace(block, regions=tuple(placer.regions))
        constants |= {ref.fqn: data for ref, data in placer.tables.values()}
        tables = {name: ref for name, (ref, _) in placer.tables.items()}
        specs: dict[Any, ShardSpec] = {}
        parts |= {part.name: _bind(part, block.module.graph, tables, specs) for part in users}
    program = replace(program, graphs=graphs, parts=tuple(parts.values()), constants=constants)
    return PassResult(program, sum(len(part.shards) for part in program.parts), tuple(refusals))


def _place(block: BlockGraph, part: Part, tp: int) -> tuple[_Placer, list[Refusal]]:
    """Places a graph, giving up one region after the other until what is left can be placed."""
    regions, refused = list(block.regions), []
    while True:
        assignments = {region.name: part.assignments[region.name] for region in regions}
        placer = _Placer(block.module.graph, regions, frozenset(part.params), assignments)
        try:
            placer.run()
        except _RegionRefusedError as why:
            refused.append(Refusal(why.region, why.reason, why.node))
            regions = [region for region in regions if region.name != why.region]
        else:
            return placer, refused


def _bind(
    part: Part,
    graph: fx.Graph,
    tables: Mapping[str, ParamRef],
    specs: dict[Any, ShardSpec],
) -> Part:
    """The part with its index tables, and every split placeholder's shards.

    Args:
        specs: the splits made so far; parts that assign their units alike share them.
    """
    shards = {}
    for node in graph.find_nodes(op="placeholder"):
        placement = node.meta["placement"]
        if isinstance(placement, Shard):
            assignment = part.assignments[placement.layout.region]
            key = (node.name, assignment)
            if key not in specs:
                specs[key] = shard_spec(placement.layout, placement.dim, assignment)
            shards[node.name] = specs[key]
    return replace(part, params={**part.params, **tables}, shards=shards)


@dataclass
class _Placer:
    """One attempt at placing a graph; nothing is changed before `apply`.

    Args:
        tables: index tables that `apply` adds: placeholder -> its reference and data.
    """

    graph: fx.Graph
    regions: list[Region]
    params: frozenset[str]
    assignments: Mapping[str, Assignment]
    placements: dict[fx.Node, Any] = field(default_factory=dict)
    cuts: dict[fx.Node, dict[fx.Node, Shard]] = field(default_factory=dict)
    tables: dict[str, tuple[ParamRef, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_rank = {name: max(map(len, units)) for name, units in self.assignments.items()}
        self.resize, self.sizes = Resize(per_rank), UnlikeSizes()
        self.heads = {r.name for r in self.regions if r.kind is RegionKind.HEAD}
        self.seeds: dict[str, Shard] = {}
        for region in self.regions:
            for name, layout in (*region.columns.items(), *region.rows.items()):
                self.seeds[name] = Shard(region.dims[name], layout)

    def run(self) -> None:
        """Decides the placement of every node.

        Raises:
            _RegionRefusedError: a split cannot be carried on.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.placements[node] = self.seeds.get(node.name, R)
            elif node.op == "call_function":
                self.placements[node] = self._decide(node)
            else:
                self._check_output(node)

    def _decide(self, node: fx.Node) -> Any:
        call = call_of(node, lambda arg: (self.placements[arg], None))
        biased = self._is_biased_row(node)
        if biased:
            call = replace(call, args=call.args[:2])
        answer = _ask(call)
        if answer is None and any(o.placement == P for o in call.operands()):
            summed = [R if o.placement == P else o.placement for o in call.operands()]
            call = call.with_placements(summed)
            answer = _ask(call)
        if answer is None:
            self._refuse(node, call)
        self._check_local(node, call, answer)
        tensors = tensor_args(node)
        for index, cut in answer.cuts.items():
            self.cuts.setdefault(tensors[index], {})[node] = cut
        # The bias of a row-split linear is added to the sum, once.
        return R if biased else answer.out

    def _is_biased_row(self, node: fx.Node) -> bool:
        if node.target is not aten.linear.default or len(node.args) < 3 or node.args[2] is None:
            return False
        return any(node.args[1].name in region.rows for region in self.regions)

    def _check_local(self, node: fx.Node, call: Call, answer: Placed) -> None:
        """A rank must be able to run a data movement on its share alone, at every size."""
        rule = RULES.get(node.target)
        split = any(isinstance(operand.placement, Shard) for operand in call.operands())
        if isinstance(rule, Movement) and split:
            sized = call_of(node, lambda arg: (self.placements[arg], None), self.sizes)
            if not keeps_layouts(sized, answer.out, answer.cuts):
                self._refuse(node, call, "mixes tokens into a split dim at")
            try:
                rule.localize(call, call.args, answer.out, self.resize)
            except UnevenLayoutError:
                self._refuse(node, call)

    def _refuse(self, node: fx.Node, call: Call, why: str = "has no placement rule for") -> None:
        given = " ".join(str(o.placement) for o in call.operands())
        for operand in call.operands():
            if isinstance(operand.placement, Shard):
                reason = f"{node.target} {why} {given} ({module_path(node)})"
                raise _RegionRefusedError(operand.placement.layout.region, reason, node.name)
        raise NoRuleError(
            f"{node.target} has no placement rule.",
            where=f"{node.name} ({module_path(node) or 'no module'})",
            found=f"operands placed {given}",
            needed=f"a row for {given}",
            fix="add it to the operator's family in passes/placement/",
        )

    def _check_output(self, node: fx.Node) -> None:
        for arg in node.args[0]:
            placement = self.placements[arg]
            if isinstance(placement, Shard) and placement.layout.region not in self.heads:
                region = placement.layout.region
                raise _RegionRefusedError(region, "its values leave the block", arg.name)

    def apply(self) -> None:
        """Writes the placements into the graph, frees biases, cuts and gathers."""
        for node in list(self.graph.nodes):
            node.meta["placement"] = self.placements.get(node, R)
        for source, readers in self.cuts.items():
            self._cut(source, readers)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and self._is_biased_row(node):
                _free_bias(node)
            elif node.op == "output":
                for arg in dict.fromkeys(node.args[0]):
                    if isinstance(arg.meta["placement"], Shard):
                        self._gather(arg, node)

    def _cut(self, source: fx.Node, readers: dict[fx.Node, Shard]) -> None:
        """Splits a parameter itself if all its readers want the same; else takes shares of it."""
        shards = list(readers.values())
        alike = all(shard == shards[0] for shard in shards)
        if source.name in self.params and alike and readers.keys() == source.users.keys():
            source.meta["placement"] = shards[0]
            return
        for reader, shard in readers.items():
            index = self._table(f"units_{shard.layout.region}_{len(shard.layout)}", shard.layout)
            args = (source, index, shard.dim, len(shard.layout))
            with self.graph.inserting_before(reader):
                share = add_call(self.graph, TAKE, args, source.meta, placement=shard)
            reader.replace_input_with(source, share)

    def _gather(self, shard: fx.Node, output: fx.Node) -> None:
        """The whole value before it leaves, without the entries that padding added."""
        placement = shard.meta["placement"]
        assignment = self.assignments[placement.layout.region]
        index = shard_spec(placement.layout, 0, assignment).index.reshape(-1)
        with self.graph.inserting_before(output):
            args = (shard, placement.dim)
            whole = add_call(self.graph, GATHER, args, shard.meta, placement=R)
        if len(index) > len(placement.layout):
            where = torch.from_numpy(np.argsort(index, kind="stable")[(index < 0).sum() :])
            table = self._add_table(f"gathered_{placement.layout.region}", where, R)
            with self.graph.inserting_before(output):
                args = (whole, placement.dim, table)
                whole = add_call(self.graph, _PICK, args, shard.meta, placement=R)
        output.replace_input_with(shard, whole)

    def _table(self, name: str, layout: Layout) -> fx.Node:
        """A placeholder that holds each rank's own indices of a split dim."""
        return self._add_table(name, torch.arange(len(layout)), Shard(0, layout))

    def _add_table(self, name: str, data: torch.Tensor, placement: Any) -> fx.Node:
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name == name:
                return node
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.meta = {"val": data.to("meta"), "placement": placement}
        self.tables[name] = ParamRef(name, tuple(data.shape), data.dtype, constant=True), data
        return node


def _ask(call: Call) -> Placed | None:
    """The rule's answer; an operator without a rule runs on whole values only."""
    rule = RULES.get(call.target)
    if rule is not None:
        return rule.place(call)
    return placed(R) if all(o.placement == R for o in call.operands()) else None


def _free_bias(node: fx.Node) -> None:
    """linear(x, W, b) with W split by rows becomes linear(x, W), a partial sum, plus b."""
    x, weight, bias = node.args
    with node.graph.inserting_before(node):
        product = add_call(node.graph, aten.linear.default, (x, weight), node.meta, placement=P)
        total = add_call(node.graph, aten.add.Tensor, (product, bias), node.meta, placement=R)
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)

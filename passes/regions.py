"""Finds which projections can be split together, and the units that must stay together.

Each output feature of a projection gets an id; the graph is run on the ids, and features that an
operator combines fall into one class (`channelflow`). The classes at each projection's input say
what may be split (`roles`). A region is a set of row-split projections that share classes, with
the projections that feed them; its classes, in order, are its units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from spdcompile.passes.base import (
    BlockGraph,
    PassResult,
    Program,
    Refusal,
    Region,
    RegionKind,
    add_call,
)
from spdcompile.passes.channelflow import head_of
from spdcompile.passes.layout import EVERY, Layout, UnevenLayoutError
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.roles import decide_roles, name_of

aten = torch.ops.aten
_FEWEST = 2  # units that make a region
_MIXES_TOKENS = (ATTENTION, aten.scaled_dot_product_attention.default, aten.softmax.int)


@dataclass(frozen=True, slots=True)
class FindRegions:
    """Finds the regions of every distinct graph.

    Args:
        tp: number of ranks that the units are for.
    """

    tp: int

    def __call__(self, program: Program) -> PassResult:
        """Fills in `BlockGraph.regions`; writes a mean that is to be summed over ranks as a sum."""
        refusals: list[Refusal] = []
        graphs = {}
        for key, block in program.map_graphs(lambda _, given: given.copied()).graphs.items():
            part = next(part for part in program.parts if part.graph == key)
            ends_program = part.outputs == (program.output,)
            finder = _Finder(block, frozenset(part.params), self.tp, ends_program)
            regions = finder.regions()
            if finder.uneven and self.tp > _FEWEST:
                # K/V heads that lie among the query heads cannot be shared; ranks beyond them idle.
                finder = _Finder(block, frozenset(part.params), _FEWEST, ends_program)
                regions = finder.regions()
            finder.write_sums()
            graphs[key] = replace(block, regions=regions)
            refusals += [replace(refusal, graph=key) for refusal in finder.refused]
        count = sum(len(block.regions) for block in graphs.values())
        return PassResult(replace(program, graphs=graphs), count, tuple(refusals))


@dataclass
class _Group:
    """Row projections that share classes, and the projections that feed them."""

    classes: set[int]
    rows: list[fx.Node]
    columns: list[fx.Node]


class _Finder:
    """Finds the regions of one graph."""

    def __init__(
        self, block: BlockGraph, params: frozenset[str], tp: int, ends_program: bool
    ) -> None:
        self.graph, self.tp, self.ends_program = block.module.graph, tp, ends_program
        self.roles = decide_roles(self.graph, params, tp, ends_program=ends_program)
        self.flow = self.roles.flow
        self.refused: list[Refusal] = []
        self.uneven = False

    def regions(self) -> tuple[Region, ...]:
        """The regions in graph order, with unique names."""
        found = [self._region(group) for group in self._groups()]
        if self.ends_program:
            found.append(self._head())
        names: dict[str, int] = {}
        named = []
        for region in filter(None, found):
            kind = region.kind.value
            names[kind] = names.get(kind, 0) + 1
            name = kind if names[kind] == 1 else f"{kind}_{names[kind]}"
            named.append(_rename(region, name))
        self._refuse_rest(named)
        return tuple(named)

    def write_sums(self) -> None:
        """Writes the means that are to be summed over ranks as sums."""
        for node in self.roles.choices.summed:
            if node.target is aten.mean.dim:
                _write_as_sum(node)

    def _groups(self) -> list[_Group]:
        """Connected sets of row projections and their producers."""
        groups: list[_Group] = []
        for node in self.roles.rows:
            classes = set(map(int, self.flow.class_of(self.flow.consumed[node])))
            shared = next((group for group in groups if group.classes & classes), None)
            if shared is None:
                groups.append(_Group(classes, [node], []))
            else:
                shared.rows.append(node)
        for node, ids in self.flow.produced.items():
            if node not in self.roles.choices.silent:
                classes = set(map(int, self.flow.class_of(ids)))
                for group in groups:
                    if classes & (group.classes | self._serving(group).keys()):
                        group.columns.append(node)
        return groups

    def _serving(self, group: _Group) -> dict[int, set[int]]:
        """Shared class -> the classes of the group that it serves."""
        servers, served = (self.flow.classes[ids] for ids in self.flow.served)
        found: dict[int, set[int]] = {}
        for server, one in zip(servers.tolist(), served.tolist(), strict=True):
            if one in group.classes:
                found.setdefault(server, set()).add(one)
        return found

    def _region(self, group: _Group) -> Region | None:
        flow = self.flow
        first = flow.class_of(flow.consumed[group.rows[0]])
        unit = {c: number for number, c in enumerate(dict.fromkeys(map(int, first)))}
        ids = {node: flow.produced[node] for node in group.columns}
        ids |= {node: flow.consumed[node] for node in group.rows}
        try:
            layouts, num_units = self._layouts(ids, unit, self._serving(group))
        except UnevenLayoutError as error:
            self.uneven = bool(self.roles.choices.shared)
            names = ", ".join(name_of(node) for node in (*group.columns, *group.rows))
            self.refused.append(Refusal(names, f"no even split by units: {error}"))
            return None
        return self._made(self._kind(unit), num_units, layouts, group.rows)

    def _made(
        self,
        kind: RegionKind,
        num_units: int,
        layouts: Mapping[fx.Node, Layout],
        rows: list[fx.Node],
    ) -> Region:
        columns, by_rows, dims = {}, {}, {}
        for node, layout in layouts.items():
            projection = self.flow.projections[node]
            split = by_rows if node in rows else columns
            dim = projection.in_dim if node in rows else projection.out_dim
            owners = np.tile(layout.owners, projection.times(dim))
            split[projection.weight.name] = replace(layout, owners=owners)
            dims[projection.weight.name] = dim
        linears = tuple(node.name for node in self.graph.nodes if node in layouts)
        return Region("", kind, num_units, columns, by_rows, dims, linears)

    def _layouts(
        self, ids: Mapping[fx.Node, Tensor], unit: dict[int, int], serving: dict[int, set[int]]
    ) -> tuple[dict[fx.Node, Layout], int]:
        """Layouts of the features, but for those that every rank holds, and the number of units.

        Raises:
            UnevenLayoutError: no units make the layouts even, shares are irregular, or a
                projection gives features of no unit beside those of units.
        """
        sets = {c: {unit[one] for one in ones} for c, ones in serving.items()}
        copies = {len(units) for units in sets.values() if len(units) < len(unit)}
        if len(copies) > 1:
            raise UnevenLayoutError("shared features that serve differently many units")
        copy = copies.pop() if copies else 1
        code = dict(unit)
        for c, units in sets.items():
            code[c] = EVERY if len(units) == len(unit) else len(unit) + _group(units, copy)
            if code[c] != EVERY and c in self.roles.whole:
                raise UnevenLayoutError(f"shared features: {self.roles.whole[c]}")
        owners = {}
        for node, found in ids.items():
            classes = [int(c) for c in self.flow.class_of(found)]
            # What every rank holds is whole, and whatever else the projection gives may be too.
            if any(code.get(c, EVERY) != EVERY for c in classes):
                if not code.keys() >= set(classes):
                    raise UnevenLayoutError(f"{name_of(node)} gives features of no unit too")
                owners[node] = np.array([code[c] for c in classes], dtype=np.int64)
        return _coarsened(owners, len(unit), copy, self.tp)

    def _kind(self, classes: Mapping[int, int]) -> RegionKind:
        for node, ids in self.flow.touched.items():
            if node.target in _MIXES_TOKENS and classes.keys() & set(self.flow.class_of(ids)):
                return RegionKind.ATTENTION
        return RegionKind.MLP

    def _head(self) -> Region | None:
        """A linear whose features are the program's result, each by itself: the vocabulary."""
        if self.flow.outputs == [None]:
            return None
        node = head_of(self.flow)
        if node is None:
            self.refused.append(Refusal("head", "the logits are not one linear's features"))
            return None
        size = len(self.flow.produced[node])
        return self._made(RegionKind.HEAD, size, {node: Layout("", size, np.arange(size))}, [])

    def _refuse_rest(self, regions: list[Region]) -> None:
        """Says why the remaining projections stay replicated."""
        taken = {name for region in regions for name in region.linears}
        refused = {name for refusal in self.refused for name in refusal.subject.split(", ")}
        for node, ids in self.flow.produced.items():
            if node.name not in taken and name_of(node) not in refused:
                self.refused.append(Refusal(name_of(node), self._reason(ids), node.name))

    def _reason(self, ids: Tensor) -> str:
        flow, whole = self.flow, self.roles.whole
        if set(ids.tolist()) & self.roles.choices.shared:
            return "all units read its output"
        classes = [int(c) for c in flow.class_of(ids)]
        reason = next((whole[c] for c in classes if c in whole), "nothing splits its output")
        return f"its channels form one unit; {reason}" if len(set(classes)) == 1 else reason


def _group(units: set[int], copies: int) -> int:
    """The number of a group of consecutive units.

    Raises:
        UnevenLayoutError: the units are not the next `copies` ones of a multiple.
    """
    first = min(units)
    if units != set(range(first, first + copies)) or first % copies:
        raise UnevenLayoutError(f"shared features that serve the units {sorted(units)}")
    return first // copies


def _coarsened(
    owners: dict[fx.Node, np.ndarray], num_units: int, copies: int, tp: int
) -> tuple[dict[fx.Node, Layout], int]:
    """The layouts over the finest units, each of so many consecutive ones, that make all even.

    Units that share K/V heads are made as coarse as `tp` allows, lest a rank hold a head twice.

    Raises:
        UnevenLayoutError: no units do.
    """
    factors = [m for m in range(1, num_units // 2 + 1) if num_units % m == 0]
    if copies > 1:
        enough = [m for m in factors if copies % m == 0 and num_units // m >= tp]
        # Fewest query heads on a rank, then fewest copies of a K/V head.
        factors = sorted(enough or [1], key=lambda m: (-(-num_units // m // tp) * m, -m))
    why = UnevenLayoutError("a single unit")
    for factor in factors:
        count, shared = num_units // factor, max(1, copies // factor)
        units, groups = np.arange(num_units) // factor, np.arange(num_units // copies) + count
        lookup = np.concatenate([units, groups, [EVERY]])
        coarse = {node: lookup[codes] for node, codes in owners.items()}
        try:
            layouts = {n: Layout("", count, codes, shared) for n, codes in coarse.items()}
        except UnevenLayoutError as uneven:
            why = uneven
        else:
            return layouts, count
    raise why


def _write_as_sum(node: fx.Node) -> None:
    """mean(x, dims, keepdim) as a sum over a number, which a sum over the ranks completes."""
    shape, dims = node.args[0].meta["val"].shape, node.args[1]
    size = math.prod(shape[dim] for dim in dims)
    with node.graph.inserting_before(node):
        total = add_call(node.graph, aten.sum.dim_IntList, node.args, node.meta)
        mean = add_call(node.graph, aten.div.Scalar, (total, size), node.meta)
    node.replace_all_uses_with(mean)
    node.graph.erase_node(node)


def _rename(region: Region, name: str) -> Region:
    columns = {key: replace(layout, region=name) for key, layout in region.columns.items()}
    rows = {key: replace(layout, region=name) for key, layout in region.rows.items()}
    return replace(region, name=name, columns=columns, rows=rows)

"""Finds which linears can be split together, and the units that must stay together.

Each output feature of a linear gets an id; the graph is run on the ids, and features that an
operator combines fall into one class. At the next linear the classes say what may be split: with
two or more classes it can be split by rows, and the linears that its features come from by columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from spdcompile.passes.base import (
    BlockGraph,
    PassResult,
    Program,
    Refusal,
    Region,
    RegionKind,
    module_path,
)
from spdcompile.passes.channelflow import Flow, follow_channels
from spdcompile.passes.layout import Layout, UnevenLayoutError
from spdcompile.passes.ops import ATTENTION

aten = torch.ops.aten
_MIXES_TOKENS = (ATTENTION, aten.scaled_dot_product_attention.default, aten.softmax.int)


def find_regions(program: Program) -> PassResult:
    """Finds the regions of every distinct graph."""
    refusals: list[Refusal] = []
    graphs = {}
    for key, block in program.graphs.items():
        part = next(part for part in program.parts if part.graph == key)
        finder = _Finder(block, frozenset(part.params), part.outputs == (program.output,))
        graphs[key] = replace(block, regions=finder.regions())
        refusals += [replace(refusal, node=f"{key}: {refusal.node}") for refusal in finder.refused]
    count = sum(len(block.regions) for block in graphs.values())
    return PassResult(replace(program, graphs=graphs), count, tuple(refusals))


@dataclass
class _Group:
    """Row linears that share classes, and the linears that feed them."""

    rows: list[fx.Node]
    columns: list[fx.Node]


class _Finder:
    """Finds the regions of one graph."""

    def __init__(self, block: BlockGraph, params: frozenset[str], ends_program: bool) -> None:
        self.graph = block.module.graph
        self.ends_program = ends_program
        self.flow: Flow = follow_channels(self.graph, params)
        self.refused: list[Refusal] = []
        self.whole = self._needed_whole()

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

    def _needed_whole(self) -> dict[int, str]:
        """Classes that some reader needs whole -> why."""
        flow = self.flow
        whole = {int(c): reason for seen, reason in flow.opaque for c in set(flow.class_of(seen))}
        for ids in flow.outputs:
            if ids is not None:
                whole.update(dict.fromkeys(map(int, flow.class_of(ids)), "the block's output"))
        before = -1
        while len(whole) != before:
            before = len(whole)
            for node, ids in flow.consumed.items():
                if not self._splits(node, whole):
                    reason = f"{_name(node)} reads them whole"
                    for c in set(flow.class_of(ids)):
                        whole.setdefault(int(c), reason)
        return whole

    def _splits(self, node: fx.Node, whole: dict[int, str]) -> bool:
        """Whether a linear's input features fall into two classes or more, all of them free."""
        ids = self.flow.consumed[node]
        classes = set(self.flow.class_of(ids))
        return bool((ids >= 0).all()) and len(classes) >= 2 and not classes & whole.keys()

    def _groups(self) -> list[_Group]:
        """Connected sets of row linears and their producers."""
        groups: list[tuple[set[int], _Group]] = []
        for node in self.flow.consumed:
            if not self._splits(node, self.whole):
                continue
            classes = set(map(int, self.flow.class_of(self.flow.consumed[node])))
            shared = next((group for known, group in groups if known & classes), None)
            if shared is None:
                groups.append((classes, _Group([node], [])))
            else:
                shared.rows.append(node)
        for node, ids in self.flow.produced.items():
            classes = set(map(int, self.flow.class_of(ids)))
            for known, group in groups:
                if classes & known:
                    group.columns.append(node)
        return [group for _, group in groups]

    def _region(self, group: _Group) -> Region | None:
        flow = self.flow
        first = flow.class_of(flow.consumed[group.rows[0]])
        order = list(dict.fromkeys(map(int, first)))
        unit = {c: number for number, c in enumerate(order)}
        try:
            columns = {
                node.args[1].name: self._layout(flow.produced[node], unit) for node in group.columns
            }
            rows = {
                node.args[1].name: self._layout(flow.consumed[node], unit) for node in group.rows
            }
        except (UnevenLayoutError, KeyError) as error:
            names = ", ".join(_name(node) for node in group.columns)
            self.refused.append(Refusal(names, f"no even split by units: {error}"))
            return None
        linears = [n.name for n in self.graph.nodes if n in {*group.columns, *group.rows}]
        return Region("", self._kind(unit), len(unit), columns, rows, tuple(linears))

    def _layout(self, ids: torch.Tensor, unit: dict[int, int]) -> Layout:
        owners = np.array([unit[int(c)] for c in self.flow.class_of(ids)], dtype=np.int64)
        return Layout("", len(unit), owners)

    def _kind(self, classes: dict[int, int]) -> RegionKind:
        for node, ids in self.flow.touched.items():
            if node.target in _MIXES_TOKENS and classes.keys() & set(self.flow.class_of(ids)):
                return RegionKind.ATTENTION
        return RegionKind.MLP

    def _head(self) -> Region | None:
        """A linear whose features are the program's result, each by itself: the vocabulary."""
        (ids,) = self.flow.outputs
        if ids is None:
            return None
        for node, produced in self.flow.produced.items():
            classes = self.flow.class_of(produced)
            last = self.flow.class_of(ids)
            if len(set(classes)) == len(classes) and np.array_equal(classes, last):
                layout = Layout("", len(classes), np.arange(len(classes)))
                columns = {node.args[1].name: layout}
                return Region("", RegionKind.HEAD, len(classes), columns, {}, (node.name,))
        self.refused.append(Refusal("head", "the logits are not one linear's features"))
        return None

    def _refuse_rest(self, regions: list[Region]) -> None:
        """Says why the remaining linears stay replicated."""
        taken = {name for region in regions for name in region.linears}
        refused = {name for refusal in self.refused for name in refusal.subject.split(", ")}
        for node, ids in self.flow.produced.items():
            if node.name not in taken and _name(node) not in refused:
                classes = self.flow.class_of(ids)
                reasons = [self.whole[c] for c in map(int, classes) if c in self.whole]
                reason = reasons[0] if reasons else "nothing splits its output"
                if len(set(classes)) == 1:
                    reason = f"its channels form one unit; {reason}"
                self.refused.append(Refusal(_name(node), reason, node.name))


def _rename(region: Region, name: str) -> Region:
    columns = {key: replace(layout, region=name) for key, layout in region.columns.items()}
    rows = {key: replace(layout, region=name) for key, layout in region.rows.items()}
    return replace(region, name=name, columns=columns, rows=rows)


def _name(node: fx.Node) -> str:
    return module_path(node) or node.name

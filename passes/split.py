"""Cuts a program into the prelude, one part a decoder block, and the postlude.

Blocks of equal structure share one graph, so that every later pass, and the compilation, runs once
for each distinct block and not once for each layer.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import BlockGraph, ParamRef, Part, PassResult, Program, add_call

aten = torch.ops.aten


def split(program: Program) -> PassResult:
    """Splits a program of one part along the model's list of decoder layers."""
    (whole,) = program.parts
    graph = program.graphs[whole.graph].module.graph
    place = _places(graph, f"model.{program.layers}.")
    last = max(place.values())
    escapes = _escapes(graph, place)
    builders = [
        _PartBuilder(program, whole, index, last, place, escapes) for index in range(last + 1)
    ]
    for node in graph.nodes:
        if node.op == "call_function" and not _is_size(node):
            builders[place[node]].copy(node)
    (result,) = next(node for node in graph.nodes if node.op == "output").args[0]
    graphs: dict[str, BlockGraph] = {}
    keys: dict[Any, str] = {}
    parts = []
    for builder in builders:
        part, module = builder.finish(result)
        key = _structure(module.graph)
        if key not in keys:
            keys[key] = _free_name(part.graph, graphs)
            graphs[keys[key]] = BlockGraph(module)
        parts.append(replace(part, graph=keys[key]))
    program = replace(program, graphs=graphs, parts=tuple(parts))
    return PassResult(program, rewrites=len(parts))


def _places(graph: fx.Graph, prefix: str) -> dict[fx.Node, int]:
    """Part of each node: 0 the prelude, i + 1 block i, the highest the postlude."""
    layer_of = {node: _layer(node, prefix) for node in graph.nodes}
    layered = [node for node in graph.nodes if layer_of[node] is not None]
    count = max(layer_of[node] for node in layered) + 1
    after = False
    place: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inherited = max((place.get(arg, 0) for arg in node.all_input_nodes), default=0)
        if layer_of[node] is not None:
            place[node] = max(layer_of[node] + 1, inherited)
        else:
            place[node] = count + 1 if after else inherited
        after = after or node is layered[-1]
    return place


def _layer(node: fx.Node, prefix: str) -> int | None:
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if path.startswith(prefix):
            return int(path.removeprefix(prefix).split(".")[0])
    return None


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def _escapes(graph: fx.Graph, place: dict[fx.Node, int]) -> dict[int, list[fx.Node]]:
    """The tensors of each part that a later part reads, in graph order."""
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and not _is_size(node):
            readers = {place[user] for user in node.users if user in place}
            if readers - {place[node]} or any(user.op == "output" for user in node.users):
                found[place[node]].append(node)
    return found


def _free_name(base: str, taken: dict[str, BlockGraph]) -> str:
    number = 2
    name = base
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _structure(graph: fx.Graph) -> tuple[Any, ...]:
    """What two graphs must have in common to be one."""

    def form(node: fx.Node) -> tuple[Any, ...]:
        value = node.meta.get("val")
        shape = (str(value.shape), value.dtype) if isinstance(value, torch.Tensor) else ()
        return node.op, node.name, str(node.target), str(node.args), str(node.kwargs), shape

    return tuple(form(node) for node in graph.nodes)


@dataclass
class _PartBuilder:
    """Builds the graph of one part; names depend only on what the part holds."""

    program: Program
    whole: Part
    index: int
    last: int
    place: dict[fx.Node, int]
    escapes: dict[int, list[fx.Node]]
    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    params: dict[str, ParamRef] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Inputs come before anything else, so that sizes can be read off them.
        for node in self.place:
            if self.place[node] == self.index:
                for arg in node.all_input_nodes:
                    if arg not in self.env and not _is_size(arg) and self._outside(arg):
                        self._add_placeholder(arg)

    def copy(self, node: fx.Node) -> None:
        """Copies one node of the part."""
        args = fx.map_arg(node.args, self._resolve)
        kwargs = fx.map_arg(node.kwargs, self._resolve)
        self.env[node] = self._create(node, args, kwargs)

    def finish(self, result: fx.Node) -> tuple[Part, fx.GraphModule]:
        """The part and its graph."""
        outputs = self.escapes[self.index]
        self.graph.output(tuple(self.env[node] for node in outputs))
        names = tuple(self.program.output if n is result else n.name for n in outputs)
        layer = self.index - 1 if 0 < self.index < self.last else None
        name = {0: "prelude", self.last: "postlude"}.get(self.index, f"layers.{layer}")
        part = Part(
            name=name,
            layer=layer,
            graph="block" if layer is not None else name,
            params=self.params,
            inputs=self.inputs,
            outputs=names,
            module="" if layer is None else f"{self.program.layers}.{layer}",
        )
        return part, fx.GraphModule({}, self.graph)

    def _outside(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or self.place[node] != self.index

    def _resolve(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            self.env[node] = self._size(node)
        return self.env[node]

    def _create(self, like: fx.Node, args: Any, kwargs: Any = None) -> fx.Node:
        return add_call(self.graph, like.target, args, like.meta, kwargs)

    def _add_placeholder(self, node: fx.Node) -> None:
        ref = self.whole.params.get(node.name)
        if ref is not None:
            prefix = f"{self.program.layers}.{self.index - 1}."
            name = ref.fqn.removeprefix(prefix).replace(".", "_")
        else:
            # A value that one part alone reads gets a name that does not tell where it comes from.
            readers = {self.place[user] for user in node.users if user in self.place}
            shared = node.op == "placeholder" or len(readers) > 1
            name = node.name if shared else f"hidden_{len(self.inputs)}"
        new = self.graph.placeholder(name)
        new.meta = {"val": node.meta["val"]}
        self.env[node] = new
        if ref is not None:
            self.params[new.name] = ref
        else:
            self.inputs[new.name] = node.name

    def _size(self, node: fx.Node) -> fx.Node:
        """A size, computed anew from this part's own inputs: a part takes tensors only."""
        if node.target is not aten.sym_size.int:
            return self._create(node, fx.map_arg(node.args, self._resolve))
        wanted = node.meta["val"].node.expr
        sizes = [
            (size, placeholder, dim)
            for placeholder in self.graph.find_nodes(op="placeholder")
            if placeholder.name in self.inputs
            for dim, size in enumerate(placeholder.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        ]
        for size, placeholder, dim in sizes:
            if size.node.expr == wanted:
                return self._create(node, (placeholder, dim))
        for size, placeholder, dim in sizes:
            times = size.node.expr.coeff(wanted)  # the model may read each token several times
            more = size.node.expr - times * wanted  # and put tokens of its own before them
            if times.is_Integer and times > 0 and more.is_Integer:
                return self._solved(node, (placeholder, dim, size), int(times), int(more))
        raise AssertionError(f"no input of part {self.index} has the size {wanted}")

    def _solved(
        self, node: fx.Node, source: tuple[fx.Node, int, torch.SymInt], times: int, more: int
    ) -> fx.Node:
        """The size of which a given one is a multiple and a constant more."""
        placeholder, dim, size = source
        found = add_call(self.graph, node.target, (placeholder, dim), {"val": size})
        if more:
            left = {"val": size - more} if times > 1 else node.meta
            found = add_call(self.graph, operator.sub, (found, more), left)
        if times > 1:
            found = add_call(self.graph, operator.floordiv, (found, times), node.meta)
        return found

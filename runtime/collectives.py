"""How a rank's graph exchanges tensors: what sync and gather nodes become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from spdcompile.passes.ops import GATHER, SYNC
from spdcompile.runtime._torch import OpOverload

_ATEN, _FUNCTIONAL = torch.ops.aten, torch.ops._c10d_functional
_ALL_REDUCE, _WAIT = _FUNCTIONAL.all_reduce.default, _FUNCTIONAL.wait_tensor.default
_SUM = _ATEN.sum.dim_IntList


class Collectives(Protocol):
    """Writes collectives of contiguous tensors into a graph."""

    @property
    def name(self) -> str:
        """What carries the tensors, for readers."""
        ...

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        """The sum over ranks."""
        ...

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        """[n, ...] -> [ranks * n, ...], in the order of the ranks."""
        ...

    def is_sum(self, node: fx.Node) -> bool:
        """Whether a node is one that `all_reduce` returns; there is one for each of its calls."""
        ...


@dataclass(frozen=True, slots=True)
class OfProcessGroup:
    """Through the group's own backend, such as gloo or NCCL.

    Args:
        group: name of the process group.
        ranks: number of ranks in it.
        backend: what it is called.
    """

    group: str
    ranks: int
    backend: str

    @property
    def name(self) -> str:
        return self.backend

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        return self._waited(graph, _ALL_REDUCE, partial, "sum", self.group)

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        gather = _FUNCTIONAL.all_gather_into_tensor.default
        return self._waited(graph, gather, shard, self.ranks, self.group)

    def is_sum(self, node: fx.Node) -> bool:
        return _is_wait(node) and node.all_input_nodes[0].target is _ALL_REDUCE

    def _waited(self, graph: fx.Graph, op: OpOverload, *args: fx.node.Argument) -> fx.Node:
        return graph.call_function(_WAIT, (graph.call_function(op, args),))


@dataclass(frozen=True, slots=True)
class OfGatheredParts(OfProcessGroup):
    """Through the group's own backend; each rank gathers all partial sums and adds them itself.

    For two ranks that is as many bytes as a sum over the group, and half as many messages one
    after the other.
    """

    @property
    def name(self) -> str:
        return f"{self.backend}, gathered"

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        part = graph.call_function(_ATEN.unsqueeze.default, (partial, 0))
        return graph.call_function(_SUM, (self.all_gather(graph, part), [0]))

    def is_sum(self, node: fx.Node) -> bool:
        return node.target is _SUM and _is_wait(node.all_input_nodes[0])


@dataclass(frozen=True, slots=True)
class OfDirect:
    """By operators of this package (direct.py); what they need is open by now.

    Args:
        namespace: of the operators.
        name: what carries the tensors, for readers.
        group: name of the process group.
        ranks: number of ranks in it.
    """

    namespace: str
    name: str
    group: str
    ranks: int

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        return graph.call_function(self._operator("all_reduce"), (partial, self.group))

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        args = (shard, self.group, self.ranks)
        return graph.call_function(self._operator("all_gather"), args)

    def is_sum(self, node: fx.Node) -> bool:
        return node.target is self._operator("all_reduce")

    def _operator(self, name: str) -> OpOverload:
        return getattr(getattr(torch.ops, self.namespace), name).default


def _is_wait(node: fx.Node) -> bool:
    return node.target is _WAIT


def lower_collectives(module: fx.GraphModule, collectives: Collectives) -> int:
    """Replaces the sync and gather nodes of a graph by collectives.

    Returns: the all-reduces that are in it then.
    """
    graph = module.graph
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is SYNC:
                partial = graph.call_function(_ATEN.contiguous.default, (node.args[0],))
                result = collectives.all_reduce(graph, partial)
            elif node.target is GATHER:
                result = _all_gather(graph, *node.args, collectives)
            else:
                continue
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()
    return sum(collectives.is_sum(node) for node in graph.nodes)


def _all_gather(graph: fx.Graph, shard: fx.Node, dim: int, collectives: Collectives) -> fx.Node:
    """Gathers along dim 0, where the collective joins the ranks' shards, and moves it back."""
    front = graph.call_function(_ATEN.movedim.int, (shard, dim, 0))
    front = graph.call_function(_ATEN.contiguous.default, (front,))
    whole = collectives.all_gather(graph, front)
    back = graph.call_function(_ATEN.movedim.int, (whole, 0, dim))
    return graph.call_function(_ATEN.contiguous.default, (back,))

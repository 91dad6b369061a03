"""How a rank's graph exchanges tensors: what sync and gather nodes become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from spdcompile.passes.ops import GATHER, SYNC
from spdcompile.runtime._torch import OpOverload

_ATEN, _FUNCTIONAL = torch.ops.aten, torch.ops._c10d_functional


class Collectives(Protocol):
    """Writes collectives of contiguous tensors into a graph."""

    @property
    def sum_operator(self) -> OpOverload:
        """Of which there is one for each all-reduce."""
        ...

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        """The sum over ranks."""
        ...

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        """[n, ...] -> [ranks * n, ...], in the order of the ranks."""
        ...


@dataclass(frozen=True, slots=True)
class OfProcessGroup:
    """Through the group's own backend, such as gloo or NCCL.

    Args:
        group: name of the process group.
        ranks: number of ranks in it.
    """

    group: str
    ranks: int
    sum_operator = _FUNCTIONAL.all_reduce.default

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        return self._waited(graph, self.sum_operator, partial, "sum", self.group)

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        gather = _FUNCTIONAL.all_gather_into_tensor.default
        return self._waited(graph, gather, shard, self.ranks, self.group)

    def _waited(self, graph: fx.Graph, op: OpOverload, *args: fx.node.Argument) -> fx.Node:
        return graph.call_function(
            _FUNCTIONAL.wait_tensor.default, (graph.call_function(op, args),)
        )


@dataclass(frozen=True, slots=True)
class OfSharedMemory:
    """Through memory that the ranks of one host share (shared_memory.py), which is open by now."""

    group: str
    ranks: int

    @property
    def sum_operator(self) -> OpOverload:
        return torch.ops.spd_shared_memory.all_reduce.default

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        return graph.call_function(self.sum_operator, (partial, self.group))

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        gather = torch.ops.spd_shared_memory.all_gather.default
        return graph.call_function(gather, (shard, self.group, self.ranks))


def lower_collectives(module: fx.GraphModule, collectives: Collectives) -> None:
    """Replaces the sync and gather nodes of a graph by collectives."""
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


def _all_gather(graph: fx.Graph, shard: fx.Node, dim: int, collectives: Collectives) -> fx.Node:
    """Gathers along dim 0, where the collective joins the ranks' shards, and moves it back."""
    front = graph.call_function(_ATEN.movedim.int, (shard, dim, 0))
    front = graph.call_function(_ATEN.contiguous.default, (front,))
    whole = collectives.all_gather(graph, front)
    back = graph.call_function(_ATEN.movedim.int, (whole, 0, dim))
    return graph.call_function(_ATEN.contiguous.default, (back,))

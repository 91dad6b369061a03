"""One rank a process: sync points become collectives of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.passes.ops import GATHER, SYNC
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.executor import Backend, Executor, Function, on_device
from spdcompile.runtime.job import Ranks
from spdcompile.runtime.weights import bind

_COLLECTIVES = torch.ops._c10d_functional
ALL_REDUCE = _COLLECTIVES.all_reduce.default


class DistributedExecutor(Executor):
    """Runs this rank of a program; every rank of the group must call it alike.

    Args:
        ranks: whose group has `program.tp` ranks.
    """

    stacks_ranks = False

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        *,
        backend: Backend,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.ranks, self.group = ranks, ranks.group
        super().__init__(program, tensors, backend=backend, device=device)

    def run(
        self, inputs: Mapping[str, Tensor], cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        with self.ranks.watch.call(f"program {self.digest} on {sizes}"):
            return super().run(inputs, cache, last)

    def call(
        self, part: Part, env: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        self.ranks.watch.at(f"in {part.name}")
        return super().call(part, env, params)

    def _prepare(self) -> None:
        super()._prepare()
        emitted = [
            f"{part.name} {self._emitted[self.program.graph_of(part).module]}"
            for part in self.program.parts
        ]
        self.digest = hashlib.sha256("\n".join(emitted).encode()).hexdigest()[:8]

    def _bind(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bind(self.program, part, tensors, self.device, dist.get_rank(self.group))

    def _build(self, part: Part, module: fx.GraphModule) -> tuple[Function, int]:
        lowered = on_device(module, self.device)
        lower_collectives(lowered, self.group.group_name, self.program.tp)
        return self._compile(lowered, lowered.code), count_sync_nodes(lowered, ALL_REDUCE)


def lower_collectives(module: fx.GraphModule, group: str, tp: int) -> None:
    """Replaces sync and gather nodes by functional collectives, each with its wait.

    Args:
        group: name of the process group.
        tp: number of ranks in it.
    """
    graph = module.graph
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is SYNC:
                result = _all_reduce(graph, node, group)
            elif node.target is GATHER:
                result = _all_gather(graph, node, group, tp)
            else:
                continue
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()


def _all_reduce(graph: fx.Graph, node: fx.Node, group: str) -> fx.Node:
    partial = graph.call_function(torch.ops.aten.contiguous.default, (node.args[0],))
    summed = graph.call_function(ALL_REDUCE, (partial, "sum", group))
    return graph.call_function(_COLLECTIVES.wait_tensor.default, (summed,))


def _all_gather(graph: fx.Graph, node: fx.Node, group: str, tp: int) -> fx.Node:
    """Gathers along dim 0, where the collective joins the ranks' shards, and moves it back."""
    shard, dim = node.args
    front = graph.call_function(torch.ops.aten.movedim.int, (shard, dim, 0))
    front = graph.call_function(torch.ops.aten.contiguous.default, (front,))
    gathered = graph.call_function(_COLLECTIVES.all_gather_into_tensor.default, (front, tp, group))
    whole = graph.call_function(_COLLECTIVES.wait_tensor.default, (gathered,))
    back = graph.call_function(torch.ops.aten.movedim.int, (whole, 0, dim))
    return graph.call_function(torch.ops.aten.contiguous.default, (back,))

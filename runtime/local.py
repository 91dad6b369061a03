"""All ranks in one process: torch.vmap over the rank dimension.

Split parameters are stacked, [tp, ...], and a sync point sums over that dim, so vmap itself proves
that every output is the same on every rank. It is differentiable and runs under Inductor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement.types import P, Shard
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.runtime.executor import Executor, Function, on_device
from spdcompile.runtime.ops import VMAP_REPLACEMENTS
from spdcompile.runtime.weights import bind


class LocalExecutor(Executor):
    """Runs every rank of a program in this process."""

    def _bind(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bind(self.program, part, tensors, self.device)

    def _build(self, part: Part, module: fx.GraphModule) -> tuple[Function, int]:
        inputs = module.graph.find_nodes(op="placeholder")
        in_dims = tuple(_rank_dim(node) for node in inputs)
        out_dims = tuple(_rank_dim(node) for node in module.graph.output_node().args[0])
        lowered = _decomposed(on_device(module, self.device))
        mapped = lowered
        if any(dim is not None for dim in in_dims):
            mapped = torch.vmap(lowered, in_dims, out_dims)
        return self._compile(mapped), count_sync_nodes(lowered, SYNC)


def _rank_dim(node: fx.Node) -> int | None:
    """0 if the ranks' values of a node are stacked, None if they are all the same."""
    placement = node.meta["placement"]
    return 0 if placement == P or isinstance(placement, Shard) else None


def _size(tensor: Tensor, dim: int) -> int:
    """A size as Python sees it; vmap has no rule for the operator."""
    return tensor.shape[dim]


_REPLACEMENTS = {**VMAP_REPLACEMENTS, torch.ops.aten.sym_size.int: _size}


def _decomposed(module: fx.GraphModule) -> fx.GraphModule:
    """Replaces operators whose vmap rules would tie a compiled graph to one length."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _REPLACEMENTS:
            node.target = _REPLACEMENTS[node.target]
    module.recompile()
    return module

"""All ranks in one process: torch.vmap over the rank dimension.

Split parameters are stacked, [tp, ...], and a sync point sums over that dim, so vmap itself proves
that every output is the same on every rank. It is differentiable and runs under Inductor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from spdcompile.passes.base import Part
from spdcompile.passes.placement.types import R
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.runtime.convolution import CONVOLUTION_REPLACEMENTS
from spdcompile.runtime.executor import Built, Executor, input_names, on_device
from spdcompile.runtime.indexing import INDEXING_REPLACEMENTS
from spdcompile.runtime.ops import VMAP_REPLACEMENTS
from spdcompile.runtime.weights import Weights, bind


class LocalExecutor(Executor):
    """Runs every rank of a program in this process."""

    stacks_ranks = True

    def _bind(self, part: Part, tensors: Weights) -> dict[str, Tensor]:
        return bind(self.program, part, tensors, self.device)

    def _build(self, part: Part, module: fx.GraphModule) -> Built:
        inputs = module.graph.find_nodes(op="placeholder")
        in_dims = tuple(_rank_dim(node) for node in inputs)
        out_dims = tuple(_rank_dim(node) for node in module.graph.output_node().args[0])
        lowered = _decomposed(on_device(module, self.device))
        mapped = lowered
        if any(dim is not None for dim in in_dims):
            mapped = _calling(_Ranks(lowered, in_dims, out_dims), module)
        text = f"{lowered.code}\n{in_dims} {out_dims}"
        emitted = count_sync_nodes(lowered)
        return Built(self._compile(mapped, text), input_names(module), emitted)


class _Ranks(nn.Module):
    """All ranks' run of a graph.

    Args:
        in_dims: per input, 0 if the ranks' values are stacked, None if all ranks share it.
        out_dims: the same for the outputs; vmap raises if a shared one differs by rank.
    """

    def __init__(
        self, module: fx.GraphModule, in_dims: tuple[int | None, ...], out_dims: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.module, self.in_dims, self.out_dims = module, in_dims, out_dims

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(self.module, self.in_dims, self.out_dims)(*inputs)


def _calling(ranks: _Ranks, like: fx.GraphModule) -> fx.GraphModule:
    """A graph that only calls `ranks` with the inputs of `like`.

    torch.compile keeps its programs by code object; a graph module has one of its own.
    """
    graph = fx.Graph()
    inputs = like.graph.find_nodes(op="placeholder")
    args = tuple(graph.placeholder(node.name) for node in inputs)
    graph.output(graph.call_module("ranks", args))
    return fx.GraphModule({"ranks": ranks}, graph)


def _rank_dim(node: fx.Node) -> int | None:
    """0 if the ranks' values of a node are stacked, None if they are all the same."""
    return None if node.meta["placement"] == R else 0


def _size(tensor: Tensor, dim: int) -> int:
    """A size as Python sees it; vmap has no rule for the operator."""
    return tensor.shape[dim]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear by other operators: vmap's rule for a bias ties a compiled graph to one length, and
    that of torch 2.11 without one does too."""
    product = torch.einsum("...k,nk->...n", x, weight)
    return product if bias is None else product + bias


_REPLACEMENTS = {
    **VMAP_REPLACEMENTS,
    **INDEXING_REPLACEMENTS,
    **CONVOLUTION_REPLACEMENTS,
    torch.ops.aten.sym_size.int: _size,
    torch.ops.aten.linear.default: _linear,
}


def _decomposed(module: fx.GraphModule) -> fx.GraphModule:
    """Replaces operators whose vmap rules would tie a compiled graph to one length."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _REPLACEMENTS:
            node.target = _REPLACEMENTS[node.target]
    module.recompile()
    return module

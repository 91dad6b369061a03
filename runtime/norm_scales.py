"""Norm weights of each rank's own, for as long as a segment is trained.

Where a sync point is dropped each rank norms another value, R + P_i, so a norm weight of its own
may help. Only split linears read what the norm gives, and each of their output features is on one
rank: W_i norm(x, w_i) = (W_i diag(w_i / w)) norm(x, w). So the weights are trained as scales of the
columns of W_i and multiplied into them in the end: what is stored is an ordinary checkpoint.
It follows that they change how training goes, and not what can be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.runtime.segments import bound
from spdcompile.runtime.training import Tensors
from spdcompile.runtime.weights import unbind

_LINEAR = torch.ops.aten.linear.default


class NormScales:
    """The scales of some parts.

    Args:
        program: the parts', with what is dropped.
    """

    def __init__(self, program: Program, parts: Sequence[Part]) -> None:
        self._parts, self._tp = parts, program.tp
        self._weights = {
            f"{part.name}/{value}": (part, weights)
            for part in parts
            for value, weights in _readers(program, part).items()
        }

    def ones(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Where training begins: name -> [ranks, features].

        Args:
            tensors: those that are trained, under their state_dict names.
        """
        return {
            name: _like(part, weights, tensors).new_ones(self._tp, part.params[weights[0]].shape[1])
            for name, (part, weights) in self._weights.items()
            if all(part.params[weight].fqn in tensors for weight in weights)
        }

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """As `segments.bound`, with the scales that are among the tensors multiplied in."""
        params = bound(self._parts, tensors)
        for name, (part, weights) in self._weights.items():
            if name in tensors:
                scale = tensors[name].unsqueeze(1)
                params[part.name] |= {w: params[part.name][w] * scale for w in weights}
        return params

    def folded(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors under their state_dict names, with the scales multiplied in."""
        params = self.bound(tensors)
        scaled = dict(tensors)
        for name, (part, weights) in self._weights.items():
            if scaled.pop(name, None) is not None:
                scaled.update(unbind(part, {w: params[part.name][w] for w in weights}))
        return scaled


def _readers(program: Program, part: Part) -> dict[str, tuple[str, ...]]:
    """Value -> weights of the linears that read it, where they alone do, and each on one rank."""
    found: dict[str, tuple[str, ...]] = {}
    for node in program.graph_of(part).module.graph.nodes:
        readers = [user for user in node.users if user.target is _LINEAR and user.args[0] is node]
        weights = [reader.args[1] for reader in readers]
        if (
            weights
            and len(readers) == len(node.users)
            and all(isinstance(weight, fx.Node) and len(weight.users) == 1 for weight in weights)
            and all(_is_split(part, weight.name) for weight in weights)
        ):
            found[node.name] = tuple(weight.name for weight in weights)
    return found


def _is_split(part: Part, weight: str) -> bool:
    """Whether each output feature of a weight is on one rank."""
    spec = part.shards.get(weight)
    return spec is not None and spec.dim == 0 and not spec.repeated


def _like(part: Part, weights: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[part.params[weights[0]].fqn]

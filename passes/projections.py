"""Projections: products of a value with a parameter, in whichever way the graph writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from spdcompile.passes.ops import GROUPED_MM

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Projection:
    """A value times a parameter, contracted over the value's last dim.

    Args:
        value: what is projected, [..., in].
        weight: the parameter's placeholder: [out, in], or [experts, ...] before these two, or
            [experts * out, in] and the like.
        out_dim, in_dim: the dims of the placeholder that hold the output and input features.
        experts: how many experts the first of these dims holds one after the other, if it is 0.
    """

    value: fx.Node
    weight: fx.Node
    out_dim: int
    in_dim: int
    experts: int = 1

    def times(self, dim: int) -> int:
        """How many times a dim of the placeholder holds the features."""
        return self.experts if dim == 0 else 1


def projection_of(node: fx.Node, params: frozenset[str]) -> Projection | None:
    """The projection that a node computes; None if it is none."""
    if node.op != "call_function" or len(node.args) < 2:
        return None
    value, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not isinstance(weight.meta.get("val"), torch.Tensor):
        return None
    ndim = weight.meta["val"].dim()
    if node.target in _OUT_IN and ndim == 2:
        out_dim, in_dim = 0, 1
    elif node.target in _IN_OUT and ndim >= 2:
        out_dim, in_dim = ndim - 1, ndim - 2
    else:
        return None
    order, experts = list(range(ndim)), 1
    while weight.op == "call_function":
        step = _STEPS.get(weight.target)
        if step is None or not isinstance(weight.args[0], fx.Node):
            return None
        if step == "swap":
            i, j = _swapped(weight, len(weight.meta["val"].shape))
            order = [{i: j, j: i}.get(dim, dim) for dim in order]
        elif step == "unfold":
            if not _takes_out_experts(weight):
                return None
            experts, order = weight.meta["val"].shape[0], [dim - 1 for dim in order]
        elif step == "some" and not _keeps_some_experts(weight):
            return None
        weight = weight.args[0]
    found = Projection(value, weight, order[out_dim], order[in_dim], experts)
    return found if weight.name in params and min(found.out_dim, found.in_dim) >= 0 else None


def _takes_out_experts(node: fx.Node) -> bool:
    """Whether a reshape makes [experts * n, m] to [experts, n, m]."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(before) == 2 and len(after) == 3 and before[1] == after[2]


def _keeps_some_experts(node: fx.Node) -> bool:
    """Whether a slice is one of [experts, n, m] along the first dim."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return len(node.meta["val"].shape) == 3 and dim % 3 == 0


def _swapped(node: fx.Node, ndim: int) -> tuple[int, int]:
    """The two dims that a transposing node swaps."""
    if node.target is aten.transpose.int:
        return node.args[1] % ndim, node.args[2] % ndim
    return 0, 1


_OUT_IN = (aten.linear.default,)
_IN_OUT = (aten.matmul.default, aten.mm.default, aten.bmm.default, GROUPED_MM)
# What may lie between a parameter and its use: a swap of two dims, a change of dtype, experts
# taken out of the first dim, some of them.
_STEPS: Mapping[object, str] = {
    aten.transpose.int: "swap",
    aten.t.default: "swap",
    aten.numpy_T.default: "swap",
    aten.to.dtype: "keep",
    aten.contiguous.default: "keep",
    aten.reshape.default: "unfold",
    aten.slice.Tensor: "some",
}

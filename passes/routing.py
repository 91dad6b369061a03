"""Routing under dropped sync points: which operators choose, and what they may read.

A router that read a rank's own R + P would choose other experts than its neighbours, each of which
holds a slice of every expert: their partial sums would not belong together. So either such a drop
is refused, or the router reads R alone (`Router.REPLICATED`), an approximation of its own: what
chooses, and what weighs partial sums, is computed from the replicated part of every pending value.
All ranks then choose and weigh alike, while the experts themselves read R + P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from spdcompile.passes.base import add_call, module_path
from spdcompile.passes.linearity import is_size
from spdcompile.passes.placement.types import P
from spdcompile.passes.residual import ChoiceError, LeakError, Pending, Value

aten = torch.ops.aten
CHOOSES = (
    *(aten.topk.default, aten.kthvalue.default, aten.multinomial.default),
    *(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable),
    *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim),
)

NodeMap = Callable[[fx.Node], fx.Node]


class ReplicatedPart:
    """Evaluates values of an old graph from the replicated part R of whatever is pending.

    Args:
        new: the graph that the copies go into.
        env: old node -> its value in the new graph.
        varies: nodes of the new graph that differ between the ranks.
        whole: R of a pending value in its full shape; None where there is none.
        plain: an old node's value as the ranks see it.

    `projections` collects the modules of the linears that were copied: routers and gates.
    """

    def __init__(
        self,
        new: fx.Graph,
        env: Mapping[fx.Node, Value],
        varies: Mapping[fx.Node, str],
        whole: Callable[[Pending], fx.Node | None],
        plain: NodeMap,
    ) -> None:
        self.new, self.env, self.varies, self.whole, self.plain = new, env, varies, whole, plain
        self.known: dict[fx.Node, fx.Node] = {}
        self.projections: list[str] = []

    def of(self, node: fx.Node) -> fx.Node:
        """The value of an old node, the same on every rank; a copy only where it would differ.

        Raises:
            LeakError: a value that it is computed from is a partial sum alone.
        """
        if self.plain(node) not in self.varies:
            return self.plain(node)
        if node not in self.known:
            self.known[node] = self._evaluate(node)
        return self.known[node]

    def _evaluate(self, node: fx.Node) -> fx.Node:
        value = self.env[node]
        if isinstance(value, Pending):
            whole = self.whole(value)
            if whole is None:
                where = module_path(node) or node.name
                raise LeakError(f"{where} is a partial sum alone: no part of it is replicated")
            return whole
        if node.target is aten.linear.default:
            self.projections.append(module_path(node))
        args, kwargs = fx.map_arg(node.args, self.of), fx.map_arg(node.kwargs, self.of)
        return add_call(self.new, node.target, args, node.meta, kwargs)


def choice_error(node: fx.Node) -> ChoiceError:
    """The refusal of a drop that would make ranks choose differently."""
    return ChoiceError(
        f"{module_path(node)} chooses ({node.target}) by a value that would differ between the "
        "ranks, as the routing of a mixture of experts does; their partial sums would then belong "
        "to different experts. With router='replicated' it would choose by the part of the value "
        "that all ranks share, an approximation of its own"
    )


def weighs(node: fx.Node, arg: fx.Node) -> bool:
    """Whether `arg` is what a partial sum is multiplied by, or picked by."""
    if node.meta["placement"] != P or is_size(arg):
        return False
    placements = [a.meta.get("placement") for a in node.all_input_nodes]
    return P in placements and arg.meta.get("placement") != P

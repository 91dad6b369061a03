"""Follows channel ids through one graph: what meets what, from projection to projection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from spdcompile.passes.base import module_path
from spdcompile.passes.concrete import call_of, shape_at_one
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import R
from spdcompile.passes.projections import Projection, projection_of

aten = torch.ops.aten
# Reductions that a sum over the ranks can complete.
SUMMABLE = (aten.mean.dim, aten.sum.dim_IntList)


@dataclass(frozen=True, slots=True)
class Choices:
    """How a graph is followed.

    Args:
        silent: projections whose output is the same on all ranks, after a sum perhaps: it carries
            no channels.
        summed: reductions over channels that a sum over the ranks completes, so that they tie
            nothing together.
        shared: ids of channels that several units may read (`Channels`).
        head: the projection that makes the program's result; it reads its input whole.
    """

    silent: frozenset[fx.Node] = frozenset()
    summed: frozenset[fx.Node] = frozenset()
    shared: frozenset[int] = frozenset()
    head: fx.Node | None = None


@dataclass
class Flow:
    """What following the channels found out.

    Args:
        projections: node -> the projection that it computes.
        produced: projection -> ids of its output features, int64 [out].
        consumed: projection -> ids of its input features, int64 [in], -1 where none.
        reduced: reduction over channels -> the ids that it reduces.
        touched: node -> one id of each class of channels that it computes on.
        opaque: ids that meet an operator without a rule -> why that matters.
        outputs: ids of the graph's outputs.
        served: (shared id, id that it serves), int64 [2, n].
        hubs: ids that some operator hands to several others at once.
        shared: ids that were followed as shared.
    """

    projections: dict[fx.Node, Projection] = field(default_factory=dict)
    produced: dict[fx.Node, Tensor] = field(default_factory=dict)
    consumed: dict[fx.Node, Tensor] = field(default_factory=dict)
    reduced: dict[fx.Node, Tensor] = field(default_factory=dict)
    touched: dict[fx.Node, Tensor] = field(default_factory=dict)
    opaque: list[tuple[Tensor, str]] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    served: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), dtype=np.int64))
    hubs: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()

    def class_of(self, ids: Tensor) -> np.ndarray:
        """Class of each id that is one."""
        flat = ids.reshape(-1)
        return self.classes[flat[flat >= 0].numpy()]


def follow_channels(graph: fx.Graph, params: frozenset[str], choices: Choices) -> Flow:
    """Gives each output feature of each projection an id and runs the graph on the ids.

    A feature has the same id whatever the choices are.

    Args:
        params: names of the placeholders that are parameters.
    """
    flow, channels = Flow(shared=choices.shared), Channels(choices.shared)
    ids: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            ids[node] = _step(node, params, ids, channels, flow, choices)
        elif node.op == "output":
            flow.outputs = [ids.get(arg) for arg in node.args[0]]
    flow.classes, flow.served = channels.classes(), channels.served()
    flow.hubs = frozenset(channels.hubs)
    flow.opaque += channels.opaque
    return flow


def head_of(flow: Flow) -> fx.Node | None:
    """The projection whose features are the graph's only result, each by itself; None if none."""
    if len(flow.outputs) != 1 or flow.outputs[0] is None:
        return None
    last = flow.class_of(flow.outputs[0])
    for node, produced in flow.produced.items():
        classes = flow.class_of(produced)
        if len(set(classes)) == len(classes) and np.array_equal(classes, last):
            return node
    return None


def _step(
    node: fx.Node,
    params: frozenset[str],
    ids: dict[fx.Node, Any],
    channels: Channels,
    flow: Flow,
    choices: Choices,
) -> Any:
    """Ids of one node's result."""
    projection = projection_of(node, params)
    if projection is not None:
        given = ids.get(projection.value)
        if given is None or _only_along_last(given):
            out = _project(node, projection, given, channels, flow)
            if given is not None and node is choices.head:
                flow.opaque.append(
                    (flow.consumed.pop(node), f"{module_path(node)} reads them whole")
                )
            return None if node in choices.silent else out
    call = call_of(node, lambda arg: (R, ids.get(arg)))
    carried = [o.ids for o in call.operands() if isinstance(o.ids, Tensor)]
    rule = RULES.get(node.target)
    if rule is None:
        if carried:
            seen = torch.cat([c.reshape(-1) for c in carried])
            flow.opaque.append((seen, f"{node.target} ({module_path(node)}) has no placement rule"))
        return None
    if carried:
        flow.touched[node] = torch.cat([c.reshape(-1) for c in carried])
        if node.target in SUMMABLE:
            flow.reduced[node] = carried[0]
            if node in choices.summed:
                return None
    return rule.follow(call, channels)


def _only_along_last(ids: Tensor) -> bool:
    """Whether ids differ along the last dim alone, the one that a projection contracts."""
    return bool((ids == ids.reshape(-1, ids.shape[-1])[0]).all())


def _project(
    node: fx.Node, projection: Projection, given: Tensor | None, channels: Channels, flow: Flow
) -> Tensor:
    flow.projections[node] = projection
    if given is not None:
        flow.consumed[node] = given.reshape(-1, given.shape[-1])[0]
    features = projection.weight.meta["val"].shape[projection.out_dim]
    out = channels.fresh(features // projection.times(projection.out_dim))
    flow.produced[node] = out
    return out.expand(shape_at_one(node.meta["val"]))

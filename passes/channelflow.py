"""Follows channel ids through one graph: what meets what, from linear to linear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from spdcompile.passes.base import module_path
from spdcompile.passes.concrete import call_of
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import R

LINEAR = torch.ops.aten.linear.default


@dataclass
class Flow:
    """What following the channels found out.

    Args:
        produced: linear -> ids of its output features, int64 [out].
        consumed: linear -> ids of its input features, int64 [in], -1 where none.
        touched: node -> one id of each class of channels that it computes on.
        escaped: ids that leave the graph -> why that matters.
        outputs: ids of the graph's outputs.
    """

    produced: dict[fx.Node, Tensor] = field(default_factory=dict)
    consumed: dict[fx.Node, Tensor] = field(default_factory=dict)
    touched: dict[fx.Node, Tensor] = field(default_factory=dict)
    opaque: list[tuple[Tensor, str]] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def class_of(self, ids: Tensor) -> np.ndarray:
        """Class of each id that is one."""
        flat = ids.reshape(-1)
        return self.classes[flat[flat >= 0].numpy()]


def follow_channels(graph: fx.Graph, params: frozenset[str]) -> Flow:
    """Gives each output feature of each linear an id and runs the graph on the ids.

    Args:
        params: names of the placeholders that are parameters.
    """
    flow, channels = Flow(), Channels()
    ids: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            ids[node] = _step(node, params, ids, channels, flow)
        elif node.op == "output":
            flow.outputs = [ids.get(arg) for arg in node.args[0]]
    flow.classes = channels.classes()
    return flow


def _step(
    node: fx.Node, params: frozenset[str], ids: dict[fx.Node, Any], channels: Channels, flow: Flow
) -> Any:
    """Ids of one node's result."""
    if is_projection(node, params):
        given = ids.get(node.args[0])
        if given is None or given.numel() == given.shape[-1]:
            return _project(node, given, channels, flow)
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
    return rule.follow(call, channels)


def _project(node: fx.Node, given: Tensor | None, channels: Channels, flow: Flow) -> Tensor:
    if given is not None:
        flow.consumed[node] = given.reshape(-1)
    out = channels.fresh(node.args[1].meta["val"].shape[0])
    flow.produced[node] = out
    return out.view(*(1 for _ in node.meta["val"].shape[1:]), -1)


def is_projection(node: fx.Node, params: frozenset[str]) -> bool:
    """Whether a node is a linear whose weight is a parameter."""
    return node.target is LINEAR and node.args[1].name in params

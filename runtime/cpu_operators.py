"""Operators of our own that take the place of others on CPU (products.cpp, attention.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from spdcompile.log import Component, get_logger
from spdcompile.passes.ops import ATTEND_CACHED
from spdcompile.runtime.native import CannotBuildError, load_library

_LOG = get_logger(Component.RUNTIME)


def use_cpu_operators(module: fx.GraphModule) -> None:
    """Puts our operators into a graph, if there is a compiler to build them."""
    if not _are_built():
        return
    ours = {
        torch.ops.aten.linear.default: torch.ops.spd_cpu.linear.default,
        ATTEND_CACHED: torch.ops.spd_cpu.attend_cached.default,
    }
    for node in module.graph.nodes:
        node.target = ours.get(node.target, node.target)
    module.recompile()


def linear_on_cpu() -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies x [..., k] by a weight [n, k] on a rank."""
    return torch.ops.spd_cpu.linear.default if _are_built() else linear


@cache
def _are_built() -> bool:
    try:
        load_library()
    except CannotBuildError as error:
        _LOG.warning("Products and attention are left to torch: %s", error)
        return False
    torch.library.register_fake("spd_cpu::linear", _linear_fake)
    torch.library.register_fake("spd_cpu::attend_cached", _attend_fake)
    return True


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

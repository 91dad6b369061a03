"""Operators of our own that take the place of others on CPU (products.cpp, attention.cpp)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.nn.functional import linear

from spdcompile.log import Component, get_logger
from spdcompile.passes.ops import ATTEND_CACHED
from spdcompile.runtime.native import CannotBuildError, load_library

_LOG = get_logger(Component.RUNTIME)
_ROWS, _SIZE = 128, 1024  # of a product that is timed both ways
_ROUNDS = 5
_CLEARLY = 0.9


def use_cpu_operators(module: fx.GraphModule, *, widens: bool = False) -> None:
    """Puts our operators into a graph, if there is a compiler to build them.

    Args:
        widens: whether products of many rows in bfloat16 are taken in float32.
    """
    if not _are_built():
        return
    ours = {
        torch.ops.aten.linear.default: torch.ops.spd_cpu.linear.default,
        ATTEND_CACHED: torch.ops.spd_cpu.attend_cached.default,
    }
    for node in module.graph.nodes:
        if widens and node.target is torch.ops.aten.linear.default:
            node.kwargs = {**node.kwargs, "widens": True}
        node.target = ours.get(node.target, node.target)
    module.recompile()


def linear_on_cpu(*, widens: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies x [..., k] by a weight [n, k] on a rank.

    Args:
        widens: as in `use_cpu_operators`.
    """
    if not _are_built():
        return linear
    return partial(torch.ops.spd_cpu.linear.default, widens=widens)


@cache
def widening_pays(group: dist.ProcessGroup | None = None) -> bool:
    """Whether products of many rows in bfloat16 are faster in float32, weights widened on the way.

    They are where a processor has no instructions for bfloat16, or slow ones. All ranks must do
    alike, or what they compute in common would differ in its last bits: the first one's watch
    decides.

    Args:
        group: its ranks, each of which calls this; None for a rank by itself.
    """
    pays = _are_built() and _widening_is_faster()
    if group is None:
        return pays
    decided = torch.tensor(pays)
    dist.broadcast(decided, group=group, group_src=0)
    return bool(decided)


def _widening_is_faster() -> bool:
    x = torch.ones(_ROWS, _SIZE, dtype=torch.bfloat16)
    weight = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16)
    ways = {widens: linear_on_cpu(widens=widens) for widens in (False, True)}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(_ROUNDS):
        for widens, multiply in ways.items():
            began = time.perf_counter()
            multiply(x, weight)
            least[widens] = min(least[widens], time.perf_counter() - began)
    return least[True] < _CLEARLY * least[False]


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


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, widens: bool = False
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

"""Products of few rows by an operator that reads memory as fast as it goes (products.cpp)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

from spdcompile.log import Component, get_logger
from spdcompile.runtime.native import CannotBuildError, load_library

_LOG = get_logger(Component.RUNTIME)


def lower_products(module: fx.GraphModule) -> None:
    """Has a graph's linears run by our operator, if there is a compiler to build it."""
    if not _is_built():
        return
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = torch.ops.spd_products.linear.default
    module.recompile()


@cache
def _is_built() -> bool:
    try:
        load_library()
    except CannotBuildError as error:
        _LOG.warning("Products of few rows are left to torch: %s", error)
        return False
    torch.library.register_fake("spd_products::linear", _linear_fake)
    return True


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))

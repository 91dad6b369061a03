"""Graph nodes as calls with concrete sizes: batch and sequence length set to 1, or to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from spdcompile.passes.placement.types import Call, Operand


def size_at_one(size: Any) -> int:
    """A size with every symbol (batch, sequence) set to 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


class UnlikeSizes:
    """Sizes with every symbol set to a prime of its own."""

    def __init__(self) -> None:
        self._primes = iter((3, 5, 7, 11, 13, 17, 19, 23))
        self._values: dict[Any, int] = {}

    def __call__(self, size: Any) -> int:
        """The size.

        Raises:
            StopIteration: there are more symbols than primes here.
        """
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._values:
                self._values[symbol] = next(self._primes)
        return int(expression.subs(self._values))


def shape_at_one(value: torch.Tensor) -> tuple[int, ...]:
    """A fake tensor's shape with batch and sequence length 1."""
    return _shape(value, size_at_one)


def call_of(
    node: fx.Node,
    describe: Callable[[fx.Node], tuple[Any, Any]],
    size_of: Callable[[Any], int] = size_at_one,
) -> Call:
    """The call that a node makes.

    Args:
        describe: gives a tensor node's (placement, ids).
        size_of: gives a size its number.
    """

    def operand(arg: fx.Node) -> Any:
        value = arg.meta["val"]
        if isinstance(value, torch.Tensor):
            placement, ids = describe(arg)
            return Operand(_shape(value, size_of), placement, ids)
        if isinstance(value, list | tuple):
            placement, ids = describe(arg)
            return Operand((), placement, ids)
        return size_of(value) if isinstance(value, int | torch.SymInt) else value

    args = fx.map_arg(node.args, operand)
    kwargs = fx.map_arg(node.kwargs, operand)
    value = node.meta["val"]
    shape = _shape(value, size_of) if isinstance(value, torch.Tensor) else ()
    return Call(node.target, tuple(_plain(arg) for arg in args), dict(kwargs), shape)


def _shape(value: torch.Tensor, size_of: Callable[[Any], int]) -> tuple[int, ...]:
    return tuple(size_of(size) for size in value.shape)


def _plain(arg: Any) -> Any:
    """fx's immutable lists as lists, which operators want."""
    return [_plain(item) for item in arg] if isinstance(arg, list) else arg

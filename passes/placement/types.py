"""Placements on the one mesh axis, and operator calls as the rules see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes._torch import pytree
from spdcompile.passes.layout import Layout


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Partial:
    """The value is the sum of what the ranks hold."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank holds its units' indices of one dim (counted from the front)."""

    dim: int
    layout: Layout

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True, slots=True)
class Vary:
    """Each rank holds its own value, after a dropped sync point; only `drop` makes these."""

    def __str__(self) -> str:
        return "V"


Placement = Replicate | Partial | Shard | Vary
R = Replicate()
P = Partial()
V = Vary()


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument: its shape with batch and sequence set to 1, and what is known of it.

    Args:
        placement: a list for an operator's list result.
        ids: channel ids, int64 of `shape`, -1 where none; None if no element has one.
    """

    shape: tuple[int, ...]
    placement: Any = R
    ids: Any = None


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call with operands for tensors and plain numbers for sizes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out_shape: tuple[int, ...]

    def operands(self) -> list[Operand]:
        """The tensor arguments in order, those within lists too."""
        return list(self._walk())

    def _walk(self) -> Iterator[Operand]:
        for leaf in pytree.tree_leaves((self.args, dict(self.kwargs)), is_leaf=_is_operand):
            if isinstance(leaf, Operand):
                yield leaf

    def run(self, tensors: list[Any]) -> Any:
        """Runs the operator on `tensors` in place of the operands."""
        rest = iter(tensors)

        def swap(leaf: Any) -> Any:
            return next(rest) if isinstance(leaf, Operand) else leaf

        args, kwargs = pytree.tree_map(swap, (self.args, dict(self.kwargs)), is_leaf=_is_operand)
        return self.target(*args, **kwargs)

    def with_placements(self, placements: list[Any]) -> Call:
        """The same call with other placements for its operands."""
        rest = iter(placements)

        def swap(leaf: Any) -> Any:
            return replace(leaf, placement=next(rest)) if isinstance(leaf, Operand) else leaf

        args, kwargs = pytree.tree_map(swap, (self.args, dict(self.kwargs)), is_leaf=_is_operand)
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True, slots=True)
class Placed:
    """A rule's answer: the result's placement, and operands to cut first (R -> S, free)."""

    out: Any
    cuts: Mapping[int, Shard]


def placed(out: Any) -> Placed:
    """An answer that needs no operand cut."""
    return Placed(out, {})


def _is_operand(leaf: Any) -> bool:
    return isinstance(leaf, Operand)


def no_ids(shape: tuple[int, ...]) -> Tensor:
    """Ids of a value that carries none."""
    return torch.full(shape, -1, dtype=torch.int64)

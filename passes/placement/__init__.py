"""Placement rules: one row or function an operator, one file a family of operators.

`RULES` maps an operator to its rule. A rule answers two questions about a call: which channels it
combines (`follow`), and how its result lies when its operands lie in a given way (`place`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from spdcompile.passes.placement import (
    along,
    attention,
    contraction,
    convolution,
    einsum,
    indexing,
    movement,
    pairs,
    pointwise,
    rearranging,
    reductions,
    source,
)
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, Placed


class Rule(Protocol):
    """What is known of an operator."""

    def follow(self, call: Call, channels: Channels) -> Any:
        """Channel ids of the result; unites in `channels` what the operator combines."""
        ...

    def place(self, call: Call) -> Placed | None:
        """Placement of the result; None if the operands' placements have no rule."""
        ...


def _merge(*tables: Mapping[Any, Rule]) -> dict[Any, Rule]:
    merged: dict[Any, Rule] = {}
    for table in tables:
        if both := merged.keys() & table.keys():
            raise ValueError(f"operators with two rules: {sorted(map(str, both))}")
        merged.update(table)
    return merged


RULES = _merge(
    pointwise.RULES,
    pairs.RULES,
    along.RULES,
    reductions.RULES,
    contraction.RULES,
    convolution.RULES,
    einsum.RULES,
    attention.RULES,
    movement.RULES,
    rearranging.RULES,
    indexing.RULES,
    source.RULES,
)

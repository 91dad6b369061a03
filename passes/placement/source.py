"""Operators whose result holds no channel: sizes, ranges, constants, look-ups by token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, Placed, R, Replicate, placed

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Source:
    """Rule of an operator that yields replicated data out of replicated data."""

    def follow(self, call: Call, channels: Channels) -> None:
        """No channel comes out."""

    def place(self, call: Call) -> Placed | None:
        """Replicated operands only."""
        whole = all(isinstance(operand.placement, Replicate) for operand in call.operands())
        return placed(R) if whole else None


RULES = {
    op: Source()
    for op in (
        *(aten.arange.default, aten.arange.start, aten.arange.start_step),
        *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
        *(aten.scalar_tensor.default, aten.lift_fresh_copy.default),
        *(aten.embedding.default, aten.sym_size.int),
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg),
        *(operator.eq, operator.ge, operator.gt, operator.le, operator.lt),
    )
}
# Shaped like their operand, but holding none of its data.
LIKE = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default)
RULES.update({op: Source() for op in LIKE})

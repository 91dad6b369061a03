"""Operators whose result holds no channel: sizes, ranges, constants, look-ups by token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, Placed, R, Replicate, placed

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Source:
    """Rule of an operator that yields replicated data out of replicated data."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """No channel comes out."""

    def place(self, call: Call) -> Placed | None:
        """Replicated operands only."""
        whole = all(isinstance(operand.placement, Replicate) for operand in call.operands())
        return placed(R) if whole else None


@dataclass(frozen=True, slots=True)
class LookUp(Source):
    """Rule of `embedding`: rows of a table, chosen by indices."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """A table's column by itself; an index with all columns."""
        table, indices = (operand.ids for operand in call.operands())
        columns = None if table is None else channels.merge_along(table, (0,))
        chosen = None if indices is None else indices.unsqueeze(-1)
        merged = None
        for ids in (columns, chosen):
            if ids is not None:
                merged = channels.merge(merged, ids.expand(call.out_shape))
        return merged


RULES = {
    op: Source()
    for op in (
        *(aten.arange.default, aten.arange.start, aten.arange.start_step),
        *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
        *(aten.scalar_tensor.default, aten.sym_size.int),
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg),
        *(operator.eq, operator.ge, operator.gt, operator.le, operator.lt),
    )
}
# Shaped like their operand, but holding none of its data.
LIKE = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default)
RULES.update({op: Source() for op in LIKE})
RULES[aten.embedding.default] = LookUp()

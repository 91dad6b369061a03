"""Operators whose result holds no channel: sizes, ranges, constants, look-ups by token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import (
    Call,
    Partial,
    Placed,
    R,
    Replicate,
    Shard,
    placed,
)

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


@dataclass(frozen=True, slots=True)
class Given(Source):
    """Rule of an operator that reads only the dtype of its operand: its sizes are given."""

    def place(self, call: Call) -> Placed | None:
        """Sizes that are given hold for all ranks, so the result does."""
        return placed(R)


@dataclass(frozen=True, slots=True)
class Like(Source):
    """Rule of an operator that reads only the shape of its operand."""

    def place(self, call: Call) -> Placed | None:
        """A rank makes its share."""
        placement = call.operands()[0].placement
        return None if isinstance(placement, Partial) else placed(placement)


@dataclass(frozen=True, slots=True)
class Size(Source):
    """Rule of the size of a dim."""

    def place(self, call: Call) -> Placed | None:
        """A rank knows the whole size of every dim but the split one."""
        operand, dim = call.args
        shard = operand.placement
        split = isinstance(shard, Shard) and shard.dim == dim % len(operand.shape)
        return None if split else placed(R)


RULES = {
    op: Source()
    for op in (
        *(aten.arange.default, aten.arange.start, aten.arange.start_step),
        *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
        *(aten.scalar_tensor.default, aten.eye.default, aten.eye.m, aten.linspace.default),
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg),
        *(operator.eq, operator.ge, operator.gt, operator.le, operator.lt),
    )
}
GIVEN = (
    *(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default),
    *(aten.new_empty.default,),
)
LIKE = (
    *(aten.ones_like.default, aten.zeros_like.default, aten.full_like.default),
    *(aten.empty_like.default,),
)
RULES.update({op: Given() for op in GIVEN})
RULES.update({op: Like() for op in LIKE})
RULES[aten.sym_size.int] = Size()
RULES[aten.embedding.default] = LookUp()

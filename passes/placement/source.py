"""Operators whose result holds no channel: sizes, ranges, constants, look-ups by token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, P, Partial, Placed, R, Replicate, placed

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


class Pick(Source):
    """Rule of `index`: elements chosen by whole indices, as rows of tokens are for their experts.

    Whatever is chosen of the ranks' partial sums adds up to what is chosen of their sum.
    """

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """Rows may be chosen at will; anything but rows by one index unites all there is."""
        source, *indices = call.operands()
        rows_only = len(indices) == 1 and call.args[1][0] is not None
        merged = None
        if source.ids is not None:
            dims = (0,) if rows_only else tuple(range(source.ids.dim()))
            united = channels.merge_along(source.ids, dims)
            kept = united.shape[1:] if rows_only else ()
            merged = united.reshape(kept).expand(call.out_shape)
        for index in indices:
            if index.ids is not None:
                whole = channels.merge_along(index.ids, tuple(range(index.ids.dim())))
                merged = channels.merge(merged, whole.reshape(()).expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """The source may be a partial sum."""
        source, *indices = call.operands()
        if not all(isinstance(index.placement, Replicate) for index in indices):
            return None
        return {Replicate: placed(R), Partial: placed(P)}.get(type(source.placement))


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
RULES[aten.index.Tensor] = Pick()

"""Matrix products.

Split along the contracted dim of both operands, the ranks' products add up to the whole (P).
Split along any other dim of one operand, the result is split there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.ops import GROUPED_MM
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.rows import match_rows, rows
from spdcompile.passes.placement.types import (
    Call,
    Operand,
    P,
    Partial,
    Placed,
    R,
    Replicate,
    Shard,
    placed,
)

aten = torch.ops.aten
_BATCH = rows("S(i) <- S(i) S(i)")


@dataclass(frozen=True, slots=True)
class MatMul:
    """Rule of a @ b, with a [..., I, K] and b [..., K, J].

    Args:
        transposed: b comes as [..., J, K], as in `linear`.
        added: position of an operand that is added to the product; None if there is none.
        first: position of a among the operands.
    """

    transposed: bool = False
    first: int = 0

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """Whatever is contracted with each other belongs together."""
        a, b = call.operands()[self.first : self.first + 2]
        product = self._follow_product(a, b, call.out_shape, channels)
        for operand in self._added(call):
            if operand.ids is not None:
                product = channels.merge(product, operand.ids.expand(call.out_shape))
        return product

    def _follow_product(
        self, a: Operand, b: Operand, shape: tuple[int, ...], channels: Channels
    ) -> Tensor | None:
        left = right = None
        for operand in (a, b):
            if operand.shape[:-2] != shape[:-2]:
                channels.note_hubs(operand.ids)
        if a.ids is not None:
            left = channels.merge_along(a.ids, (a.ids.dim() - 1,))
            left = (left.squeeze(-1) if len(b.shape) == 1 else left).expand(shape)
        if b.ids is not None:
            right = b.ids.transpose(-1, -2) if self.transposed else b.ids
            contracted = max(right.dim() - 2, 0)
            right = channels.merge_along(right, (contracted,))
            right = (right.squeeze(contracted) if len(a.shape) == 1 else right).expand(shape)
        return channels.merge(left, right)

    def place(self, call: Call) -> Placed | None:
        """Contracted, batch, row and column splits."""
        a, b = call.operands()[self.first : self.first + 2]
        product = self._place_product(a, b, len(call.out_shape))
        added = self._added(call)
        if product is None or not added:
            return product
        return self._place_sum(product, added[0], call)

    def _place_product(self, a: Operand, b: Operand, ndim: int) -> Placed | None:
        contracted = len(b.shape) - (1 if self.transposed else 2)
        column = len(b.shape) - (2 if self.transposed else 1)
        match a.placement, b.placement:
            case Replicate(), Replicate():
                return placed(R)
            case (Partial(), Replicate()) | (Replicate(), Partial()):
                return placed(P)
            case _ if len(a.shape) < 2 or len(b.shape) < 2:
                return None
            case Shard(i, x), Shard(j, y) if i == len(a.shape) - 1 and j == contracted:
                return placed(P) if x == y and x.times_held == 1 else None
            case Shard(i, x), Replicate() if i < len(a.shape) - 1 and self._unbatched(b):
                return placed(Shard(i + ndim - len(a.shape), x))
            case Shard(i, x), Replicate() if i == len(a.shape) - 2:
                return placed(Shard(ndim - 2, x))
            case Replicate(), Shard(j, y) if j == column:
                return placed(Shard(ndim - 1, y))
        return self._place_batch(a, b, ndim)

    def _unbatched(self, b: Operand) -> bool:
        return self.transposed or len(b.shape) == 2

    def _place_batch(self, a: Operand, b: Operand, ndim: int) -> Placed | None:
        """Both operands split along the same batch dim, as if it were elementwise."""
        for operand in (a, b):
            if isinstance(operand.placement, Shard):
                if operand.placement.dim >= len(operand.shape) - 2:
                    return None
            elif isinstance(operand.placement, Partial):
                return None
        answer = match_rows(_BATCH, [a, b], ndim)
        if answer is None:
            return None
        return Placed(answer.out, {self.first + i: cut for i, cut in answer.cuts.items()})

    def _added(self, call: Call) -> list[Operand]:
        operands = call.operands()
        return operands[: self.first] or operands[self.first + 2 :]

    def _place_sum(self, product: Placed, added: Operand, call: Call) -> Placed | None:
        """The added operand must be split as the product is."""
        whole = Operand(call.out_shape, product.out)
        total = match_rows(rows("S(i) <- S(i) S(i)", "P <- P P"), [whole, added], len(whole.shape))
        if total is None:
            return None
        position = 0 if self.first else self.first + 2
        cuts = {position: total.cuts[1]} if 1 in total.cuts else {}
        if len(cuts) != len(total.cuts):
            return None
        return Placed(total.out, {**product.cuts, **cuts})


@dataclass(frozen=True, slots=True)
class GroupedMatMul:
    """Rule of rows [N, K] @ weight [E, K, J], the matrix chosen by ends [E]: a mixture of experts.

    A row's features may be split, never the rows or the experts: the ends count whole ones.
    """

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """What is contracted belongs together, and so does what the ends tell apart."""
        rows, weight, ends = (operand.ids for operand in call.operands())
        reduced = (
            None if rows is None else channels.merge_along(rows, (1,)),
            None if weight is None else channels.merge_along(weight, (0, 1)).squeeze(0),
            None if ends is None else channels.merge_along(ends, (0,)).unsqueeze(0),
        )
        merged = None
        for ids in reduced:
            if ids is not None:
                merged = channels.merge(merged, ids.expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """Contracted and column splits."""
        rows, weight, ends = (operand.placement for operand in call.operands())
        if not isinstance(ends, Replicate):
            return None
        match rows, weight:
            case Replicate(), Replicate():
                return placed(R)
            case (Partial(), Replicate()) | (Replicate(), Partial()):
                return placed(P)
            case Shard(1, x), Shard(1, y):
                return placed(P) if x == y and x.times_held == 1 else None
            case Replicate(), Shard(2, y):
                return placed(Shard(1, y))
        return None


RULES = {
    GROUPED_MM: GroupedMatMul(),
    aten.linear.default: MatMul(transposed=True),
    aten.matmul.default: MatMul(),
    aten.bmm.default: MatMul(),
    aten.mm.default: MatMul(),
    aten.baddbmm.default: MatMul(first=1),
    aten.addmm.default: MatMul(first=1),
}

"""Operators that act on each element by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.rows import Row, match_rows, rows
from spdcompile.passes.placement.types import Call, Placed

aten = torch.ops.aten

# Any function of each element by itself: a split dim stays split.
ELEMENTWISE = rows("S(i) <- S(i)", "S(i) <- S(i) S(i)", "S(i) <- S(i) S(i) S(i)")
# f(a + b) = f(a) + f(b): an unreduced sum passes through.
LINEAR = (*ELEMENTWISE, *rows("P <- P"))
# (a1 + a2) + (b1 + b2), and never P <- P R: R would enter once a rank.
ADDITIVE = (*ELEMENTWISE, *rows("P <- P P"))
# Linear in each operand by itself, and never P <- P P: the cross terms would be lost.
MULTILINEAR = (*ELEMENTWISE, *rows("P <- P", "P <- P R", "P <- R P"))
# Linear in the numerator.
QUOTIENT = (*ELEMENTWISE, *rows("P <- P", "P <- P R"))


@dataclass(frozen=True, slots=True)
class Pointwise:
    """Rule of an elementwise operator."""

    table: tuple[Row, ...]

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """Channels that meet in one element belong together."""
        merged = None
        for operand in call.operands():
            if operand.ids is not None:
                if operand.shape != call.out_shape:
                    channels.note_hubs(operand.ids)
                merged = channels.merge(merged, operand.ids.expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """Matches the rows."""
        return match_rows(self.table, call.operands(), len(call.out_shape))


@dataclass(frozen=True, slots=True)
class Cast(Pointwise):
    """Rule of an elementwise operator that reads only the dtype of its second operand."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """The first operand's channels."""
        return call.operands()[0].ids

    def place(self, call: Call) -> Placed | None:
        """Matches the rows with the first operand; the other need not even have its shape."""
        return match_rows(self.table, call.operands()[:1], len(call.out_shape))


@dataclass(frozen=True, slots=True)
class Masked(Pointwise):
    """Rule of an operator that puts a number where a mask says so.

    Args:
        number: position of the number; a zero leaves an unreduced sum one.
        zero: the rows that hold then.
    """

    number: int
    zero: tuple[Row, ...]

    def place(self, call: Call) -> Placed | None:
        """Matches the rows."""
        value = call.args[self.number]
        is_zero = isinstance(value, int | float) and value == 0
        table = self.zero if is_zero else self.table
        return match_rows(table, call.operands(), len(call.out_shape))


_UNARY = (
    *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default),
    *(aten.tanh.default, aten.exp.default, aten.rsqrt.default, aten.sqrt.default),
    *(aten.cos.default, aten.sin.default, aten.abs.default, aten.square.default),
    *(aten.reciprocal.default, aten.log.default, aten.log1p.default, aten.expm1.default),
    *(aten.erf.default, aten.softplus.default, aten.pow.Tensor_Scalar, aten.pow.Scalar),
    *(aten.clamp.default, aten.bitwise_not.default, aten.logical_not.default),
    *(aten.clamp_min.default, aten.clamp_max.default, aten.log_sigmoid.default),
    *(aten.erfinv.default, aten.sign.default, aten.ceil.default, aten.round.default),
    *(aten.trunc.default, aten.exp2.default, aten.log2.default, aten.hardsigmoid.default),
    *(aten.hardswish.default, aten.celu.default, aten.selu.default),
    # A cast rounds, and a rounded sum is not the sum of rounded parts.
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar),
    *(aten.ge.Scalar, aten.floor.default, aten.hardtanh.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.relu6.default),
    *(aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.remainder.Scalar),
    *(aten.fmod.Scalar, aten.floor_divide.Scalar, aten.div.Scalar_mode),
    *(aten.bitwise_and.Scalar, aten.__and__.Scalar, aten.where.Scalar),
)
_BINARY = (
    *(aten.pow.Tensor_Tensor, aten.maximum.default, aten.minimum.default),
    *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor),
    *(aten.ge.Tensor, aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor),
    *(aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.logical_and.default),
    *(aten.logical_or.default, aten.logical_xor.default),
    *(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
    *(aten.floor_divide.default, aten.div.Tensor_mode, aten.remainder.Tensor),
    *(aten.fmod.Tensor, aten.atan2.default),
)

RULES = {
    **{op: Pointwise(ELEMENTWISE) for op in (*_UNARY, *_BINARY)},
    aten.type_as.default: Cast(ELEMENTWISE),
    aten.neg.default: Pointwise(LINEAR),
    aten.add.Tensor: Pointwise(ADDITIVE),
    aten.sub.Tensor: Pointwise(ADDITIVE),
    aten.rsub.Tensor: Pointwise(ADDITIVE),
    aten.lerp.Scalar: Pointwise(ADDITIVE),
    aten.mul.Tensor: Pointwise(MULTILINEAR),
    aten.mul.Scalar: Pointwise(MULTILINEAR),
    aten.div.Tensor: Pointwise(QUOTIENT),
    aten.div.Scalar: Pointwise(QUOTIENT),
    aten.where.self: Pointwise((*ELEMENTWISE, *rows("P <- R P P"))),
    aten.where.ScalarOther: Masked(ELEMENTWISE, 2, (*ELEMENTWISE, *rows("P <- R P"))),
    aten.where.ScalarSelf: Masked(ELEMENTWISE, 1, (*ELEMENTWISE, *rows("P <- R P"))),
    aten.masked_fill.Scalar: Masked(ELEMENTWISE, 2, (*ELEMENTWISE, *rows("P <- P R"))),
    aten.masked_fill.Tensor: Pointwise((*ELEMENTWISE, *rows("P <- P R P"))),
}

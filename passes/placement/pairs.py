"""Complex numbers and the pairs of real ones that they stand for, as rotary embeddings use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.along import Along
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.pointwise import ELEMENTWISE, Pointwise
from spdcompile.passes.placement.types import Call, Placed, R, Replicate, Shard, placed

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AsReal:
    """Rule of view_as_real: a last dim of two more."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """Both parts have the number's channel."""
        x = call.operands()[0]
        return None if x.ids is None else x.ids.unsqueeze(-1).expand(call.out_shape)

    def place(self, call: Call) -> Placed | None:
        """A split stays. There are no unreduced sums of complex numbers."""
        match call.operands()[0].placement:
            case Replicate():
                return placed(R)
            case Shard() as shard:
                return placed(shard)
        return None


def _last(call: Call) -> tuple[int, ...]:
    return (len(call.operands()[0].shape) - 1,)


RULES = {
    # The pairs of the last dim become one number each.
    aten.view_as_complex.default: Along(_last, reduces=True),
    aten.view_as_real.default: AsReal(),
    aten.polar.default: Pointwise(ELEMENTWISE),
}

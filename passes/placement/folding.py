"""Whether a movement of data does at every size what it does at batch and length 1.

Rules are asked at batch and length 1, where a split dim has one index for each of its layout's. In
the program such a dim may have the batch folded into it, and then its entries are to repeat the
layout: [B * heads], not [heads * S]. Everything that is done along a split dim relies on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.layout import EVERY
from spdcompile.passes.placement.types import Call, Operand, Replicate, Shard

aten = torch.ops.aten
# Operators that may fold the batch or the length into a split dim, or take it out again.
_FOLDS = (
    *(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.repeat.default, aten.repeat_interleave.self_int),
)


def keeps_layouts(call: Call, out: Any, cuts: Mapping[int, Shard]) -> bool:
    """Runs the operator on the owners of its operands at sizes that are not 1.

    Args:
        call: with those sizes.
        out: placement of the result, a list for a list of results.
        cuts: placements that operands get first.

    Returns: whether every split dim of the result repeats its layout.
    """
    operands = call.operands()
    places = [cuts.get(number, operand.placement) for number, operand in enumerate(operands)]
    if call.target not in _FOLDS and not any(map(_is_folded, operands, places)):
        return True
    owners = [_owners(o, place) for o, place in zip(operands, places, strict=True)]
    if any(one is None for one in owners):
        return False
    try:
        moved = call.run(owners)
    except RuntimeError:  # sizes that do not fit each other
        return False
    pieces = zip(moved, out, strict=True) if isinstance(out, list | tuple) else [(moved, out)]
    return all(_repeats(piece, place) for piece, place in pieces)


def _is_folded(operand: Operand, place: Any) -> bool:
    return isinstance(place, Shard) and operand.shape[place.dim] != len(place.layout)


def _tiled(place: Shard, size: int) -> Tensor | None:
    times, rest = divmod(size, len(place.layout))
    return None if rest else torch.from_numpy(place.layout.owners).repeat(times)


def _owners(operand: Operand, place: Any) -> Tensor | None:
    if not isinstance(place, Shard):
        return torch.full((), EVERY).expand(operand.shape)
    along = _tiled(place, operand.shape[place.dim])
    if along is None:
        return None
    view = [-1 if dim == place.dim else 1 for dim in range(len(operand.shape))]
    return along.view(view).expand(operand.shape)


def _repeats(owners: Tensor, place: Any) -> bool:
    if isinstance(place, Replicate):
        return bool((owners == EVERY).all())
    along = _tiled(place, owners.shape[place.dim])
    if along is None:
        return False
    view = [-1 if dim == place.dim else 1 for dim in range(owners.dim())]
    return bool((owners == along.view(view)).all())

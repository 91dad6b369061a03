"""`einsum`: a product along named dims.

Split along a letter in all operands that have it, the result is split there if it has the letter;
if not, the letter is summed over and the ranks' results add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcompile.passes.placement.channels import Channels
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


@dataclass(frozen=True, slots=True)
class Einsum:
    """Rule of einsum(equation, operands)."""

    def follow(self, call: Call, channels: Channels) -> Tensor | None:
        """What is summed over belongs together, and what meets in a product."""
        merged, known = None, _letters(call)
        if known is None:
            for operand in call.operands():
                if operand.ids is not None:
                    channels.need_whole(operand.ids, f"{call.args[0]!r} is not followed")
            return None
        terms, out = known
        for operand, letters in zip(call.operands(), terms, strict=True):
            if operand.ids is None:
                continue
            if set(out) - set(letters):
                channels.note_hubs(operand.ids)
            summed = tuple(dim for dim, letter in enumerate(letters) if letter not in out)
            ids = channels.merge_along(operand.ids, summed) if summed else operand.ids
            kept = [letter for letter in letters if letter in out]
            ids = ids.reshape([ids.shape[letters.index(letter)] for letter in kept])
            ids = ids.permute([kept.index(letter) for letter in out if letter in kept])
            shape = [size if a in kept else 1 for a, size in zip(out, call.out_shape, strict=True)]
            merged = channels.merge(merged, ids.reshape(shape).expand(call.out_shape))
        return merged

    def place(self, call: Call) -> Placed | None:
        """One operand partial, or all split along one letter."""
        operands = call.operands()
        placements = [operand.placement for operand in operands]
        if all(isinstance(p, Replicate) for p in placements):
            return placed(R)
        partial = sum(isinstance(p, Partial) for p in placements)
        if partial:
            return placed(P) if partial == 1 and placements.count(R) == len(operands) - 1 else None
        return self._place_split(call, operands)

    @staticmethod
    def _place_split(call: Call, operands: list[Operand]) -> Placed | None:
        known = _letters(call)
        if known is None:
            return None
        terms, out = known
        pairs = list(zip(operands, terms, strict=True))
        split = [(o.placement, letters) for o, letters in pairs if isinstance(o.placement, Shard)]
        shard, letters = split[0]
        letter, layout = letters[shard.dim], shard.layout
        cuts = {}
        for index, (operand, letters) in enumerate(pairs):
            needed = Shard(letters.index(letter), layout) if letter in letters else R
            if operand.placement == needed:
                continue
            if needed == R or operand.placement != R:
                return None
            if operand.shape[needed.dim] != len(layout):  # broadcast along the letter
                return None
            cuts[index] = needed
        if letter in out:
            return Placed(Shard(out.index(letter), layout), cuts)
        return Placed(P, cuts) if layout.times_held == 1 else None


def _letters(call: Call) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result; None for diagonals and ellipses."""
    left, arrow, out = call.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or any(len(set(term)) < len(term) for term in terms):
        return None
    if not arrow:
        out = "".join(sorted(a for a in set(left) - {","} if left.count(a) == 1))
    return terms, out


RULES = {aten.einsum.default: Einsum()}

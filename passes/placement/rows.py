"""Rules as rows of placements, and how a call is matched against them.

A row reads `result <- operand operand ...`. S(i) stands for any dim, the same one, with the same
layout, wherever it occurs in the row; dims are those of the result, aligned from the right as
broadcasting does.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdcompile.passes.placement.types import (
    Operand,
    P,
    Partial,
    Placed,
    R,
    Replicate,
    Shard,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row; patterns are "R", "P" or "S(i)"."""

    out: str
    ins: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.out} <- {' '.join(self.ins)}"


def rows(*texts: str) -> tuple[Row, ...]:
    """Parses rows such as "P <- P R"."""
    parsed = []
    for text in texts:
        out, ins = text.split("<-")
        parsed.append(Row(out.strip(), tuple(ins.split())))
    return tuple(parsed)


def match_rows(table: tuple[Row, ...], operands: list[Operand], ndim: int) -> Placed | None:
    """The first row that fits, preferring one that cuts no operand; None if no row fits.

    Args:
        ndim: number of dims of the result.
    """
    if all(isinstance(operand.placement, Replicate) for operand in operands):
        return Placed(R, {})
    fits = [fit for row in table if (fit := _match(row, operands, ndim)) is not None]
    return min(fits, key=lambda fit: len(fit.cuts), default=None)


def _match(row: Row, operands: list[Operand], ndim: int) -> Placed | None:
    if len(row.ins) != len(operands):
        return None
    shard = _result_shard(operands, ndim)
    cuts = {}
    for index, (pattern, operand) in enumerate(zip(row.ins, operands, strict=True)):
        if pattern == "S(i)":
            if shard is None:
                return None
            needed = _operand_shard(shard, operand, ndim)
            if needed is None or isinstance(operand.placement, Replicate):
                if not isinstance(operand.placement, Replicate):
                    return None
                if needed is not None:
                    cuts[index] = needed
            elif operand.placement != needed:
                return None
        elif not isinstance(operand.placement, Partial if pattern == "P" else Replicate):
            return None
    out = {"P": P, "R": R}.get(row.out, shard)
    return Placed(out, cuts) if out is not None else None


def _result_shard(operands: list[Operand], ndim: int) -> Shard | None:
    """The split that the first split operand gives the result, in the result's dims."""
    for operand in operands:
        if isinstance(operand.placement, Shard):
            offset = ndim - len(operand.shape)
            return Shard(operand.placement.dim + offset, operand.placement.layout)
    return None


def _operand_shard(shard: Shard, operand: Operand, ndim: int) -> Shard | None:
    """The split of an operand that fits the result's; None if it is broadcast along that dim."""
    dim = shard.dim - (ndim - len(operand.shape))
    if dim < 0 or operand.shape[dim] == 1 != len(shard.layout):
        return None
    return Shard(dim, shard.layout)

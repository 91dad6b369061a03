"""Assigns units to ranks: the even split in order, or the head groups that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spdcompile.errors import UsageError
from spdcompile.passes.base import Part, PassResult, Program, Region, RegionKind
from spdcompile.passes.layout import Assignment, even_split

HeadGroups = Mapping[int, Assignment]
"""Layer -> per rank, the ids of its head group units."""


@dataclass(frozen=True, slots=True)
class Assign:
    """Gives every region of every part its units per rank.

    Args:
        tp: number of ranks.
        head_groups: units per rank for the attention of some layers; the rest split evenly.
    """

    tp: int
    head_groups: HeadGroups

    def __call__(self, program: Program) -> PassResult:
        """Fills in `Part.assignments`."""
        self._check_layers(program)
        parts = []
        for part in program.parts:
            regions = program.graph_of(part).regions
            assigned = {region.name: self._assign(part, region) for region in regions}
            parts.append(replace(part, assignments=assigned))
        count = sum(len(part.assignments) for part in parts)
        return PassResult(replace(program, parts=tuple(parts), tp=self.tp), count)

    def _assign(self, part: Part, region: Region) -> Assignment:
        if region.kind is RegionKind.ATTENTION and part.layer in self.head_groups:
            return self._given(part, region, self.head_groups[part.layer])
        return even_split(region.num_units, self.tp)

    def _given(self, part: Part, region: Region, groups: Assignment) -> Assignment:
        most = -(-region.num_units // self.tp)
        units = sorted(unit for group in groups for unit in group)
        sizes = [len(group) for group in groups]
        if len(groups) != self.tp or units != list(range(region.num_units)) or max(sizes) > most:
            raise UsageError(
                f"The head groups of layer {part.layer} do not fit.",
                where=f"head_groups[{part.layer}]",
                found=f"{len(groups)} lists of sizes {sizes} over units {units}",
                needed=f"{self.tp} lists of at most {most} units that name each of the "
                f"{region.num_units} units 0..{region.num_units - 1} once",
            )
        return tuple(tuple(sorted(group)) for group in groups)

    def _check_layers(self, program: Program) -> None:
        layers = {part.layer for part in program.parts if part.layer is not None}
        if unknown := sorted(set(self.head_groups) - layers):
            raise UsageError(
                "Head groups name layers that the model does not have.",
                where="head_groups",
                found=f"layers {unknown}",
                needed=f"layers 0..{max(layers)}",
            )

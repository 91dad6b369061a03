"""What is distilled together: a run of blocks at whose end nothing is pending.

A block that drops its last sync point leaves partial sums to later blocks, so that no value of its
own can be held against the original's. Where a kept point sums them, the two programs hold the same
value again, up to what the drop did to it; that is where a run ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spdcompile.errors import RefusalError
from spdcompile.passes.base import Part, Program
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.training import Tensors
from spdcompile.runtime.weights import bind_stacked, unbind

Values = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of blocks in both programs.

    Args:
        original: the blocks before anything was dropped.
        parts: the same blocks with the plan's points dropped.
    """

    original: tuple[Part, ...]
    parts: tuple[Part, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of its decoder layers."""
        return tuple(part.layer for part in self.parts if part.layer is not None)

    @property
    def drops(self) -> bool:
        """Whether a sync point is dropped in it."""
        return any(part.dropped for part in self.parts)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The values at its end, which both programs have."""
        return self.original[-1].outputs


def segments_of(original: Program, changed: Program) -> tuple[Segment, ...]:
    """All blocks, in order, in the shortest runs that end with nothing pending.

    Raises:
        RefusalError: partial sums are pending at the end of the last block.
    """
    segments: list[Segment] = []
    run: list[tuple[Part, Part]] = []
    for pair in zip(original.parts, changed.parts, strict=True):
        if pair[0].layer is None:
            continue
        run.append(pair)
        if pair[0].outputs == pair[1].outputs:
            before, after = zip(*run, strict=True)
            segments.append(Segment(before, after))
            run = []
    if run:
        part = run[0][1]
        raise RefusalError(
            f"{part.name} cannot be distilled.",
            point=", ".join(f"{part.name}.{name}" for name in part.dropped) or part.name,
            reason="its partial sums are pending at the end, so that no value can be compared",
            fix="keep the last block's last sync point",
        )
    return tuple(segments)


def read_after(segment: Segment, original: Program, changed: Program) -> frozenset[str]:
    """Names of the values that either program reads after a segment."""
    place = original.parts.index(segment.original[-1]) + 1
    return read_from(place, original, changed)


def read_from(place: int, *programs: Program) -> frozenset[str]:
    """Names of the values that parts from a place on read, in any of some programs."""
    later = [part for program in programs for part in program.parts[place:]]
    return frozenset(name for part in later for name in part.inputs.values())


def only(values: Values, names: Collection[str]) -> Values:
    """Those values that have one of some names."""
    return {name: tensor for name, tensor in values.items() if name in names}


def run_parts(
    executor: LocalExecutor,
    parts: Sequence[Part],
    values: Values,
    params: Mapping[str, Mapping[str, Tensor]],
) -> Values:
    """The outputs of parts that follow each other.

    Args:
        params: part -> parameters in place of its own.
    """
    made: Values = {}
    for part in parts:
        made |= executor.call(part, {**values, **made}, params.get(part.name))
    return made


def bound(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Part -> those of its parameters that come from some tensors, all ranks' shards stacked."""
    return {part.name: bind_stacked(part, tensors) for part in parts}


def trainable(teacher: LocalExecutor, parts: Sequence[Part]) -> Tensors:
    """The tensors that only these parts read, under their state_dict names.

    What others read too stays: they would not be the original's any more.
    """
    others = {
        ref.fqn
        for part in teacher.program.parts
        if part not in parts
        for ref in part.params.values()
    }
    found: Tensors = {}
    for part in parts:
        found.update(unbind(part, teacher.params[part.name]))
    return {
        name: tensor
        for name, tensor in found.items()
        if name not in others and tensor.is_floating_point()
    }

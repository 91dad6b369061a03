"""Counts what each rank holds of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from spdcompile.passes.base import ParamRef, Program
from spdcompile.passes.layout import ShardSpec
from spdcompile.report.data import Parameters, Size

_Held = tuple[ParamRef, ShardSpec | None]


def count_parameters(program: Program) -> Parameters:
    """Parameters and persistent buffers of the whole model and of one rank."""
    nothing = Size(0, 0)
    held = list(_held(program))
    total = {ref.fqn: _size(ref, math.prod(ref.shape)) for ref, _ in held}
    replicated = [_size(ref, math.prod(ref.shape)) for ref, spec in held if spec is None]
    sharded, padding, shared = nothing, 0, 0
    for ref, spec in held:
        if spec is not None:
            across = math.prod(ref.shape) // ref.shape[spec.dim]
            sharded += _size(ref, across * spec.local_size)
            padding += _size(ref, across * spec.padded).num_bytes
            shared += _size(ref, across * spec.repeated).num_bytes
    whole = sum(replicated, nothing)
    return Parameters(
        total=sum(total.values(), nothing),
        per_rank=sharded + whole,
        sharded=sharded,
        replicated=whole,
        padding_bytes=padding,
        shared_bytes=shared,
    )


def _held(program: Program) -> Iterator[_Held]:
    """Each parameter once for each distinct way in which ranks hold it."""
    known: dict[tuple[str, bool], list[ShardSpec | None]] = {}
    for part in program.parts:
        for name, ref in part.params.items():
            spec = part.shards.get(name)
            ways = known.setdefault((ref.fqn, ref.transposed), [])
            if not ref.constant and not any(_same(spec, way) for way in ways):
                ways.append(spec)
                yield ref, spec


def _same(one: ShardSpec | None, other: ShardSpec | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dim == other.dim and np.array_equal(one.index, other.index)


def _size(ref: ParamRef, count: int) -> Size:
    return Size(count, count * ref.dtype.itemsize)

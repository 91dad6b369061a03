"""What is split and synced in each block, equal blocks together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spdcompile.passes.base import Part, Program, Region
from spdcompile.passes.drop import all_points
from spdcompile.passes.layout import even_split
from spdcompile.report.data import BlockReport, LinearReport, PointReport, PointState, RegionReport
from spdcompile.report.spans import name_layers, spans

_LAST = "it is the last one: no later sync point would sum what is pending"
_Facts = tuple[tuple[RegionReport, ...], tuple[PointReport, ...], tuple[str, ...], tuple[str, ...]]


def block_reports(program: Program) -> tuple[BlockReport, ...]:
    """The report of every part that has something to say, equal blocks as one."""
    layers_of: dict[tuple[str, _Facts], list[int]] = {}
    for part in program.parts:
        facts = _facts(program, part)
        name = "" if part.layer is not None else part.name
        if any(facts):
            layers_of.setdefault((name, facts), []).extend(
                [] if part.layer is None else [part.layer]
            )
    return tuple(
        BlockReport(name or name_layers(layers), tuple(layers), *facts)
        for (name, facts), layers in layers_of.items()
    )


def within_block(text: str, layers: str) -> str:
    """A text that names modules of some block, with their paths relative to the block.

    Args:
        layers: path of the list of blocks, such as "model.layers".
    """
    block = rf"\b{re.escape(layers)}\.\d+"
    return re.sub(rf"{block}\b(?!\.\w)", "the block", re.sub(rf"{block}\.(?=\w)", "", text))


def merged_points(program: Program, part: Part) -> Iterator[tuple[str, str]]:
    """(partial sum, sync point that sums it) of a part, dropped points included, in order.

    The program after the drop does not know what was merged into a dropped point; partials merge
    into the last of them, so a partial without a point belongs to the next dropped one.
    """
    block = program.graph_of(part)
    into = {name: p.name for p in block.sync_points for name in (*p.merged, p.name)}
    into |= {name: name for name in part.dropped}
    for position, name in enumerate(block.partials):
        later = (other for other in block.partials[position:] if other in part.dropped)
        yield name, into.get(name) or next(later, name)


def _facts(program: Program, part: Part) -> _Facts:
    block = program.graph_of(part)
    return (
        tuple(_region(part, region) for region in block.regions),
        tuple(_points(program, part)),
        tuple(_whole(part)),
        tuple(within_block(router, program.layers) for router in block.routers),
    )


def _region(part: Part, region: Region) -> RegionReport:
    assignment = part.assignments[region.name]
    return RegionReport(
        name=region.name,
        kind=region.kind.value,
        num_units=region.num_units,
        units=tuple(spans(units) for units in assignment),
        units_per_rank=max(map(len, assignment)),
        in_order=assignment == even_split(region.num_units, len(assignment)),
        linears=(
            *(_linear(part, weight, "columns") for weight in region.columns),
            *(_linear(part, weight, "rows") for weight in region.rows),
        ),
    )


def _linear(part: Part, weight: str, split: str) -> LinearReport:
    ref, spec = part.params[weight], part.shards[weight]
    local = list(ref.shape)
    local[spec.dim] = spec.local_size
    path = _relative(part, ref.fqn).removesuffix(".weight")
    return LinearReport(path, split, f"S({spec.dim})", ref.shape, tuple(local))


def _points(program: Program, part: Part) -> Iterator[PointReport]:
    points = {point.name: point for point in program.graph_of(part).sync_points}
    for name, into in merged_points(program, part):
        if into != name:
            yield PointReport(name, PointState.MERGED, into=into)
        elif name in part.dropped:
            yield PointReport(name, PointState.DROPPED)
        else:
            reason = within_block(points[name].refusal, program.layers)
            if not reason and (part.layer, name) == all_points(program)[-1]:
                reason = _LAST
            state = PointState.FIXED if reason else PointState.KEPT
            yield PointReport(name, state, reason=reason)


def _whole(part: Part) -> Iterator[str]:
    for name, ref in part.params.items():
        if name not in part.shards and not ref.constant and len(ref.shape) > 1:
            yield _relative(part, ref.fqn)


def _relative(part: Part, fqn: str) -> str:
    return fqn.removeprefix(f"{part.module}.")

"""Head grouping: which heads share a rank, and which MLP shard they lie beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from spdcompile.compiled import CompiledModel
from spdcompile.errors import RefusalError, UsageError
from spdcompile.group_candidates import Candidates
from spdcompile.models import ModelSource
from spdcompile.passes.base import Program, RegionKind
from spdcompile.passes.probe import attention_of, follows
from spdcompile.plan import HeadGroups, Plan, Router
from spdcompile.planning import check_tp, choice, structure_of
from spdcompile.runtime.calibrate import Points, droppable
from spdcompile.runtime.data import check_tokens
from spdcompile.runtime.grouping import Groups, Search, best_groups, within
from spdcompile.runtime.heads import (
    attention_units,
    head_distances,
    largest_sum,
    matched,
    shard_norms,
)
from spdcompile.runtime.local import LocalExecutor
from spdcompile.undropped import Source

_POINT = RegionKind.ATTENTION.value


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The head groups of one layer.

    Args:
        groups: units of each rank.
        search: how they were found.
        distance: sum of the distances between the heads of a rank, over all ranks.
        distance_even: that of the even split, in order.
        norm: sum of the norms of the MLP shards' outputs beside the paper's groups.
        norm_unmatched: the same before groups were matched to shards.
        kl, kl_paper, kl_even: KL divergence per token, in nats, where the layer's attention point
            is dropped, with these groups, the paper's, and the even split; None if not measured.
    """

    layer: int
    groups: tuple[tuple[int, ...], ...]
    search: Search
    distance: float
    distance_even: float
    norm: float
    norm_unmatched: float
    kl: float | None = None
    kl_paper: float | None = None
    kl_even: float | None = None


@dataclass(frozen=True, slots=True)
class HeadGrouping:
    """What head grouping found.

    Args:
        plan: drops nothing, and has the head groups; what was measured is in it.
        layers: one entry a layer that was grouped.
        refused: layers that were not, and why.
    """

    plan: Plan
    layers: tuple[LayerGroups, ...]
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def head_groups(self) -> HeadGroups:
        """Layer -> tp tuples of units, as `compile` and `Plan` take them."""
        return self.plan.head_groups


def group_heads(
    model: ModelSource,
    tokens: Tensor,
    *,
    tp: int,
    layers: frozenset[int] | None = None,
    draws: int = 10,
    router: str | None = None,
    progress: bool = True,
) -> HeadGrouping:
    """Chooses which heads share a rank, so that dropping attention points costs least.

    The paper's groups (SPD, arXiv 2502.20727), on calibration data: heads are described by their
    attention scores, and the partition with the largest distances between the heads of a rank is
    taken; then the groups are matched to the MLP shards so that the norms of the shards' outputs
    are largest. Neither criterion ranks groups as the loss does (docs/study.md), so these groups
    are one candidate beside the even split and random ones, and the one is taken with which the
    drop is measured to cost least. What moves is a unit: a head, or a K/V head with the query heads
    that read it. Nothing is dropped in the plan.

    Args:
        model: a loaded model, or a local directory with weights, which is loaded in float32.
        tokens: calibration chunks, int64 [chunks, length]; see `calibration_tokens`, `chunks_of`.
        tp: number of ranks; all of them run in this process.
        layers: those to group; all by default.
        draws: how many random candidates; 0 takes the paper's groups, and measures nothing.
        router: as in `compile`. Norms are measured with each rank routing by what it sees itself.
        progress: whether to show progress bars.

    Raises:
        UsageError: an argument does not fit the model.
        RefusalError: no layer can be grouped; names the reason.
    """
    if isinstance(model, CompiledModel):
        raise _compiled_error()
    check_tp(tp)
    reads = Router.EXACT if router is None else choice(Router, router, "router")
    source = Source(model)
    check_tokens(source.model, tokens)
    even = source.executor(source.lowering(tp, {}))
    wanted, refused = _groupable(even.program, layers, reads)
    rows = _papers(source, even, tokens, wanted, progress)
    if draws:
        paper = {row.layer: row.groups for row in rows}
        evenly = _evenly(even.program, wanted)
        best = Candidates(source, tp, tokens, reads).best(paper, evenly, draws, progress=progress)
        rows = tuple(replace(row, **asdict(best[row.layer])) for row in rows)
    plan = Plan(
        tp,
        source.num_layers,
        head_groups={row.layer: row.groups for row in rows},
        measured={"head_grouping": [_measured(row) for row in rows]},
        router=reads,
        model=structure_of(source.model),
    )
    return HeadGrouping(plan, rows, refused)


def _compiled_error() -> UsageError:
    return UsageError(
        "Head groups change which rank holds what.",
        where="model",
        found="a compiled model",
        needed="the model itself, or its directory",
    )


def _papers(
    source: Source, even: LocalExecutor, tokens: Tensor, layers: frozenset[int], progress: bool
) -> tuple[LayerGroups, ...]:
    """The paper's groups of each layer, by attention scores and the norms of MLP outputs.

    Args:
        even: runs the program that is split evenly.
    """
    tp = even.program.tp
    distances = head_distances(even, tokens, layers, progress=progress)
    found = {layer: best_groups(apart, tp) for layer, apart in distances.items()}
    groups = {layer: tuple(sorted(best, key=_by_first)) for layer, (best, _) in found.items()}
    grouped = source.executor(source.lowering(tp, groups))
    norms = shard_norms(grouped, tokens, layers, _POINT, progress=progress)
    return _rows(even.program, distances, found, groups, norms)


def _rows(
    program: Program,
    distances: Mapping[int, np.ndarray],
    found: Mapping[int, tuple[Groups, Search]],
    groups: Mapping[int, Groups],
    norms: Mapping[int, np.ndarray],
) -> tuple[LayerGroups, ...]:
    """The groups of each layer, matched to the MLP shards, and what there was before.

    Args:
        program: split evenly.
        groups: those that were found, in the order in which the norms were measured.
    """
    evenly = _evenly(program, distances)
    return tuple(
        LayerGroups(
            layer,
            groups=matched(norms[layer], groups[layer]),
            search=found[layer][1],
            distance=within(distances[layer], groups[layer]),
            distance_even=within(distances[layer], evenly[layer]),
            norm=largest_sum(norms[layer]),
            norm_unmatched=float(np.trace(norms[layer])),
        )
        for layer in sorted(distances)
    )


def _evenly(program: Program, layers: Iterable[int]) -> HeadGroups:
    """The units of each rank, of some layers of a program that is split evenly."""
    wanted = set(layers)
    return {
        part.layer: attention_units(program, part)
        for part in program.parts
        if part.layer is not None and part.layer in wanted
    }


def _by_first(group: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
    """Ranks without units come last."""
    return not group, group


def _measured(row: LayerGroups) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "search": row.search.value,
        "distance": row.distance,
        "distance_even": row.distance_even,
        "norm": row.norm,
        "norm_unmatched": row.norm_unmatched,
        "kl": row.kl,
        "kl_paper": row.kl_paper,
        "kl_even": row.kl_even,
    }


def _groupable(
    program: Program, layers: frozenset[int] | None, router: Router
) -> tuple[frozenset[int], dict[int, str]]:
    """Which layers can be grouped, and why the others cannot."""
    able, points = droppable(program, Points.ATTENTION, router)
    reasons = {layer: reason for (layer, name), reason in points.items() if name == _POINT}
    every = {part.layer for part in program.parts if part.layer is not None}
    asked = every if layers is None else layers
    if unknown := sorted(asked - every):
        raise UsageError(
            "The model does not have these layers.",
            where="layers",
            found=str(unknown),
            needed=f"layers 0..{max(every)}",
        )
    refused = {}
    for layer in sorted(asked):
        reason = reasons.get(layer) or _reason(program, layer)
        if reason or (layer, _POINT) not in able:
            refused[layer] = reason or "it has no attention of its own to drop the sync point of"
    wanted = frozenset(asked) - refused.keys()
    if not wanted:
        layer, reason = next(iter(refused.items()))
        raise RefusalError(
            "No layer's heads can be grouped.", point=f"layers.{layer}.{_POINT}", reason=reason
        )
    return wanted, refused


def _reason(program: Program, layer: int) -> str:
    """Why a block's attention cannot be looked into; "" if it can."""
    part = next(part for part in program.parts if part.layer == layer)
    block = program.graph_of(part)
    if attention_of(block) is None:
        return "its attention is no single operator, so that there are no scores to compare"
    if sum(region.kind is RegionKind.ATTENTION for region in block.regions) != 1:
        return "its heads do not fall into one set of units"
    if not follows(block, _POINT):
        return "no MLP that is split over the ranks follows its attention"
    return ""

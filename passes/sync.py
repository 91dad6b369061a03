"""Turns every edge from a partial sum to a reader of the sum into a named sync point.

Partials that meet in an addition before anything nonlinear share one sync point, exactly: so a
parallel attention + MLP block needs one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from spdcompile.passes.base import BlockGraph, PassResult, Program, SyncPoint
from spdcompile.passes.ops import SYNC
from spdcompile.passes.pending import LeakError, Pending, PendingRewriter, Rewritten
from spdcompile.passes.placement.types import P, Shard


def insert_sync_points(program: Program) -> PassResult:
    """Names the sync points of every distinct graph and says which of them could be dropped."""
    program = program.map_graphs(lambda _, block: _insert(block))
    count = sum(len(block.sync_points) for block in program.graphs.values())
    return PassResult(program, count)


def rewrite_with_dropped(
    block: BlockGraph, dropped: frozenset[str], pending_inputs: frozenset[str] = frozenset()
) -> Rewritten:
    """The graph of a block without the given sync points.

    Raises:
        LeakError: the drop would leave the ranks with different values for good.
    """
    points = {point.name: (*point.merged, point.name) for point in block.sync_points}

    def source(node: fx.Node, copy: Callable[[fx.Node], fx.Node]) -> Pending | None:
        if node.target is not SYNC:
            return None
        partial, name = node.args
        kept = name not in dropped
        return Pending(None, rewriter.plain(partial), points[name] if kept else (), kept)

    rewriter = PendingRewriter(block.module.graph, source, pending_inputs)
    return rewriter.run()


def _insert(block: BlockGraph) -> BlockGraph:
    partials = 0

    def source(node: fx.Node, copy: Callable[[fx.Node], fx.Node]) -> Pending | None:
        nonlocal partials
        region = _partial_region(node)
        if region is None:
            return None
        partials += 1
        return Pending(None, copy(node), (region,), kept=True)

    rewritten = PendingRewriter(block.module.graph, source).run()
    points = tuple(SyncPoint(names[-1], names[:-1]) for names in rewritten.points)
    module = fx.GraphModule({}, rewritten.graph)
    block = replace(block, module=module, sync_points=points, num_partials=partials)
    judged = tuple(replace(point, refusal=_refusal(block, point)) for point in points)
    return replace(block, sync_points=judged)


def _partial_region(node: fx.Node) -> str | None:
    """The region in whose row-split linear a partial sum arises; None elsewhere."""
    if node.meta["placement"] != P:
        return None
    given = [arg.meta["placement"] for arg in node.all_input_nodes if "placement" in arg.meta]
    regions = [placement.layout.region for placement in given if isinstance(placement, Shard)]
    return regions[0] if regions else None


def _refusal(block: BlockGraph, point: SyncPoint) -> str:
    """Why a sync point cannot be dropped: found by dropping it."""
    try:
        rewrite_with_dropped(block, frozenset({point.name}))
    except LeakError as why:
        return str(why)
    return ""

"""Turns every edge from a partial sum to a reader of the sum into a named sync point.

Partials that meet in an addition before anything nonlinear share one sync point, exactly: so a
parallel attention + MLP block needs one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from spdcompile.passes.base import BlockGraph, PassResult, Program, SyncPoint, module_path
from spdcompile.passes.channelflow import SUMMABLE
from spdcompile.passes.ops import SYNC
from spdcompile.passes.pending import PendingRewriter
from spdcompile.passes.placement.types import P, Shard
from spdcompile.passes.residual import ChoiceError, LeakError, Pending, Rewritten
from spdcompile.plan import Router


def insert_sync_points(program: Program) -> PassResult:
    """Names the sync points of every distinct graph and says which of them could be dropped."""
    program = program.map_graphs(lambda _, block: _insert(block))
    count = sum(len(block.sync_points) for block in program.graphs.values())
    return PassResult(program, count)


def rewrite_with_dropped(
    block: BlockGraph,
    dropped: frozenset[str],
    pending_inputs: frozenset[str] = frozenset(),
    router: Router = Router.EXACT,
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

    rewriter = PendingRewriter(block.module.graph, source, pending_inputs, router)
    return rewriter.run()


def _insert(block: BlockGraph) -> BlockGraph:
    names = _partial_names(block)

    def source(node: fx.Node, copy: Callable[[fx.Node], fx.Node]) -> Pending | None:
        return Pending(None, copy(node), (names[node],), kept=True) if node in names else None

    rewritten = PendingRewriter(block.module.graph, source).run()
    points = tuple(SyncPoint(merged[-1], merged[:-1]) for merged in rewritten.points)
    module = fx.GraphModule({}, rewritten.graph)
    partials = tuple(names.values())
    block = replace(block, module=module, sync_points=points, partials=partials)
    statistics = {name: node for node, name in names.items() if node.target in SUMMABLE}
    judged = tuple(_judged(block, point, statistics.get(point.name)) for point in points)
    return replace(block, sync_points=judged)


def _partial_names(block: BlockGraph) -> dict[fx.Node, str]:
    """The nodes at which a partial sum arises, each with the name of its sync point.

    A region's sum is named after it, the statistic of a norm over its units after the norm.
    """
    taken = {region.name for region in block.regions}
    names: dict[fx.Node, str] = {}
    for node in block.module.graph.nodes:
        region = _partial_region(node)
        if region is None:
            continue
        name = region
        if node.target in SUMMABLE or name in names.values():
            base = module_path(node).rpartition(".")[2] or f"{region}_sum"
            name, number = base, 2
            while name in taken:
                name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names[node] = name
    return names


def _partial_region(node: fx.Node) -> str | None:
    """The region in whose row-split projection a partial sum arises; None elsewhere."""
    if node.op != "call_function" or node.meta["placement"] != P:
        return None
    given = [arg.meta["placement"] for arg in node.all_input_nodes if "placement" in arg.meta]
    regions = [placement.layout.region for placement in given if isinstance(placement, Shard)]
    return regions[0] if regions else None


def _judged(block: BlockGraph, point: SyncPoint, statistic: fx.Node | None) -> SyncPoint:
    """The point with why it cannot be dropped: found by dropping it."""
    if statistic is not None:
        refusal = (
            f"{module_path(statistic)} takes a mean over channels of all ranks; without the sum "
            "each rank would normalise by its own share alone"
        )
        return replace(point, refusal=refusal)
    dropped = frozenset({point.name})
    try:
        rewrite_with_dropped(block, dropped)
    except ChoiceError as choice:
        try:
            rewrite_with_dropped(block, dropped, router=Router.REPLICATED)
        except LeakError as why:
            return replace(point, refusal=str(why))
        return replace(point, refusal=str(choice), routed=True)
    except LeakError as why:
        return replace(point, refusal=str(why))
    return point

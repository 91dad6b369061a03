"""Drops the sync points that a plan names (SPD, arXiv 2502.20727, in its general form).

The only pass that changes numbers. A dropped point's partial sums stay pending, through later
blocks if need be, until the next kept point sums them all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from spdcompile.errors import RefusalError
from spdcompile.passes.base import BlockGraph, Part, PassResult, Program
from spdcompile.passes.residual import LeakError, Rewritten
from spdcompile.passes.sync import rewrite_with_dropped
from spdcompile.plan import Router

PointName = tuple[int, str]
"""A sync point: (layer, name within the block), such as (3, "attn")."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Drops sync points.

    Args:
        points: (layer, name) of each.
        router: what routers read where a dropped point is pending.
    """

    points: frozenset[PointName]
    router: Router = Router.EXACT

    def __call__(self, program: Program) -> PassResult:
        """A program without the points.

        Raises:
            RefusalError: a point does not exist or cannot be dropped; with the reason.
        """
        self._check(program)
        dropper = _Dropper(program, self.router)
        parts = tuple(
            dropper.drop(
                part, frozenset(name for layer, name in self.points if layer == part.layer)
            )
            for part in program.parts
        )
        used = {part.graph for part in parts}
        graphs = {key: block for key, block in dropper.graphs.items() if key in used}
        return PassResult(replace(program, graphs=graphs, parts=parts), len(self.points))

    def _check(self, program: Program) -> None:
        for layer, name in sorted(self.points):
            reason = refusal_of(program, layer, name, self.router)
            if reason:
                raise RefusalError(
                    f"The sync point layers.{layer}.{name} cannot be dropped.",
                    point=f"layers.{layer}.{name}",
                    reason=reason,
                    fix="leave it out of the mask; trace-and-report lists what can be dropped",
                )
        kept = [point for point in all_points(program) if point not in self.points]
        everything = all_points(program)
        if self.points and kept[-1:] != everything[-1:]:
            layer, name = everything[-1]
            raise RefusalError(
                f"The sync point layers.{layer}.{name} cannot be dropped.",
                point=f"layers.{layer}.{name}",
                reason="it is the last one: no later sync point would sum what is pending",
            )


def all_points(program: Program) -> list[PointName]:
    """Every sync point of the blocks, in program order."""
    return [
        (part.layer, point.name)
        for part in program.parts
        if part.layer is not None
        for point in program.graph_of(part).sync_points
    ]


def refusal_of(program: Program, layer: int, name: str, router: Router = Router.EXACT) -> str:
    """Why a sync point cannot be dropped; "" if nothing within its block stands against it."""
    part = next((part for part in program.parts if part.layer == layer), None)
    if part is None:
        return "the model has no such layer"
    block = program.graph_of(part)
    for point in block.sync_points:
        if point.name == name:
            if point.routed and router is Router.REPLICATED:
                return ""
            first = next(p for p in program.parts if p.graph == part.graph)
            return point.refusal.replace(f"{first.module}.", f"{part.module}.")
        if name in point.merged:
            return (
                f"it is merged into layers.{layer}.{point.name}: the block adds both before "
                "anything nonlinear, so it has one all-reduce already and nothing to drop"
            )
    return f"layer {layer} has no sync point {name!r}: nothing in it is split that way"


_Variant = tuple[str, Rewritten]


class _Dropper:
    """Drops points part by part; parts of equal structure and equal drops share a graph."""

    def __init__(self, program: Program, router: Router) -> None:
        self.router = router
        self.graphs = dict(program.graphs)
        self.known: dict[tuple[str, frozenset[str], frozenset[str]], _Variant] = {}
        self.pending: dict[str, str] = {}

    def drop(self, part: Part, names: frozenset[str]) -> Part:
        """The part without the named points; reads what earlier parts left pending."""
        pending = frozenset(name for name, value in part.inputs.items() if value in self.pending)
        if not names and not pending:
            return part
        key, rewritten = self._variant(part, names, pending)
        inputs = dict(part.inputs)
        for name, partial in rewritten.partial_inputs.items():
            inputs[partial] = self.pending[part.inputs[name]]
        outputs = list(part.outputs)
        for position in rewritten.partial_outputs:
            partial = f"{part.outputs[position]}.partial"
            self.pending[part.outputs[position]] = partial
            outputs.append(partial)
        dropped = tuple(sorted(names))
        return replace(part, graph=key, inputs=inputs, outputs=tuple(outputs), dropped=dropped)

    def _variant(self, part: Part, names: frozenset[str], pending: frozenset[str]) -> _Variant:
        known = (part.graph, names, pending)
        if known not in self.known:
            block = self.graphs[part.graph]
            try:
                rewritten = rewrite_with_dropped(block, names, pending, self.router)
            except LeakError as why:
                raise RefusalError(
                    f"The sync points of {part.name} cannot be dropped together.",
                    point=", ".join(f"{part.name}.{name}" for name in sorted(names)) or part.name,
                    reason=str(why),
                ) from why
            key = "-".join((part.graph, "drop", *sorted(names), *(["pending"] if pending else [])))
            if key in self.graphs:  # of other inputs that are pending
                key = "-".join((key, *sorted(pending)))
            self.graphs[key] = _kept(block, rewritten, names)
            self.known[known] = key, rewritten
        return self.known[known]


def _kept(block: BlockGraph, rewritten: Rewritten, dropped: frozenset[str]) -> BlockGraph:
    points = tuple(point for point in block.sync_points if point.name not in dropped)
    module = fx.GraphModule({}, rewritten.graph)
    return replace(block, module=module, sync_points=points, routers=rewritten.routers)

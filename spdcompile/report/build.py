"""Builds the report of a lowering."""

from __future__ import annotations

from spdcompile.passes.base import Part, Program, Refusal
from spdcompile.passes.pipeline import Lowering
from spdcompile.report.blocks import block_reports, within_block
from spdcompile.report.collectives import count_collectives
from spdcompile.report.data import PassReport, RefusalReport, Report
from spdcompile.report.parameters import count_parameters
from spdcompile.report.spans import name_layers


def build_report(lowering: Lowering) -> Report:
    """Says what became of a model.

    Args:
        lowering: a program with sync points, before or after the drop, and its records.
    """
    program = lowering.program
    names = {record.name for record in lowering.records}
    assert "sync" in names, f"a report needs a program with sync points; passes so far: {names}"
    return Report(
        tp=program.tp,
        num_layers=sum(part.layer is not None for part in program.parts),
        blocks=block_reports(program),
        collectives=count_collectives(program),
        parameters=count_parameters(program),
        refusals=refusal_reports(lowering),
        passes=pass_reports(lowering),
    )


def pass_reports(lowering: Lowering) -> tuple[PassReport, ...]:
    """What each pass so far did."""
    return tuple(
        PassReport(r.name, r.numerics.value, r.seconds, r.nodes, r.rewrites)
        for r in lowering.records
    )


def refusal_reports(lowering: Lowering) -> tuple[RefusalReport, ...]:
    """What each pass so far refused, each refusal once."""
    found = [
        _refusal(lowering.program, refusal, record.name)
        for record in lowering.records
        for refusal in record.refusals
    ]
    return tuple(dict.fromkeys(found))


def _refusal(program: Program, refusal: Refusal, found_by: str) -> RefusalReport:
    """A refusal with the place it holds for, its texts relative to the block."""
    parts = [part for part in program.parts if _origin(part) == refusal.graph]
    layers = tuple(part.layer for part in parts if part.layer is not None)
    outside = parts[0].name if parts else "model"
    return RefusalReport(
        within_block(refusal.subject, program.layers),
        name_layers(layers) if layers else outside,
        layers,
        within_block(refusal.reason, program.layers),
        found_by,
    )


def _origin(part: Part) -> str:
    """The key of the graph that a part called before the drop."""
    return part.graph.partition("-drop")[0]

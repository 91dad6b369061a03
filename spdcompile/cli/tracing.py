"""Does what `trace-and-report` says: compiles a model without weights and tells about it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from transformers import PreTrainedModel

from spdcompile.cli.plans import plan_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.errors import UsageError
from spdcompile.models import resolve_model
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.capture import decoder_layers
from spdcompile.passes.pipeline import Lowering
from spdcompile.passes.printer import print_program
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.plan import Plan
from spdcompile.report import Report, build_report, describe_model, diff_blocks
from spdcompile.report.build import pass_reports, refusal_reports
from spdcompile.report.text import passes_table, refusals_table, render_model

_PASSES = (
    "capture",
    *(step.name for step in pipeline.preserving(1, {})),
    *(step.name for step in pipeline.changing(frozenset())),
)


def trace_and_report(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check_passes(arguments)
    _check_json(arguments)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    plan = plan_of(arguments, len(decoder_layers(model)[1]))
    header = render_model(describe_model(model), plan.tp)
    undropped, lowering = _lower(arguments, model, plan)
    if arguments.stop_after:
        print("\n\n".join([header, *_unfinished(arguments, lowering)]))
        return 0
    report = build_report(lowering)
    if arguments.json:
        _write_json(arguments.json, model, report)
    if arguments.json != STDOUT:
        diffs = [f"{title}\n{text}" for title, text in diff_blocks(undropped, lowering.program)]
        print("\n\n".join([header, str(report), *diffs]))
    return 0


def _lower(
    arguments: argparse.Namespace, model: PreTrainedModel, plan: Plan
) -> tuple[Program, Lowering]:
    """Runs the passes one by one, and prints where that was asked for.

    Returns: the program before the last pass that ran, and everything after it.
    """
    table = Vocabulary(arguments.vocab or Vocabulary.BY_SIZE)
    preserving = pipeline.preserving(plan.tp, plan.head_groups, table)
    changing = pipeline.changing(plan.dropped, plan.router)
    lowering = pipeline.start(model)
    before = lowering.program
    for step in (None, *preserving, *changing):
        if step is not None:
            before = lowering.program
            lowering = pipeline.advance(lowering, (step,))
        name = lowering.records[-1].name
        if name in arguments.print_after:
            print(f"# the program after {name}\n{print_program(lowering.program)}\n")
        if name == arguments.stop_after:
            break
    return before, lowering


def _unfinished(arguments: argparse.Namespace, lowering: Lowering) -> list[str]:
    """What is known of a program that not all passes have seen."""
    refusals = refusal_reports(lowering)
    known = [] if not refusals else [f"Refused\n{refusals_table(refusals)}"]
    known.append(f"Passes\n{passes_table(pass_reports(lowering))}")
    if arguments.stop_after not in arguments.print_after:
        program = print_program(lowering.program)
        known.append(f"# the program after {arguments.stop_after}\n{program}")
    return known


def _write_json(target: str, model: PreTrainedModel, report: Report) -> None:
    document = {"model": asdict(describe_model(model)), **report.to_dict()}
    text = json.dumps(document, indent=2)
    write_output("--json", target, text)


def _check_passes(arguments: argparse.Namespace) -> None:
    for option, name in [
        *(("--print", name) for name in arguments.print_after),
        ("--stop-after", arguments.stop_after),
    ]:
        if name not in (None, *_PASSES):
            raise UsageError(
                f"There is no pass {name!r}.",
                where=f"{option} {name}",
                found=repr(name),
                needed=f"one of: {', '.join(_PASSES)}",
            )
    last = arguments.stop_after or _PASSES[-1]
    for name in arguments.print_after:
        if _PASSES.index(name) > _PASSES.index(last):
            raise UsageError(
                f"The pass {name} comes after the one to stop at.",
                where=f"--print {name} --stop-after {last}",
                found=f"the order {', '.join(_PASSES)}",
                needed=f"a pass up to {last}",
            )


def _check_json(arguments: argparse.Namespace) -> None:
    if not arguments.json:
        return
    check_target("--json", arguments.json)
    if arguments.stop_after:
        raise UsageError(
            "There is no report of a program that is not finished.",
            where=f"--json {arguments.json} --stop-after {arguments.stop_after}",
            found="both options",
            needed="one of them",
        )
    if arguments.json == STDOUT and arguments.print_after:
        raise UsageError(
            "The report and the program cannot both go to stdout.",
            where="--json - --print",
            found="both options",
            needed="a file for the report, or no --print",
        )

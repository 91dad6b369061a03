"""Does what `tune` says: finds a plan to a budget, prints the decisions, writes a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

import spdcompile
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.reading import read_tokens
from spdcompile.cli.tune import UNMET
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.errors import UsageError
from spdcompile.export import check_empty
from spdcompile.models import resolve_model
from spdcompile.plan import PLAN_FILE
from spdcompile.runtime.calibrate import Points
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.evaluate import Quality
from spdcompile.tuning.budget import Budget
from spdcompile.tuning.ladder import Effort, Rung
from spdcompile.tuning.latency import Latencies
from spdcompile.tuning.settings import TuneSettings
from spdcompile.tuning.tuned import Tuned

_HEADERS = ["point", "score", "alone", "class", "tried: perplexity (points dropped)", "outcome"]


def tune_model(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    budget = Budget(arguments.max_loss, arguments.min_saved, arguments.min_faster)
    _check_targets(arguments)
    settings = _settings(arguments)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    tokens = read_tokens(arguments, model)
    held = None
    if arguments.validation is not None:
        text = argparse.Namespace(**vars(arguments) | {"text": arguments.validation, "count": None})
        text.length = tokens.shape[1]
        held = read_tokens(text, model)
    tuned = spdcompile.tune(
        arguments.model,
        tokens,
        tp=arguments.tp,
        budget=budget,
        validation=held,
        points=Points(arguments.points),
        router=arguments.router,
        settings=settings,
        progress=sys.stderr.isatty(),
    )
    if arguments.output:
        tuned.export_hf(arguments.output)
    if arguments.plan_only:
        tuned.plan.save(arguments.plan_only)
    if arguments.json:
        write_output("--json", arguments.json, json.dumps(tuned.to_dict(), indent=2))
    if arguments.json != STDOUT:
        print(_report(tuned))
        for target, what in _written(arguments):
            print(f"{target}: {what}")
    return 0 if tuned.met else UNMET


def _check_targets(arguments: argparse.Namespace) -> None:
    """Before the work: what is to be written can be."""
    check_target("--plan-only", arguments.plan_only)
    check_target("--json", arguments.json)
    if not (arguments.output or arguments.plan_only or arguments.json):
        raise UsageError(
            "There is nowhere to write the plan.",
            where="--output",
            needed="--output DIR, --plan-only FILE or --json FILE",
        )
    if arguments.output:
        check_empty(Path(arguments.output))


def _settings(arguments: argparse.Namespace) -> TuneSettings:
    given = {"steps": arguments.steps, "logit_steps": arguments.logit_steps}
    full = DistillSettings(**{name: count for name, count in given.items() if count is not None})
    short = TuneSettings(distill=full).short
    if arguments.search_steps:
        short = replace(short, steps=arguments.search_steps)
    rungs = tuple(rung for rung in Rung if rung is not Rung.GROUP or not arguments.no_groups)
    table = None if arguments.latencies is None else Latencies.load(arguments.latencies)
    return TuneSettings(
        distill=full,
        search=short,
        effort=Effort(rungs=rungs),
        latencies=table,
        sampled=arguments.sampled or 0,
        batch_size=arguments.batch_size,
        resume=arguments.resume,
    )


def _report(tuned: Tuned) -> str:
    """The decisions, the thresholds, and whether the budget is met."""
    rows = []
    for decision in tuned.points:
        layer, name = decision.point
        known = [decision.score, decision.alone]
        figures = ["" if figure is None else f"{figure:.4f}" for figure in known]
        rows.append(
            (f"{layer}.{name}", *figures, decision.kind.value, decision.tried, decision.outcome)
        )
    savings = tuned.savings
    gone = savings.all_reduces - savings.remaining
    verdict = "met" if tuned.met else "NOT MET; this is the best plan found"
    lines = [
        tabulate(rows, _HEADERS, disable_numparse=True),
        "",
        f"Thresholds: tau1 {_or_none(tuned.tau1)}, tau2 {_or_none(tuned.tau2)} (score, in nats)",
        f"All-reduces: {gone} of {savings.all_reduces} gone ({savings.saved:.1%})",
        *_latency_lines(tuned),
        "On held-out text:",
        f"  nothing dropped  {_words(tuned.undropped, tuned.undropped)}",
        f"  dropped          {_words(tuned.zero_shot, tuned.undropped)}",
        f"  recovered        {_words(tuned.recovered, tuned.undropped)}  ({tuned.recovery.value})",
        f"Ended because: {tuned.why}",
        f"Budget ({tuned.budget}): {verdict}",
    ]
    return "\n".join(lines)


def _latency_lines(tuned: Tuned) -> list[str]:
    savings = tuned.savings
    if savings.faster is None:
        return []
    measured = "" if savings.measured is None else f", {savings.measured:.1%} as measured with it"
    return [f"Latency: {savings.faster:.1%} gone by the table{measured}"]


def _words(quality: Quality, undropped: Quality) -> str:
    increase = quality.perplexity / undropped.perplexity - 1
    return (
        f"perplexity {quality.perplexity:.3f} ({increase:+.2%}), KL {quality.kl:.4f}, "
        f"equal likeliest tokens {quality.agreement:.1%}"
    )


def _or_none(threshold: float | None) -> str:
    return "none: no point beyond" if threshold is None else f"{threshold:.4f}"


def _written(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    targets = (
        (arguments.output, f"a Hugging Face checkpoint, and {PLAN_FILE}"),
        (arguments.plan_only, "the plan"),
    )
    return [(target, what) for target, what in targets if target]

"""Does what `calibrate` says: measures what each sync point is worth, and prints the table."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from tabulate import tabulate
from torch import Tensor

import spdcompile
from spdcompile.cli.calibrate import METHODS
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.reading import read_tokens
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.errors import UsageError
from spdcompile.models import resolve_model
from spdcompile.plan import Plan
from spdcompile.report import describe_model
from spdcompile.runtime.calibrate import CalibrateSettings, Method, Points, Sensitivity


def calibrate_model(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if STDOUT in (arguments.json, arguments.markdown) and arguments.json == arguments.markdown:
        raise UsageError("Only one of them can go to stdout.", where="--json - --markdown -")
    check_target("--json", arguments.json)
    check_target("--markdown", arguments.markdown)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    tokens = read_tokens(arguments, model)
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    found = spdcompile.calibrate(
        arguments.model,
        tokens,
        tp=arguments.tp,
        plan=plan,
        router=arguments.router if plan is None else None,
        settings=_settings(arguments),
        progress=sys.stderr.isatty(),
    )
    if arguments.json:
        facts = {
            "model": asdict(describe_model(model)),
            "tp": arguments.tp,
            "text": arguments.text,
            "chunks": len(tokens),
            "length": tokens.shape[1],
        }
        write_output("--json", arguments.json, json.dumps(facts | found.to_dict(), indent=2))
    if arguments.markdown:
        write_output("--markdown", arguments.markdown, _report(found, tokens, arguments, "pipe"))
    if STDOUT not in (arguments.json, arguments.markdown):
        print(_report(found, tokens, arguments, "simple"))
    return 0


def _settings(arguments: argparse.Namespace) -> CalibrateSettings:
    asked = arguments.method or METHODS[:1]
    return CalibrateSettings(
        points=Points(arguments.points),
        methods=tuple(method for method in Method if method.value in asked),
        batch_size=arguments.batch_size,
        memory_bytes=arguments.memory * 2**20,
        scratch=arguments.scratch,
        resume=arguments.resume,
    )


def _report(
    found: Sensitivity, tokens: Tensor, arguments: argparse.Namespace, table_format: str
) -> str:
    """The table, what cannot be dropped, and what it cost."""
    kept = found.undropped.perplexity
    methods = list(found.found)
    headers = ["dropped", *(f"{m.value}: {name}" for m in methods for name in _columns(m))]
    if table_format == "simple":
        headers = [header.replace(": ", "\n") for header in headers]
    rows = []
    for place, (layer, name) in enumerate(found.points):
        cells = [f"{layer}.{name}"]
        for method in methods:
            quality, score = found.found[method][place], found.scores_by(method)[layer, name]
            cells += [f"{score:+.3f}", f"{score / kept:+.1%}", f"{quality.kl:.4f}"]
            cells += [] if quality.agreement is None else [f"{quality.agreement:.1%}"]
        rows.append(cells)
    table = tabulate(rows, headers, tablefmt=table_format, disable_numparse=True)
    refused = [f"{layer}.{name}: {why}" for (layer, name), why in found.refused.items()]
    lines = [
        f"Perplexity with nothing dropped {kept:.3f}, tp {arguments.tp}, {len(tokens)} chunks of "
        f"{tokens.shape[1]} tokens",
        f"Block evaluations {found.block_evaluations}, where whole evaluations of the model would "
        f"have run {found.naive_block_evaluations}",
    ]
    return "\n".join([table, "", *([*refused, ""] if refused else []), *lines])


def _columns(method: Method) -> list[str]:
    """Perplexity added, in numbers and as a share; KL divergence; equal likeliest tokens."""
    known = ["perplexity", "share", "KL"]
    return known if method is Method.FIRST_ORDER else [*known, "agreement"]

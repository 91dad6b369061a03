"""The options of `trace-and-report`; `tracing.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory; a config.json is enough")
    add_plan_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - is stdout")
    parser.add_argument(
        "--print",
        dest="print_after",
        action="append",
        default=[],
        metavar="PASS",
        help="print the program after a pass; may be given several times",
    )
    parser.add_argument(
        "--stop-after", metavar="PASS", help="stop after a pass and print its program"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.tracing import trace_and_report

    return trace_and_report(arguments)

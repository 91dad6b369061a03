"""The options of `trace-and-report`; `tracing.py` does the work."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory; a config.json is enough")
    parser.add_argument("--tp", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--spd-mask",
        default="none",
        metavar="RANGES",
        help="layers whose attention sync point is dropped: 0-20,25, all or none (default)",
    )
    parser.add_argument(
        "--drop",
        default="none",
        metavar="POINTS",
        help="further sync points to drop: 3.mlp,4-6.attn",
    )
    parser.add_argument(
        "--router",
        choices=("exact", "replicated"),
        default="exact",
        help="what the router of a mixture of experts reads where a dropped sync point is pending:"
        " exact (default) refuses the drop; replicated approximates by what all ranks share",
    )
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


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number

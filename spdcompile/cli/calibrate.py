"""The options of `calibrate`; `calibrating.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_split_options
from spdcompile.cli.running_options import add_storage_options
from spdcompile.cli.text_options import add_text_options

METHODS = ("cumulative", "leave-one-out", "first-order")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    add_split_options(parser)
    add_text_options(parser)
    parser.add_argument(
        "--plan", metavar="FILE", help="a plan.json whose head groups and router setting hold"
    )
    parser.add_argument(
        "--points",
        choices=("all", "attn"),
        default="all",
        help="which sync points: all that can be dropped (default), or those of attention",
    )
    parser.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        help="how the cost is found; may be given several times (default cumulative, the paper's)",
    )
    add_storage_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - is stdout")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.calibrating import calibrate_model

    return calibrate_model(arguments)

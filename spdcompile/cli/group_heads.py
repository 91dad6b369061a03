"""The options of `group-heads`; `grouping.py` beside it does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options
from spdcompile.cli.text_options import add_text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    add_plan_options(parser)
    add_text_options(parser)
    parser.add_argument(
        "--layers", default="all", metavar="RANGES", help="layers to group: 0-3,7 (default all)"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=10,
        metavar="N",
        help="random groups to measure beside the paper's and the order as it is; 0 takes the"
        " paper's unmeasured (default 10)",
    )
    parser.add_argument(
        "--output", default="plan.json", metavar="FILE", help="the plan (default plan.json)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.grouping import group_model_heads

    return group_model_heads(arguments)

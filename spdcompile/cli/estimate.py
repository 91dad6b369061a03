"""The options of `estimate`; `estimating.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options
from spdcompile.cli.step_options import add_step_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory; a config.json is enough")
    add_plan_options(parser)
    add_step_options(parser)
    parser.add_argument(
        "--device", required=True, metavar="NAME", help="what each rank computes on: a100-80g, ..."
    )
    parser.add_argument(
        "--link", required=True, metavar="NAME", help="what ranks exchange through: nvlink3, ..."
    )
    parser.add_argument("--json", metavar="FILE", help="write the estimate as JSON; - is stdout")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.estimating import estimate

    return estimate(arguments)

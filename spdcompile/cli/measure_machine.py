"""The options of `measure-machine`; `measuring.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive
from spdcompile.cli.step_options import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the table")
    parser.add_argument(
        "--ranks", type=positive, default=2, metavar="N", help="processes at once (default 2)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        default=[],
        help="in which products are measured; may be given several times (default float32)",
    )
    parser.add_argument(
        "--name", default="cpu", metavar="NAME", help="of the device in the table (default cpu)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.measuring import measure

    return measure(arguments)

"""The options of `replay`; `replaying.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive
from spdcompile.cli.step_options import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory; a config.json is enough")
    parser.add_argument("--tp", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--link",
        action="append",
        required=True,
        metavar="NAME",
        help="what ranks would exchange through: nvlink3, ...; may be given several times",
    )
    parser.add_argument(
        "--share",
        type=percentage,
        action="append",
        default=[],
        metavar="PERCENT",
        help="of the layers, from the first on, whose attention point is dropped; may be given"
        " several times (default 0, 50, 70 and 100)",
    )
    for name, default, text in (
        ("--prompt", "128 and 2048", "tokens of a prefill step"),
        ("--context", "128 and 2048", "tokens of a sequence in a decode step"),
        ("--batch", "1, 8 and 32", "sequences"),
    ):
        parser.add_argument(
            name,
            type=positive,
            action="append",
            default=[],
            metavar="N",
            help=f"{text}; may be given several times (default {default})",
        )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the configuration's")
    parser.add_argument("--device", default="cpu", help="where the rank runs: cpu (default), cuda")
    parser.add_argument(
        "--backend", choices=("inductor", "eager"), default="inductor", help="default inductor"
    )
    parser.add_argument(
        "--rounds", type=positive, default=20, metavar="N", help="calls of each (default 20)"
    )
    parser.add_argument(
        "--no-graph", action="store_true", help="on CUDA, launch each kernel instead of one graph"
    )
    parser.add_argument("--machine", metavar="FILE", help="links besides the package's own")
    parser.add_argument("--json", metavar="FILE", help="write all rows as JSON; - is stdout")


def percentage(text: str) -> int:
    """A whole number from 0 to 100, for argparse."""
    number = int(text.removesuffix("%"))
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.replaying import replay

    return replay(arguments)

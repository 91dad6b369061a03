"""The options of `generate`; `generating.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options, positive
from spdcompile.cli.running_options import add_running_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from")
    add_plan_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="at most (default 128)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="draw tokens; without it the likeliest one"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from this share of them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end after this text")
    add_running_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.generating import generate_text

    return generate_text(arguments)

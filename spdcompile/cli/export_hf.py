"""The options of `export-hf`; `exporting.py` does the work."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "source", metavar="SOURCE", help="what `save` wrote; or, with --plan, a model's directory"
    )
    parser.add_argument("target", metavar="TARGET", help="a new or empty directory")
    parser.add_argument("--plan", metavar="FILE", help="the plan that the model's weights are for")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.exporting import export

    return export(arguments)

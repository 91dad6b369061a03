"""The options of `eval`; `evaluating.py` does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options, positive
from spdcompile.cli.running_options import add_running_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    add_plan_options(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts for perplexity, KL divergence and agreement: UTF-8 files, directories (all"
        " their *.txt), or data sets of the library `datasets` as NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="tokens a chunk (default 2048, or as many as text and model allow)",
    )
    parser.add_argument(
        "--count", type=positive, metavar="N", help="chunks, evenly spaced (default: all)"
    )
    parser.add_argument(
        "--tasks",
        metavar="LIST",
        help="tasks of lm-evaluation-harness, by commas: names, YAML files, directories of them",
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="documents of each task (default: all)"
    )
    parser.add_argument(
        "--reference",
        metavar="WHAT",
        help="what to compare with: the directory of another model, program (the compiled model"
        " with nothing dropped, on all ranks) or none; default MODEL itself, unsharded, by"
        " transformers",
    )
    _add_running(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - is stdout")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")
    parser.add_argument(
        "--samples", metavar="FILE", help="write the answer to each document of the tasks as JSON"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="chunks or requests at a time (default 8)",
    )
    add_running_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.evaluating import evaluate_model

    return evaluate_model(arguments)

"""The options of `distill`; `distilling.py` beside it does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_plan_options, positive
from spdcompile.cli.running_options import add_storage_options
from spdcompile.cli.text_options import add_sampled_option, add_text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    add_plan_options(parser)
    add_text_options(parser)
    add_sampled_option(parser)
    parser.set_defaults(batch_size=4)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="a new or empty directory: a Hugging Face checkpoint, and spd_plan.json",
    )
    parser.add_argument(
        "--paper",
        metavar="RATE",
        type=float,
        help="the paper's settings at its learning rate: 5e-5 for LLaMA-2, 1e-6 for OPT; the"
        " options below change them",
    )
    _add_training(parser)
    add_storage_options(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="optimiser steps a segment")
    length.add_argument(
        "--epochs", type=float, metavar="N", help="passes over the text, in place of --steps"
    )
    parser.add_argument(
        "--logit-steps",
        type=int,
        metavar="N",
        help="further steps in the end for the logits of the whole model",
    )
    parser.add_argument(
        "--student-input",
        choices=("teacher", "progressive"),
        help="what a segment is fed: the original's hidden states, or what is before it by now",
    )
    parser.add_argument("--optimizer", choices=("muon", "adamw"))
    parser.add_argument("--schedule", choices=("linear", "cosine", "constant"))
    parser.add_argument("--learning-rate", type=float, metavar="RATE")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="of the text, to choose the best tensors by"
    )
    parser.add_argument(
        "--patience", type=positive, metavar="N", help="end after N checks that are no better"
    )
    parser.add_argument(
        "--rank-local-norms",
        action="store_const",
        const=True,
        help="norm weights of each rank's own during training, multiplied in afterwards",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.distilling import distill_model

    return distill_model(arguments)

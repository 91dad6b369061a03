"""The options of `tune`; `tuning.py` beside it does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import add_split_options, positive
from spdcompile.cli.text_options import add_sampled_option, add_text_options

UNMET = 1
"""The exit code where the best plan that was found does not keep to the budget."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="local directory with weights and tokenizer")
    add_split_options(parser)
    add_text_options(parser)
    add_sampled_option(parser)
    _add_budget(parser)
    parser.add_argument(
        "--validation",
        metavar="FILE",
        help="held-out text that judges budget and recovery (default: the last eighth of --text,"
        " which is then not trained on)",
    )
    parser.add_argument(
        "--points",
        choices=("all", "attn"),
        default="all",
        help="which sync points may go: all that can be dropped (default), or those of attention",
    )
    parser.add_argument(
        "--no-groups", action="store_true", help="never group heads, which captures the model anew"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="steps of a full distillation, per segment"
    )
    parser.add_argument(
        "--logit-steps",
        type=int,
        metavar="N",
        help="further steps in the end for the logits of the whole model",
    )
    parser.add_argument(
        "--search-steps",
        type=positive,
        metavar="N",
        help="steps of the short distillations of the search (default: a fifth)",
    )
    parser.add_argument(
        "--latencies",
        metavar="FILE",
        help="for --min-faster: a table of latencies, in place of measuring on this machine",
    )
    parser.add_argument(
        "--resume", metavar="DIR", help="keep results there; a run that was killed goes on"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write a Hugging Face checkpoint with spd_plan.json there"
    )
    parser.add_argument("--plan-only", metavar="FILE", help="write the plan alone")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget", "at least one; all that are given have to hold")
    group.add_argument(
        "--max-loss",
        type=share,
        metavar="SHARE",
        help="perplexity on held-out text rises by at most this: 1%% or 0.01",
    )
    group.add_argument(
        "--min-saved",
        type=share,
        metavar="SHARE",
        help="at least this share of the program's all-reduces is gone: 40%%",
    )
    group.add_argument(
        "--min-faster",
        type=share,
        metavar="SHARE",
        help="at least this share of the latency of a step is gone: 15%%",
    )


def share(text: str) -> float:
    """A share such as 1% or 0.01, for argparse."""
    number = text.removesuffix("%")
    return float(number) / (100 if text.endswith("%") else 1)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.tuning import tune_model

    return tune_model(arguments)

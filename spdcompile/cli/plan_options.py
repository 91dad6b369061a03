"""Options that describe a plan, shared by the commands that compile."""

from __future__ import annotations

import argparse


def add_split_options(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """Declares the number of ranks, and what routers read.

    Args:
        needed: whether nothing else says how many ranks there are.
    """
    parser.add_argument("--tp", type=positive, required=needed, metavar="N", help="number of ranks")
    parser.add_argument(
        "--router",
        choices=("exact", "replicated"),
        help="what the router of a mixture of experts reads where a dropped sync point is pending:"
        " exact (default) refuses the drop; replicated approximates by what all ranks share",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declares the same, what is dropped and what is split besides; or a plan that says so."""
    add_split_options(parser, needed=False)
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="a plan, such as the spd_plan.json beside its weights, in place of --tp and the like",
    )
    parser.add_argument(
        "--spd-mask",
        default="",
        metavar="RANGES",
        help="layers whose attention sync point is dropped: 0-20,25, all or none (default)",
    )
    parser.add_argument(
        "--drop",
        default="",
        metavar="POINTS",
        help="further sync points to drop: 3.mlp,4-6.attn",
    )
    parser.add_argument(
        "--vocab",
        choices=("split", "whole"),
        help="token embeddings: split over the ranks, for one more all-reduce, or whole on each;"
        " default split from 256 MiB on",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number

"""Options that describe a plan, shared by the commands that compile."""

from __future__ import annotations

import argparse


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Declares the number of ranks, and what routers read."""
    parser.add_argument("--tp", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--router",
        choices=("exact", "replicated"),
        default="exact",
        help="what the router of a mixture of experts reads where a dropped sync point is pending:"
        " exact (default) refuses the drop; replicated approximates by what all ranks share",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declares the same and what is dropped."""
    add_split_options(parser)
    parser.add_argument(
        "--spd-mask",
        default="none",
        metavar="RANGES",
        help="layers whose attention sync point is dropped: 0-20,25, all or none (default)",
    )
    parser.add_argument(
        "--drop",
        default="none",
        metavar="POINTS",
        help="further sync points to drop: 3.mlp,4-6.attn",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number

"""Options that name a calibration text, shared by the commands that measure on one."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Declares the text and how it is cut into chunks."""
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="calibration text: a UTF-8 file, a directory (all its *.txt), or a data set of the"
        " library `datasets` as NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="tokens a chunk (default 2048, or as many as text and model allow)",
    )
    parser.add_argument(
        "--count",
        type=positive,
        metavar="N",
        help="chunks, evenly spaced over the text (default 128, or as many as there are)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="chunks at a time (default 8)"
    )


def add_sampled_option(parser: argparse.ArgumentParser) -> None:
    """Declares text that the model adds to the calibration text, where something is trained."""
    parser.add_argument(
        "--sampled",
        type=positive,
        metavar="N",
        help="train on N more chunks that the model writes itself, from beginnings in the text",
    )

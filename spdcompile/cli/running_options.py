"""Options that say how a command runs, shared by several."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive


def add_running_options(parser: argparse.ArgumentParser) -> None:
    """Declares the dtype of the weights, what runs the blocks, and what is between ranks."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default that of the checkpoint",
    )
    parser.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        default="inductor",
        help="inductor (default) compiles first; eager starts at once and is slower",
    )
    parser.add_argument(
        "--transport",
        choices=("auto", "shared-memory", "sockets", "process-group"),
        default="auto",
        help="between ranks under torchrun: auto (default) is on CPU shared memory on one host and "
        "sockets across hosts, else gloo or NCCL",
    )
    parser.add_argument(
        "--blocks-per-graph",
        type=positive,
        default=1,
        metavar="N",
        help="consecutive blocks compiled as one (default 1): starts slower, steps faster",
    )


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """Declares where hidden states and results so far are kept."""
    parser.add_argument(
        "--memory",
        type=positive,
        default=1024,
        metavar="MIB",
        help="hidden states beyond this go to mapped files (default 1024)",
    )
    parser.add_argument("--scratch", metavar="DIR", help="where those files go (default: system's)")
    parser.add_argument(
        "--resume", metavar="DIR", help="keep results there; a run that was killed goes on"
    )

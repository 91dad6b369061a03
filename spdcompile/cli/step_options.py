"""Options that describe steps whose latencies are wanted, and the machines they are wanted of."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive

DTYPES = ("bfloat16", "float16", "float32")


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Declares the dtype, the sizes of a prefill and a decode step, and the file of a machine."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the parameters; default: the configuration's"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences (default 1)"
    )
    parser.add_argument(
        "--prompt", type=positive, default=128, metavar="N", help="tokens of prefill (default 128)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens of a sequence in decode, the new one included (default 2048)",
    )
    parser.add_argument(
        "--machine",
        metavar="FILE",
        help="devices and links besides the package's own, as measure-machine writes",
    )

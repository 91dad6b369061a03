"""The options of `bench`; `benching.py` beside it does the work."""

from __future__ import annotations

import argparse

from spdcompile.cli.plan_options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "model", metavar="MODEL", help="local directory; with config.json alone, random weights"
    )
    parser.add_argument("--tp", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and activations, for all variants (default float32)",
    )
    parser.add_argument(
        "--spd-mask",
        action="append",
        default=[],
        metavar="RANGES",
        help="also with attention dropped in these layers: 0-20,25 or all; may be repeated",
    )
    _add_steps(parser)
    parser.add_argument("--rounds", type=positive, metavar="N", help="default 20")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of each rank (default cores / ranks)"
    )
    parser.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        help="inductor (default); eager traces what is compiled and lowers nothing",
    )
    parser.add_argument(
        "--blocks-per-graph",
        type=positive,
        nargs="+",
        metavar="N",
        help="of this compiler's variants, each N by itself (default 1)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="these variants")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also the peak memory of each variant, in a launch of its own",
    )
    parser.add_argument(
        "--timeout", type=positive, default=3600, metavar="S", help="of the run (default 3600)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write bench.md, bench.json and bench.png there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short texts, 3 rounds, no Inductor: to see it work"
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", type=positive, nargs="+", metavar="N", help="TTFT of prompts (default 16 128)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        nargs="+",
        metavar="N",
        help="TPOT behind contexts (default 128)",
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", metavar="B", help="sizes for TPOT (default 1)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, metavar="N", help="timed behind each context (default 8)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here because torch takes seconds, which `--help` need not wait for.
    from spdcompile.cli.benching import bench_model

    return bench_model(arguments)

"""The command line: one row a command, and errors as messages."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spdcompile import __version__, log
from spdcompile.cli import (
    bench,
    calibrate,
    distill,
    estimate,
    evaluate,
    export_hf,
    generate,
    group_heads,
    measure_machine,
    replay,
    trace_and_report,
    tune,
)
from spdcompile.errors import SpdCompileError

OK, FAILED, USER_MISTAKE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the command line; importing its module must not import torch.

    Args:
        add_arguments: declares its options.
        run: does it; prints to stdout, returns the exit code.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = (
    Command(
        "trace-and-report",
        "say what of a model is split, synced and dropped, without its weights",
        trace_and_report.add_arguments,
        trace_and_report.run,
    ),
    Command(
        "estimate",
        "say what a step takes on devices and links that need not be here, and what a drop saves",
        estimate.add_arguments,
        estimate.run,
    ),
    Command(
        "replay",
        "run one rank of a model by itself, with random weights and waits in place of collectives",
        replay.add_arguments,
        replay.run,
    ),
    Command(
        "measure-machine",
        "measure this machine's products, streams and links, for `estimate --machine`",
        measure_machine.add_arguments,
        measure_machine.run,
    ),
    Command(
        "generate",
        "go on from a prompt, streamed; under torchrun, or all ranks in one process",
        generate.add_arguments,
        generate.run,
    ),
    Command(
        "calibrate",
        "measure what dropping each sync point costs on a text",
        calibrate.add_arguments,
        calibrate.run,
    ),
    Command(
        "eval",
        "measure a plan on texts and on tasks of lm-evaluation-harness, beside the unsharded model",
        evaluate.add_arguments,
        evaluate.run,
    ),
    Command(
        "bench",
        "measure time to first token and per token beside other ways to run the model, in one run",
        bench.add_arguments,
        bench.run,
    ),
    Command(
        "group-heads",
        "choose which heads share a rank, and write a plan",
        group_heads.add_arguments,
        group_heads.run,
    ),
    Command(
        "tune",
        "choose what to drop and how to recover, to a budget, and write plan and weights",
        tune.add_arguments,
        tune.run,
    ),
    Command(
        "distill",
        "train blocks to do without their sync points, and write a Hugging Face checkpoint",
        distill.add_arguments,
        distill.run,
    ),
    Command(
        "export-hf",
        "write an ordinary Hugging Face checkpoint, and the plan that its weights are for",
        export_hf.add_arguments,
        export_hf.run,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns: 0; 1 if the model cannot be compiled, or a budget not be met; 2 if the user asked for
        what cannot be had.
    """
    arguments = _parser().parse_args(argv)
    try:
        log.configure(os.environ)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SpdCompileError as error:
        return _report_error(error, os.environ)
    except BrokenPipeError:
        # The reader, such as `head`, has gone; what Python flushes at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spdcompile",
        description="Splits Hugging Face causal LMs over tensor-parallel ranks and drops "
        "all-reduces (Sync-Point Drop).",
    )
    parser.add_argument("--version", action="version", version=f"spdcompile {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.help, description=f"{command.help.capitalize()}."
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _report_error(error: SpdCompileError, environ: Mapping[str, str]) -> int:
    """Prints an error for its reader: a user's mistake is a message and never a traceback."""
    is_mistake = isinstance(error, ValueError)
    if environ.get(log.VARIABLE) and not is_mistake:
        traceback.print_exception(error)
    else:
        print(f"spdcompile: {error}", file=sys.stderr)
    return USER_MISTAKE if is_mistake else FAILED

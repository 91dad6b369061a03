"""Does what `replay` says: runs one rank with random weights, and waits in place of collectives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch

from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.errors import UsageError
from spdcompile.estimate import replays
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step
from spdcompile.plan import Plan
from spdcompile.report import describe_model
from spdcompile.report.text import render_model
from spdcompile.runtime.executor import Backend


def replay(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_target("--json", arguments.json)
    quiet_transformers()
    machines = Machines.load(arguments.machine)
    links = [machines.link(name) for name in arguments.link]
    device = _device(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    structure = Structure(arguments.model, dtype)
    rows = []
    for row in replays.replay(
        structure,
        list(_plans(arguments, structure.num_layers)),
        links,
        list(_steps(arguments)),
        device=device,
        backend=Backend(arguments.backend),
        rounds=arguments.rounds,
        graphs=not arguments.no_graph,
    ):
        rows.append(row)
    described = describe_model(structure.model)
    if arguments.json:
        found = {"model": asdict(described), "tp": arguments.tp, "device": _name(device)}
        document = {**found, "rows": replays.data_of(rows)}
        write_output("--json", arguments.json, json.dumps(document, indent=2))
    if arguments.json != STDOUT:
        title = f"One rank of {arguments.tp} on {_name(device)}, random weights"
        print(f"{render_model(described, arguments.tp)}\n\n{title}\n{replays.table_of(rows)}")
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "The device cannot be used.",
            where=f"--device {name}",
            found=str(error).splitlines()[0],
            needed="cpu, or a CUDA device of this machine",
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            "A rank cannot run there.", where=f"--device {name}", needed="cpu, or a CUDA device"
        )
    return device


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def _plans(arguments: argparse.Namespace, num_layers: int) -> Iterator[Plan]:
    for share in sorted({*(arguments.share or (0, 50, 70, 100))}):
        layers = range(round(num_layers * share / 100))
        yield Plan(arguments.tp, num_layers, frozenset((layer, "attn") for layer in layers))


def _steps(arguments: argparse.Namespace) -> Iterator[Step]:
    for batch in arguments.batch or (1, 8, 32):
        for tokens in arguments.prompt or (128, 2048):
            yield Step(batch, tokens)
        for tokens in arguments.context or (128, 2048):
            yield Step(batch, 1, tokens - 1)

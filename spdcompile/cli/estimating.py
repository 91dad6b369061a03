"""Does what `estimate` says: counts a model's work without weights, and says how long it is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from spdcompile.cli.plans import plan_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.estimate.estimates import estimate_of, steps_of
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.structure import Structure
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.report import describe_model
from spdcompile.report.text import render_model


def estimate(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_target("--json", arguments.json)
    quiet_transformers()
    machines = Machines.load(arguments.machine)
    device, link = machines.device(arguments.device), machines.link(arguments.link)
    steps = steps_of(arguments.batch, arguments.prompt, arguments.context)
    structure = structure_of(arguments)
    plan = plan_of(arguments, structure.num_layers)
    found = estimate_of(structure, plan, device, link, steps)
    described = describe_model(structure.model)
    if arguments.json:
        document = {"model": asdict(described), **found.to_dict()}
        write_output("--json", arguments.json, json.dumps(document, indent=2))
    if arguments.json != STDOUT:
        print(f"{render_model(described, plan.tp)}\n\n{found}")
    return 0


def structure_of(arguments: argparse.Namespace) -> Structure:
    """The model that `step_options` and `plan_options` describe."""
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return Structure(arguments.model, dtype, Vocabulary(arguments.vocab or Vocabulary.BY_SIZE))

"""Does what `distill` says: trains blocks without their sync points, and writes a checkpoint."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import spdcompile
from spdcompile.cli.plans import plan_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.reading import read_tokens
from spdcompile.errors import UsageError
from spdcompile.export import check_empty, export_hf
from spdcompile.models import resolve_model
from spdcompile.passes.capture import decoder_layers
from spdcompile.planning import structure_of
from spdcompile.runtime.distill_settings import DistillSettings, StudentInput
from spdcompile.runtime.distilled import SegmentHistory
from spdcompile.runtime.training import Optimizer, Schedule

_KINDS = {"student_input": StudentInput, "optimizer": Optimizer, "schedule": Schedule}
_GIVEN = ("logit_steps", "learning_rate", "held_out", "patience", "rank_local_norms")


def distill_model(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_empty(Path(arguments.output))
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    plan = plan_of(arguments, len(decoder_layers(model)[1]))
    if not plan.dropped:
        raise UsageError(
            "Nothing is dropped, so there is nothing to distil.",
            where="--spd-mask, --drop or --plan",
            needed="sync points to drop",
        )
    settings = _settings(arguments)
    tokens = read_tokens(arguments, model)
    if arguments.sampled:
        sampled = spdcompile.sampled_chunks(
            arguments.model, tokens, count=arguments.sampled, progress=sys.stderr.isatty()
        )
        # The text comes last: the best tensors are chosen by the last chunks.
        tokens = torch.cat([sampled, tokens])
    distilled = spdcompile.distill(
        arguments.model,
        tokens,
        tp=plan.tp,
        spd_mask=plan,
        settings=settings,
        progress=sys.stderr.isatty(),
    )
    history = [asdict(entry) for entry in distilled.history]
    measured = {**plan.measured, "distillation": history}
    plan = replace(plan, model=structure_of(model), measured=measured)
    export_hf(arguments.model, arguments.output, plan=plan, tensors=distilled.tensors)
    print(_report(distilled.history))
    print(f"\nWritten to {arguments.output}")
    return 0


def _settings(arguments: argparse.Namespace) -> DistillSettings:
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _GIVEN}
    for name, kind in _KINDS.items():
        value = getattr(arguments, name)
        given[name] = None if value is None else kind(value)
    changed = {name: value for name, value in given.items() if value is not None}
    if arguments.epochs is not None:
        changed |= {"steps": None, "epochs": arguments.epochs}
    elif arguments.steps is not None:
        changed["steps"] = arguments.steps
    places = {
        "batch_size": arguments.batch_size,
        "memory_bytes": arguments.memory * 2**20,
        "scratch": arguments.scratch,
        "resume": arguments.resume,
    }
    if arguments.paper is None:
        return DistillSettings(**changed, **places)
    return DistillSettings.paper(**{"learning_rate": arguments.paper, **changed, **places})


def _report(history: tuple[SegmentHistory, ...]) -> str:
    """What each segment's training gave."""
    rows = [
        (
            f"{entry.layers[0]}-{entry.layers[-1]}"
            if len(entry.layers) > 1
            else str(entry.layers[0]),
            "logits, KL" if entry.loss == "kl" else "hidden states, MSE",
            f"{entry.before:.5g}",
            f"{entry.after:.5g}",
            entry.steps,
        )
        for entry in history
    ]
    headers = ["layers", "compared", "before", "after", "steps"]
    return tabulate(rows, headers, disable_numparse=True)

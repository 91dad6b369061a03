"""Does what `export-hf` says: an ordinary checkpoint out of an artefact, or a model and a plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from spdcompile.cli.quiet import quiet_transformers
from spdcompile.errors import UsageError
from spdcompile.export import export_hf
from spdcompile.loading import load_model
from spdcompile.manifest import MANIFEST, Manifest
from spdcompile.plan import PLAN_FILE, Plan


def export(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    quiet_transformers()
    source, target = Path(arguments.source), Path(arguments.target)
    is_artefact = (source / MANIFEST).exists()
    if is_artefact == (arguments.plan is not None):
        raise UsageError(
            "An artefact brings its own plan." if is_artefact else "A plan is missing.",
            where="--plan",
            found=f"{source}, {'an' if is_artefact else 'no'} artefact",
            needed="no --plan" if is_artefact else "--plan FILE, or a directory that `save` wrote",
        )
    if is_artefact:
        manifest = Manifest.read(source)
        manifest.check(load_model(manifest.weights, manifest.dtype))
        source, plan = manifest.weights, manifest.plan
    else:
        plan = Plan.load(arguments.plan)
    export_hf(source, target, plan=plan)
    dropped = f"{len(plan.dropped)} sync points dropped at tp {plan.tp}"
    print(f"{target}: a Hugging Face checkpoint, and {PLAN_FILE}: {dropped}")
    return 0

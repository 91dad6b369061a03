"""Does what `group-heads` says: finds head groups, prints them and writes the plan."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from tabulate import tabulate

import spdcompile
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.ranges import dropped_points, parse_layers
from spdcompile.cli.reading import read_tokens
from spdcompile.cli.writing import check_target
from spdcompile.grouping import HeadGrouping
from spdcompile.models import resolve_model
from spdcompile.passes.capture import decoder_layers
from spdcompile.runtime.grouping import Search

_HEADERS = [
    "layer",
    "units of each rank",
    "KL",
    "the paper's",
    "as it was",
    "distance",
    "MLP norms",
]


def group_model_heads(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_target("--output", arguments.output)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    num_layers = len(decoder_layers(model)[1])
    points = dropped_points(arguments, num_layers)
    layers = parse_layers(arguments.layers, num_layers, option="--layers")
    found = spdcompile.group_heads(
        arguments.model,
        read_tokens(arguments, model),
        tp=arguments.tp,
        layers=layers,
        draws=arguments.draws,
        router=arguments.router,
        progress=sys.stderr.isatty(),
    )
    replace(found.plan, dropped=points).save(arguments.output)
    print(_report(found))
    print(f"\nWritten to {arguments.output}")
    return 0


def _report(found: HeadGrouping) -> str:
    rows = [
        (
            row.layer,
            " ".join(",".join(map(str, units)) or "-" for units in row.groups),
            *("-" if kl is None else f"{kl:.5f}" for kl in (row.kl, row.kl_paper, row.kl_even)),
            f"{row.distance:.3f} ({row.distance_even:.3f})",
            f"{row.norm:.2f} ({row.norm_unmatched:.2f})",
        )
        for row in found.layers
    ]
    lines = [
        tabulate(rows, _HEADERS, disable_numparse=True),
        "KL divergence per token with the layer's attention point dropped; distances and norms are"
        " those of the paper's groups, in brackets those of the even split and unmatched.",
    ]
    searches = {row.search for row in found.layers}
    if Search.NOTHING in searches:
        lines.append("One unit a rank: nothing to choose; only the matching to MLP shards acts.")
    if Search.LOCAL in searches:
        lines.append("Found by local search: there may be better groups.")
    lines += [f"Layer {layer} as it was: {why}" for layer, why in found.refused.items()]
    return "\n".join(lines)

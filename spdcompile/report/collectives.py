"""Counts the collectives of a program, and the bytes that they move for one token."""

from __future__ import annotations

import math

import torch
from torch import fx

from spdcompile.passes.base import BlockGraph, Part, Program
from spdcompile.passes.concrete import shape_at_one
from spdcompile.passes.ops import GATHER, SYNC
from spdcompile.report.blocks import merged_points
from spdcompile.report.data import Collectives


def count_collectives(program: Program) -> Collectives:
    """What one forward pass communicates, before and after the drop."""
    blocks = [program.graph_of(part) for part in program.parts]
    kept = {key: _bytes_of(block, SYNC) for key, block in program.graphs.items()}
    gathered = {key: _bytes_of(block, GATHER) for key, block in program.graphs.items()}
    remaining = [size for part in program.parts for size in kept[part.graph]]
    dropped = [size for part in program.parts for size in _dropped_bytes(program, part)]
    gathers = [size for part in program.parts for size in gathered[part.graph]]
    return Collectives(
        plain_all_reduces=sum(len(block.partials) for block in blocks),
        merged_all_reduces=len(remaining) + len(dropped),
        all_reduces=len(remaining),
        gathers=len(gathers),
        merged_bytes_per_token=sum(remaining) + sum(dropped),
        bytes_per_token=sum(remaining),
        gather_bytes_per_token=sum(gathers),
    )


def _bytes_of(block: BlockGraph, target: object) -> list[int]:
    """Bytes for one token of each collective of a kind, one sequence of one token."""
    nodes = block.module.graph.nodes
    return [_num_bytes(node.args[0]) for node in nodes if node.target is target]


def _dropped_bytes(program: Program, part: Part) -> list[int]:
    """Bytes for one token that each dropped point of a part would have summed."""
    if not part.dropped:
        return []
    block = program.graph_of(part)
    weights = {region.name: set(region.rows) for region in block.regions}
    sizes = {}
    for name, into in merged_points(program, part):
        for node in block.module.graph.nodes:
            operands = [arg.name for arg in node.all_input_nodes]
            if node.op == "call_function" and weights[name] & set(operands):
                sizes[into] = _num_bytes(node)
    return [sizes[name] for name in part.dropped]


def _num_bytes(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return math.prod(shape_at_one(value)) * value.dtype.itemsize

"""From a program to data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import BlockGraph, CacheSpec, ParamRef, Part, Program
from spdcompile.passes.layout import Assignment, Layout
from spdcompile.passes.placement.types import Shard
from spdcompile.passes.tokens import TOKENS
from spdcompile.passes.written.vocabulary import FORMAT, PLAIN, name_of


class NotSerializableError(Exception):
    """A program calls code that data cannot describe."""


def to_data(program: Program) -> dict[str, Any]:
    """A program as JSON data; the constants' tensors are not in it.

    Raises:
        NotSerializableError: it calls code that no graph can hold.
    """
    assignments: dict[Assignment, int] = {}
    return {
        "format": FORMAT,
        "graphs": {key: _graph_data(block) for key, block in program.graphs.items()},
        "parts": [_part_data(part, assignments) for part in program.parts],
        "assignments": [[_ranges(units) for units in ranks] for ranks in assignments],
        "inputs": list(program.inputs),
        "output": program.output,
        "layers": program.layers,
        "tp": program.tp,
        "positions": None if program.positions is None else program.positions.name,
        "refusals": [[r.subject, r.reason] for r in program.refusals],
        "min_length": program.min_length,
        "max_length": program.max_length,
        "one_start": program.one_start,
    }


def _graph_data(block: BlockGraph) -> dict[str, Any]:
    *nodes, output = block.module.graph.nodes
    return {
        "nodes": [_node_data(node) for node in nodes],
        "output": [node.name for node in output.args[0]],
        "sync_points": [[p.name, list(p.merged), p.refusal, p.routed] for p in block.sync_points],
    }


def _node_data(node: fx.Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name}
    placement = node.meta["placement"]
    if isinstance(placement, Shard):
        data["placement"] = {"dim": placement.dim, "layout": _layout_data(placement.layout)}
    elif isinstance(placement, list):
        data["placement"] = "R"  # of a list, whose items are placed themselves
    else:
        data["placement"] = str(placement)
    if isinstance(node.meta.get(TOKENS), int):
        data["tokens"] = node.meta[TOKENS]
    if node.op == "call_function":
        data["call"] = _target_name(node.target)
        data["args"] = [_arg_data(arg) for arg in node.args]
        data["kwargs"] = {name: _arg_data(arg) for name, arg in node.kwargs.items()}
    return data


def _target_name(target: Any) -> str:
    name = name_of(target)
    if name is None:
        raise NotSerializableError(f"it calls {target}, which data cannot describe")
    return name


def _arg_data(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"node": arg.name}
    if isinstance(arg, list | tuple):
        return [_arg_data(item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    if isinstance(arg, torch.device):
        return {"device": arg.type}
    for kind, cls in PLAIN.items():
        if isinstance(arg, cls):
            return {kind: str(arg).removeprefix("torch.")}
    raise NotSerializableError(f"it has an argument of type {type(arg).__name__}")


def _layout_data(layout: Layout) -> dict[str, Any]:
    runs = [[run.length, run.each, run.group] for run in layout.runs]
    return {
        "region": layout.region,
        "num_units": layout.num_units,
        "copies": layout.copies,
        "runs": runs,
    }


def _part_data(part: Part, assignments: dict[Assignment, int]) -> dict[str, Any]:
    return {
        "name": part.name,
        "layer": part.layer,
        "graph": part.graph,
        "params": {name: _param_data(ref) for name, ref in part.params.items()},
        "inputs": dict(part.inputs),
        "outputs": list(part.outputs),
        "assignments": {
            region: assignments.setdefault(units, len(assignments))
            for region, units in part.assignments.items()
        },
        "dropped": list(part.dropped),
        "module": part.module,
        "caches": {name: _cache_data(spec) for name, spec in part.caches.items()},
    }


def _param_data(ref: ParamRef) -> dict[str, Any]:
    data = {field.name: getattr(ref, field.name) for field in fields(ref)}
    return data | {"shape": list(ref.shape), "dtype": str(ref.dtype).removeprefix("torch.")}


def _cache_data(spec: CacheSpec) -> dict[str, Any]:
    data = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return data | {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}


def _ranges(units: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as stretches, [first, last + 1]."""
    ranges: list[list[int]] = []
    for unit in units:
        if ranges and ranges[-1][1] == unit:
            ranges[-1][1] += 1
        else:
            ranges.append([unit, unit + 1])
    return ranges

"""From data to a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from spdcompile.errors import ArtefactError
from spdcompile.passes.base import (
    BlockGraph,
    CacheSpec,
    Invariant,
    ParamRef,
    Part,
    Positions,
    Program,
    Refusal,
    SyncPoint,
)
from spdcompile.passes.layout import EVERY, Assignment, Layout, shard_spec
from spdcompile.passes.placement.types import P, R, Shard, V
from spdcompile.passes.tokens import TOKENS
from spdcompile.passes.verify import verify
from spdcompile.passes.written.vocabulary import FORMAT, flag, plain, target_of, text, texts, whole

_MOST_UNITS = 2**24  # of a split dim; more than any vocabulary or intermediate size
_MOST_RANKS = 4096
_PLACEMENTS = {"R": R, "P": P, "V": V}


def from_data(data: Any, constants: Mapping[str, torch.Tensor]) -> Program:
    """The program that `to_data` described.

    Args:
        constants: the program's constants, which are not in the data.

    Raises:
        ArtefactError: the data is no such description.
    """
    try:
        program = _program(data, constants)
        verify(program, frozenset({Invariant.WELL_FORMED, Invariant.SPLIT, Invariant.LOCAL}))
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(
            "This is not a program.",
            found=f"{type(error).__name__}: {error}",
            needed=f"JSON data of the format {FORMAT}",
        ) from error
    return program


def _program(data: Any, constants: Mapping[str, torch.Tensor]) -> Program:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}")
    tp = whole(data["tp"], 1, _MOST_RANKS)
    assignments = [_assignment(ranks, tp) for ranks in data["assignments"]]
    graphs = {text(key): _graph(graph) for key, graph in data["graphs"].items()}
    positions = data["positions"]
    longest = data["max_length"]
    return Program(
        graphs=graphs,
        parts=tuple(_part(part, graphs, assignments) for part in data["parts"]),
        inputs=texts(data["inputs"]),
        output=text(data["output"]),
        layers=text(data["layers"]),
        tp=tp,
        positions=None if positions is None else Positions[positions],
        constants=dict(constants),
        refusals=tuple(Refusal(text(s), text(reason)) for s, reason in data["refusals"]),
        min_length=whole(data["min_length"], 1),
        max_length=None if longest is None else whole(longest, 1),
        one_start=flag(data["one_start"]),
    )


def _graph(data: Any) -> BlockGraph:
    graph, nodes = fx.Graph(), {}
    for item in data["nodes"]:
        name = text(item["name"])
        if not name.isidentifier() or name in nodes:
            raise ValueError(f"a node named {name!r}")
        if "call" in item:
            args = tuple(_arg(arg, nodes) for arg in item["args"])
            kwargs = {text(key): _arg(arg, nodes) for key, arg in item["kwargs"].items()}
            node = graph.create_node("call_function", target_of(item["call"]), args, kwargs, name)
        else:
            node = graph.placeholder(name)
        if node.name != name:
            raise ValueError(f"a node named {name!r}")
        node.meta["placement"] = _placement(item["placement"])
        if "tokens" in item:
            node.meta[TOKENS] = whole(item["tokens"], 0, 8)
        nodes[name] = node
    graph.output(tuple(nodes[name] for name in data["output"]))
    points = tuple(
        SyncPoint(text(name), texts(merged), text(refusal), flag(routed))
        for name, merged, refusal, routed in data["sync_points"]
    )
    return BlockGraph(fx.GraphModule({}, graph), sync_points=points)


def _arg(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_arg(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return nodes[value]
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(text(value))
    return plain(kind, value)


def _placement(data: Any) -> Any:
    if isinstance(data, str):
        return _PLACEMENTS[data]
    return Shard(whole(data["dim"], 0, 8), _layout(data["layout"]))


def _layout(data: Any) -> Layout:
    num_units = whole(data["num_units"], 1, _MOST_UNITS)
    runs = [tuple(whole(n, 0, _MOST_UNITS) for n in run) for run in data["runs"]]
    if sum(length for length, _, _ in runs) > _MOST_UNITS:
        raise ValueError("a dim of more indices than any model has")
    owners = []
    for length, each, group in runs:
        if not each:
            owners.append(np.full(length, EVERY))
            continue
        if not group or num_units // group * each != length:
            raise ValueError(f"a run of {length} indices for {num_units} units")
        first = 0 if group == 1 else num_units
        owners.append(first + np.repeat(np.arange(num_units // group), each))
    copies = whole(data["copies"], 1, _MOST_UNITS)
    return Layout(text(data["region"]), num_units, np.concatenate(owners), copies)


def _assignment(data: Any, tp: int) -> Assignment:
    if len(data) != tp:
        raise ValueError(f"units of {len(data)} ranks")
    count, ranks = 0, []
    for ranges in data:
        bounds = [(whole(a, 0, _MOST_UNITS), whole(b, 0, _MOST_UNITS)) for a, b in ranges]
        count += sum(max(b - a, 0) for a, b in bounds)
        if count > _MOST_UNITS:
            raise ValueError("more units than any model has")
        ranks.append(tuple(unit for a, b in bounds for unit in range(a, b)))
    return tuple(ranks)


def _part(data: Any, graphs: Mapping[str, BlockGraph], assignments: Sequence[Assignment]) -> Part:
    layer, own = data["layer"], {}
    for region, number in data["assignments"].items():
        own[text(region)] = assignments[whole(number, 0)]
    params = {text(name): _param(ref) for name, ref in data["params"].items()}
    shards = {}
    for node in graphs[data["graph"]].module.graph.find_nodes(op="placeholder"):
        placement = node.meta["placement"]
        if node.name in params and isinstance(placement, Shard):
            units = own[placement.layout.region]
            shards[node.name] = shard_spec(placement.layout, placement.dim, units)
    return Part(
        name=text(data["name"]),
        layer=None if layer is None else whole(layer, 0),
        graph=text(data["graph"]),
        params=params,
        inputs={text(name): text(value) for name, value in data["inputs"].items()},
        outputs=texts(data["outputs"]),
        shards=shards,
        assignments=own,
        dropped=texts(data["dropped"]),
        module=text(data["module"]),
        caches={text(name): _cache(spec) for name, spec in data["caches"].items()},
    )


def _param(data: Any) -> ParamRef:
    return ParamRef(
        fqn=text(data["fqn"]),
        shape=tuple(whole(size, 0) for size in data["shape"]),
        dtype=plain("dtype", data["dtype"]),
        transposed=flag(data["transposed"]),
        constant=flag(data["constant"]),
    )


def _cache(data: Any) -> CacheSpec:
    shape = tuple(whole(size, 0, _MOST_UNITS) for size in data["shape"])
    return CacheSpec(
        shape=shape,
        dtype=plain("dtype", data["dtype"]),
        dim=whole(data["dim"], 0, len(shape) - 1),
        span=whole(data["span"], 0),
        per_rank=flag(data["per_rank"]),
    )

"""What head grouping measures: how far heads are apart, and how large MLP shards' outputs are.

Shapes: R ranks, B batch, S tokens, H query heads of all ranks, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spdcompile.passes.base import Part, Program, RegionKind
from spdcompile.passes.layout import Assignment
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.probe import (
    PARTIAL,
    AttentionInputs,
    attention_of,
    attention_probe,
    mlp_probe,
    partial_probe,
)
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor

Values = dict[str, Tensor]


def head_distances(
    plain: LocalExecutor, tokens: Tensor, layers: frozenset[int], *, progress: bool = True
) -> dict[int, np.ndarray]:
    """How far the attention scores of units are apart on calibration data.

    The distance of two heads is the Euclidean one between their attention probabilities over all
    queries of all chunks, divided by the root of the number of queries; that of two units is the
    sum over the pairs of their heads (SPD, arXiv 2502.20727, head grouping).

    Args:
        plain: runs the program that drops nothing.
        tokens: int64 [chunks, length].
        layers: those to measure; each has one attention.

    Returns: layer -> float64 [U, U], zero on the diagonal.
    """
    probe = plain.with_program(attention_probe(plain.program, layers))
    products: dict[int, Tensor] = {}
    for part, values in _blocks(plain, tokens, layers, "attention scores", progress):
        inputs = attention_of(plain.program.graph_of(part))
        assert inputs is not None and part.layer is not None, "checked before"
        found = probe.call(probe.program.parts[_place(plain.program, part)], values)
        product = _products(found, inputs, plain.program.tp)
        products[part.layer] = products.get(part.layer, 0) + product
    distances = {}
    for part in plain.program.parts:
        if part.layer in products:
            heads = _apart(products[part.layer]) / tokens.numel() ** 0.5
            distances[part.layer] = _by_units(heads, attention_units(plain.program, part))
    return distances


def attention_units(program: Program, part: Part) -> Assignment:
    """The units of a block's attention on each rank."""
    regions = program.graph_of(part).regions
    (name,) = [region.name for region in regions if region.kind is RegionKind.ATTENTION]
    return part.assignments[name]


def shard_norms(
    plain: LocalExecutor,
    tokens: Tensor,
    layers: frozenset[int],
    point: str,
    *,
    progress: bool = True,
) -> dict[int, np.ndarray]:
    """How large the output of each MLP shard is beside each rank's attention.

    Args:
        plain: runs the program that drops nothing, with the head groups to be matched.
        layers: those to measure; each has the sync point and a later one.
        point: the attention's sync point.

    Returns: layer -> float64 [R, R]; entry g, r is the norm, over all tokens, of what the MLP shard
        of rank r gives where it sees X + the share that the heads of rank g add to it.
    """
    program, tp = plain.program, plain.program.tp
    shares = plain.with_program(partial_probe(program, layers, point))
    shards = plain.with_program(mlp_probe(program, layers, point))
    squares: dict[int, np.ndarray] = {}
    for part, values in _blocks(plain, tokens, layers, "MLP outputs", progress):
        assert part.layer is not None, "only blocks are measured"
        place = _place(program, part)
        share = shares.call(shares.program.parts[place], values)[PARTIAL]
        found = squares.setdefault(part.layer, np.zeros((tp, tp)))
        for shift in range(tp):
            # Rank r goes on from what rank r - shift added.
            given = {**values, PARTIAL: share.roll(shift, 0)}
            output = shards.call(shards.program.parts[place], given)[PARTIAL]
            squared = output.double().square().flatten(1).sum(1).cpu().numpy()
            ranks = np.arange(tp)
            found[(ranks - shift) % tp, ranks] += squared
    return {layer: np.sqrt(found) for layer, found in squares.items()}


@torch.no_grad()
def _blocks(
    plain: LocalExecutor, tokens: Tensor, layers: frozenset[int], title: str, progress: bool
) -> Iterator[tuple[Part, Values]]:
    """Each of some blocks, with the values of a plain run before it, chunk by chunk.

    One chunk at a time: attention scores are by far larger than hidden states.
    """
    last = max(layers)
    with tqdm(
        total=len(tokens) * len(layers), desc=title, unit="block", disable=not progress
    ) as bar:
        for chunk in tokens.split(1):
            values = program_inputs(plain.program, chunk.to(plain.device))
            for part in plain.program.parts:
                if part.layer in layers:
                    yield part, values
                    bar.update()
                if part.layer == last:
                    break
                values.update(plain.call(part, values))


def _place(program: Program, part: Part) -> int:
    return program.parts.index(part)


def _products(found: Mapping[str, Tensor], inputs: AttentionInputs, tp: int) -> Tensor:
    """Scalar products of all heads' attention probabilities, float64 [H, H]."""
    ranks = []
    for rank in range(tp):
        own = {name: x[rank] if inputs.stacked[name] else x for name, x in found.items()}
        ranks.append(_probabilities(own["q"], own["k"], own["valid"], own.get("sinks"), inputs))
    heads = torch.cat(ranks, 1).transpose(0, 1).flatten(1).float()
    return (heads @ heads.T).double().cpu()


def _probabilities(
    q: Tensor, k: Tensor, valid: Tensor, sinks: Tensor | None, inputs: AttentionInputs
) -> Tensor:
    """q [B, h, S, D], k [B, g, S, D] -> [B, h, S, S]: attention to values that are unit vectors."""
    length = q.shape[2]
    units = torch.eye(length, dtype=q.dtype, device=q.device)
    v = units.expand(*k.shape[:2], length, length)
    return ATTENTION(q, k, v, valid, sinks, *inputs.settings).transpose(1, 2)


def _apart(products: Tensor) -> np.ndarray:
    """Euclidean distances from scalar products, [H, H]."""
    squares = products.diagonal()
    apart = squares[:, None] + squares[None] - 2 * products
    return apart.clamp(min=0).sqrt().numpy()


def _by_units(heads: np.ndarray, assignment: Assignment) -> np.ndarray:
    """Distances of heads, in order of the ranks, summed by pairs of units.

    A rank's heads are those of its units in ascending order, as many each; missing units are zero.
    """
    units_per_rank = max(len(units) for units in assignment)
    per_unit = len(heads) // (units_per_rank * len(assignment))
    slots = [[*sorted(units), *[-1] * (units_per_rank - len(units))] for units in assignment]
    owners = np.repeat(np.array(slots).reshape(-1), per_unit)
    num_units = sum(len(units) for units in assignment)
    member = (owners[:, None] == np.arange(num_units)).astype(float)  # [H, U]
    by_units = member.T @ heads @ member
    np.fill_diagonal(by_units, 0.0)
    return by_units


def matched(norms: np.ndarray, groups: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The groups in order of the ranks at which the sum of the MLP shards' norms is largest.

    Args:
        norms: as `shard_norms` gives them, for these groups in this order.
    """
    group, rank = _matching(norms)
    return tuple(groups[group[place]] for place in np.argsort(rank))


def largest_sum(norms: np.ndarray) -> float:
    """The sum of the MLP shards' norms after that matching."""
    return float(norms[_matching(norms)].sum())


def _matching(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, and for each a column of its own, with the largest sum of weights.

    Networkx and not scipy, whose presence takes 36 MB of every rank.
    """
    count = len(weights)
    graph = nx.Graph()
    for row, column in np.ndindex(*weights.shape):
        graph.add_edge(row, count + column, weight=float(weights[row, column]))
    pairs = map(sorted, nx.max_weight_matching(graph, maxcardinality=True))
    rows, columns = zip(*sorted(pairs), strict=True)
    return np.array(rows), np.array(columns) - count

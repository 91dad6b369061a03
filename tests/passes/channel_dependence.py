"""Checks by perturbation that following channels loses no dependence.

Each element of an operand is moved, one at a time; the result elements that change must be in its
class. Real sizes throughout: a rule follows ids of any shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from spdcompile.passes._torch import pytree
from spdcompile.passes.placement import Rule
from spdcompile.passes.placement.channels import Channels
from spdcompile.passes.placement.types import Call, Operand
from tests.passes.sample import Sample


@dataclass(frozen=True)
class Followed:
    """Classes along one call.

    Args:
        before: operand that has ids -> class of each of its elements.
        after: class of each element of the results, -1 where none, all results in one row.
        whole: classes that must be the same on all ranks, so that nothing needs to carry them.
    """

    before: dict[int, np.ndarray]
    after: np.ndarray
    whole: np.ndarray


def follow(sample: Sample, rule: Rule, carrying: set[int]) -> Followed:
    """Follows fresh ids on the operands numbered in `carrying`."""
    channels, ids = Channels(), {}
    for index in carrying:
        shape = sample.tensors[index].shape
        ids[index] = channels.fresh(shape.numel()).view(shape)
    out = rule.follow(with_ids(sample.real, ids), channels)
    outs = [out] if isinstance(out, Tensor) or out is None else out
    flat = torch.cat(
        [
            torch.full((whole.numel(),), -1) if piece is None else piece.reshape(-1)
            for piece, whole in zip(outs, sample.whole, strict=True)
        ]
    )
    classes = channels.classes()
    after = np.where(flat >= 0, classes[flat.clamp(min=0).numpy()] if len(classes) else -1, -1)
    before = {index: classes[given.reshape(-1).numpy()] for index, given in ids.items()}
    needed = [ids for ids, _ in channels.opaque]
    whole = classes[torch.cat(needed).unique().numpy()] if needed else np.zeros(0, dtype=np.int64)
    return Followed(before, after, whole)


def with_ids(call: Call, ids: dict[int, Tensor]) -> Call:
    """The call with ids on the operands that `ids` numbers."""
    numbers = iter(range(len(call.operands())))

    def swap(leaf: object) -> object:
        return replace(leaf, ids=ids.get(next(numbers))) if isinstance(leaf, Operand) else leaf

    args = pytree.tree_map(swap, call.args, is_leaf=lambda leaf: isinstance(leaf, Operand))
    return replace(call, args=args)


def dependence(sample: Sample, index: int) -> np.ndarray:
    """Which result elements change with which elements of an operand, bool [elements, results]."""
    whole = _flat(sample.whole)
    operand = sample.tensors[index]
    changed = []
    for element in range(operand.numel()):
        moved_either_way = torch.zeros_like(whole, dtype=torch.bool)
        for step in (10.0, -10.0) if operand.is_floating_point() else (1.0,):
            moved = operand.clone().reshape(-1)
            moved[element] = ~moved[element] if moved.dtype == torch.bool else moved[element] + step
            tensors = list(sample.tensors)
            tensors[index] = moved.view(operand.shape)
            moved_either_way |= _flat(sample.run(sample.real, tensors)) != whole
        changed.append(moved_either_way)
    return torch.stack(changed).numpy()


def num_connected(changed: np.ndarray) -> int:
    """Number of classes of elements that share a result element."""
    elements = changed.shape[0]
    rows, columns = np.nonzero(changed)
    graph = nx.empty_graph(elements)
    graph.add_edges_from(zip(rows.tolist(), (elements + columns).tolist(), strict=True))
    return nx.number_connected_components(graph)


def _flat(results: list[Tensor]) -> Tensor:
    return torch.cat([result.reshape(-1) for result in results])

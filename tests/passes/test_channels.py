"""Classes of channels against networkx's connected components."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spdcompile.passes.placement.channels import connected


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    count = draw(st.integers(1, 40))
    ids = st.integers(0, count - 1)
    pairs = draw(st.lists(st.tuples(ids, ids), max_size=60))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T, count


@given(_pairs())
def test_classes_are_the_connected_components(drawn: tuple[np.ndarray, int]) -> None:
    pairs, count = drawn
    graph = nx.empty_graph(count)
    graph.add_edges_from(pairs.T.tolist())
    expected = np.empty(count, dtype=np.int64)
    for number, ids in enumerate(sorted(nx.connected_components(graph), key=min)):
        expected[list(ids)] = number
    assert np.array_equal(connected(pairs, count), expected)


def test_long_chains_take_few_rounds() -> None:
    """Ids in random order along a chain: each round joins many."""
    count = 10**6
    order = np.random.default_rng(0).permutation(count)
    pairs = np.stack([order[:-1], order[1:]])
    assert not connected(pairs, count).any()

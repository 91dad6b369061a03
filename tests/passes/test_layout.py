"""Layouts and shard specs over random units, runs and assignments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdcompile.passes.layout import (
    Assignment,
    Layout,
    ShardSpec,
    UnevenLayoutError,
    even_split,
    shard_spec,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Units in one to four runs, each run with its own number of indices per unit."""
    num_units = draw(st.integers(2, 7))
    runs = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return Layout("region", num_units, _owners(num_units, runs))


@st.composite
def assignments(draw: st.DrawFn, num_units: int) -> Assignment:
    """Any units on any rank, at least one rank with none allowed."""
    tp = draw(st.integers(1, num_units + 1))
    ranks = draw(st.lists(st.integers(0, tp - 1), min_size=num_units, max_size=num_units))
    units = draw(st.permutations(range(num_units)))
    return tuple(
        tuple(unit for unit, rank in zip(units, ranks, strict=True) if rank == this)
        for this in range(tp)
    )


def _owners(num_units: int, runs: list[int]) -> np.ndarray:
    return np.concatenate([np.repeat(np.arange(num_units), each) for each in runs])


@given(st.data())
def test_unsharding_shards_gives_the_whole(data: st.DataObject) -> None:
    layout, spec, whole = _draw(data)
    stacked = spec.shard(whole)
    assert torch.equal(spec.unshard(stacked, len(layout)), whole)
    assert stacked.shape[1 + spec.dim] == spec.local_size


@given(st.data())
def test_padding_is_zero(data: st.DataObject) -> None:
    _, spec, whole = _draw(data)
    for rank, local in enumerate(spec.shard(whole)):
        padded = torch.from_numpy(np.flatnonzero(spec.index[rank] < 0))
        assert not local.index_select(spec.dim, padded).any()


@given(st.data())
def test_each_index_is_on_one_rank(data: st.DataObject) -> None:
    layout, spec, _ = _draw(data)
    held = spec.index[spec.index >= 0]
    assert sorted(held) == list(range(len(layout)))
    assert spec.padded == spec.index.size - len(layout)


@given(st.data())
def test_indices_of_a_unit_are_its_own_in_order(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    units = tuple(sorted(data.draw(st.sets(st.integers(0, layout.num_units - 1)))))
    index = layout.indices(units, max(1, len(units)))
    held = index[index >= 0]
    assert list(held) == [n for n, owner in enumerate(layout.owners) if owner in units]


@given(st.data())
def test_local_offset_is_where_the_run_starts(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    units_per_rank = data.draw(st.integers(1, layout.num_units))
    index = layout.indices(tuple(range(units_per_rank)), units_per_rank)
    assert layout.local_size(units_per_rank) == len(index)
    assert layout.local_offset(len(layout), units_per_rank) == len(index)
    assert layout.local_offset(2 * len(layout), units_per_rank) == len(index)
    for start, *_ in layout.runs:
        # Unit 0 is held and comes first in each run.
        assert index[layout.local_offset(start, units_per_rank)] == start


@given(st.data())
def test_local_offset_inside_a_run_is_refused(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    inside = set(range(len(layout))) - {start for start, *_ in layout.runs}
    with pytest.raises(UnevenLayoutError, match="inside a run"):
        layout.local_offset(data.draw(st.sampled_from(sorted(inside))), 1)


@given(layouts(), st.data())
def test_runs_are_found_again(layout: Layout, data: st.DataObject) -> None:
    rebuilt = _owners(layout.num_units, [run.each for run in layout.runs])
    assert np.array_equal(rebuilt, layout.owners)
    same = Layout("region", layout.num_units, rebuilt)
    assert same == layout
    assert hash(same) == hash(layout)
    assert Layout("another", layout.num_units, rebuilt) != layout


@pytest.mark.parametrize(
    "owners",
    [[0, 1, 1], [1, 0], [0, 0], [0, 1, 2, 0, 1], [0, 1, 0], [0, 0, 1, 1, 1, 0]],
)
def test_uneven_owners_are_refused(owners: list[int]) -> None:
    with pytest.raises(UnevenLayoutError, match="equally"):
        Layout("region", 2 + (2 in owners), np.array(owners))


@given(st.integers(1, 40), st.integers(1, 12))
def test_even_split_keeps_order_and_differs_by_one(num_units: int, tp: int) -> None:
    split = even_split(num_units, tp)
    sizes = [len(units) for units in split]
    assert [unit for units in split for unit in units] == list(range(num_units))
    assert len(split) == tp
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def _draw(data: st.DataObject) -> tuple[Layout, ShardSpec, torch.Tensor]:
    """A layout, a split of one dim by it, and a tensor without zeros to split."""
    layout = data.draw(layouts())
    assignment = data.draw(assignments(layout.num_units))
    shape = [3, 2]
    dim = data.draw(st.integers(0, 2))
    shape.insert(dim, len(layout))
    whole = torch.arange(1, 1 + 6 * len(layout)).view(shape).double()
    return layout, shard_spec(layout, dim, assignment), whole

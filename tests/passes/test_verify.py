"""The count of emitted all-reduces, and the checks between passes, find what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from spdcompile.errors import CollectiveCountError, InvariantError
from spdcompile.passes.base import Invariant, Program
from spdcompile.passes.ops import SYNC
from spdcompile.passes.verify import check_collectives, count_sync_nodes, verify
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.local import LocalExecutor
from tests.passes.graphs import Block, calls, placed, synced, values

aten = torch.ops.aten
SYNCED = frozenset({Invariant.PLACED, Invariant.SYNCED})


@pytest.fixture
def program() -> Program:
    """A block with two sync points."""
    block = Block()
    hidden = block.add(block.x, block.mlp(block.x, "a"))
    normed = block.call(aten.relu.default, hidden)
    return synced(block.program(block.add(hidden, block.mlp(normed, "b"))))


def _run(program: Program) -> LocalExecutor:
    data = values(program)
    return LocalExecutor(program, data, backend=Backend.EAGER, device=torch.device("cpu"))


def test_lost_sync_point_is_found(program: Program) -> None:
    _run(program)
    first, _ = calls(program, SYNC)
    first.replace_all_uses_with(first.args[0])
    first.graph.erase_node(first)
    with pytest.raises(CollectiveCountError, match=r"1 all-reduces[\s\S]*2, one for each kept"):
        _run(program)


def test_doubled_sync_point_is_found(program: Program) -> None:
    first, _ = calls(program, SYNC)
    with first.graph.inserting_after(first):
        again = first.graph.node_copy(first)
    again.args = (first, first.args[1])
    first.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    with pytest.raises(CollectiveCountError, match=r"layers\.0[\s\S]*3 all-reduces"):
        _run(program)


def test_check_collectives_names_the_part(program: Program) -> None:
    check_collectives(program, {"block": 2})
    for emitted in (0, 1, 3):
        with pytest.raises(CollectiveCountError) as caught:
            check_collectives(program, {"block": emitted})
        assert caught.value.where == "layers.0"
        assert caught.value.found == f"{emitted} all-reduces"


def test_sync_nodes_of_nested_graphs_are_counted(program: Program) -> None:
    inner = program.graphs["block"].module
    graph = fx.Graph()
    given = [graph.placeholder(node.name) for node in inner.graph.find_nodes(op="placeholder")]
    graph.output(graph.call_module("holder.inner", tuple(given)))
    holder = nn.Module()
    holder.inner = inner
    outer = fx.GraphModule({"holder.inner": inner}, graph)
    assert count_sync_nodes(inner) == 2
    assert count_sync_nodes(outer) == 2


def test_program_of_the_passes_is_accepted(program: Program) -> None:
    verify(program, SYNCED)


def test_unnamed_sync_point_is_found(program: Program) -> None:
    first, _ = calls(program, SYNC)
    first.args = (first.args[0], "other")
    with pytest.raises(InvariantError, match=r"syncs \['other', 'mlp_2'\]"):
        verify(program, SYNCED)


def test_partial_sum_read_as_a_whole_is_found(program: Program) -> None:
    first, _ = calls(program, SYNC)
    reader = next(iter(first.users))
    reader.replace_input_with(first, first.args[0])
    with pytest.raises(InvariantError, match="reads the partial sum"):
        verify(program, SYNCED)


def test_value_without_a_placement_is_found(program: Program) -> None:
    del calls(program, aten.relu.default)[0].meta["placement"]
    with pytest.raises(InvariantError, match="relu has no placement"):
        verify(program, SYNCED)


def test_split_parameter_without_shards_is_found(program: Program) -> None:
    (part,) = program.parts
    shards = {name: spec for name, spec in part.shards.items() if name != "a_up"}
    with pytest.raises(InvariantError, match=r"a_up is S\(0\) but has no such shards"):
        verify(replace(program, parts=(replace(part, shards=shards),)), SYNCED)


def test_unit_that_no_rank_has_is_found(program: Program) -> None:
    (part,) = program.parts
    assignments = {**part.assignments, "mlp": ((0, 1), (2, 3))}
    broken = replace(program, parts=(replace(part, assignments=assignments),))
    with pytest.raises(InvariantError, match=r"layers\.0\.mlp does not assign each unit once"):
        verify(broken, frozenset({Invariant.ASSIGNED}))


def test_value_of_nowhere_is_found(program: Program) -> None:
    (part,) = program.parts
    broken = replace(program, parts=(replace(part, inputs={"x": "hidden"}),))
    with pytest.raises(InvariantError, match=r"reads \['hidden'\], which no earlier part makes"):
        verify(broken, frozenset({Invariant.WELL_FORMED}))


def test_placed_program_still_holds_partial_sums() -> None:
    block = Block()
    result = placed(block.program(block.add(block.x, block.mlp(block.x, "a"))))
    with pytest.raises(InvariantError, match="reads the partial sum"):
        verify(result.program, frozenset({Invariant.SYNCED}))

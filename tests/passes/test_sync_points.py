"""Where sync points arise, which of them merge, and which cannot be dropped: by hand-built blocks.

Everything is float64, so 1e-12 is the rounding of sums in another order and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from spdcompile.errors import RefusalError
from spdcompile.passes import drop
from spdcompile.passes.base import Program
from spdcompile.passes.drop import Drop, refusal_of
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.types import R
from spdcompile.passes.residual import Rewritten
from spdcompile.plan import Router
from tests.compare import rel_err
from tests.passes.graphs import (
    CHANNELS,
    HIDDEN,
    Block,
    calls,
    dropped,
    placed,
    run,
    run_whole,
    synced,
    values,
)

aten = torch.ops.aten
BOUND = 1e-12
TP = 2


def _two_in_a_row(scale: float = 1.0, *, bias: bool = False) -> Program:
    """h = x + s * a(x); y = h + s * b(relu(h)): a residual stream with a nonlinear reader."""
    block = Block()

    def scaled(node: fx.Node) -> fx.Node:
        return node if scale == 1.0 else block.call(aten.mul.Tensor, node, scale)

    hidden = block.add(block.x, scaled(block.mlp(block.x, "a", bias=bias)))
    normed = block.call(aten.relu.default, hidden, at="norm")
    return block.program(block.add(hidden, scaled(block.mlp(normed, "b", bias=bias))))


def _partials(x: Tensor, data: dict[str, Tensor], name: str) -> list[Tensor]:
    """Each rank's partial sum, on one x for all ranks or on one for each."""
    half = CHANNELS // TP
    parts = [slice(rank * half, (rank + 1) * half) for rank in range(TP)]
    xs = x if x.dim() == 4 else [x] * TP
    return [
        F.relu(seen @ data[f"{name}_up"][part].T) @ data[f"{name}_down"][:, part].T
        for seen, part in zip(xs, parts, strict=True)
    ]


@pytest.mark.parametrize("order", ("(x + a) + b", "x + (a + b)", "(a + b) + x"))
def test_partials_that_meet_in_an_addition_share_a_sync_point(order: str) -> None:
    block = Block()
    a, b = block.mlp(block.x, "a"), block.mlp(block.x, "b")
    if order == "(x + a) + b":
        result = block.add(block.add(block.x, a), b)
    elif order == "x + (a + b)":
        result = block.add(block.x, block.add(a, b))
    else:
        result = block.add(block.add(a, b), block.x)
    program = block.program(result)
    lowered = synced(program)
    (point,) = lowered.graph_of(lowered.parts[0]).sync_points
    assert (point.name, point.merged) == ("mlp_2", ("mlp",))
    assert len(calls(lowered, SYNC)) == 1
    assert "merged into layers.0.mlp_2" in refusal_of(lowered, 0, "mlp")
    data = values(program)
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND


def test_partials_with_a_nonlinear_reader_between_have_two_sync_points() -> None:
    program = _two_in_a_row()
    lowered = synced(program)
    assert [node.args[1] for node in calls(lowered, SYNC)] == ["mlp", "mlp_2"]
    data = values(program)
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND


@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_dropped_point_carries_its_partial_sum_on(scale: float) -> None:
    """y = x + sum(s P_i + s Z_i(relu(x + s P_i))), SPD on a scaled residual stream."""
    program = _two_in_a_row(scale)
    lowered = dropped(synced(program), "mlp")
    assert [node.args[1] for node in calls(lowered, SYNC)] == ["mlp_2"]
    data = values(program)
    p = torch.stack(_partials(data["x"], data, "a")) * scale
    z = torch.stack(_partials(F.relu(data["x"] + p), data, "b")) * scale
    expected = data["x"] + (p + z).sum(0)
    assert rel_err(run(lowered, data), expected) < BOUND
    assert rel_err(run_whole(program, data), expected) > 1e-3


def test_bias_of_a_row_split_linear_enters_once() -> None:
    """y = x + b + c + sum(P_i + Z_i(relu(x + b + P_i))), and the model itself if all is kept."""
    program = _two_in_a_row(bias=True)
    lowered, data = synced(program), values(program)
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND
    b, c = data["a_bias"], data["b_bias"]
    p = torch.stack(_partials(data["x"], data, "a"))
    z = torch.stack(_partials(F.relu(data["x"] + b + p), data, "b"))
    expected = data["x"] + b + c + (p + z).sum(0)
    assert rel_err(run(dropped(lowered, "mlp"), data), expected) < BOUND


def test_three_ranks_with_padding_compute_the_same() -> None:
    program = _two_in_a_row(bias=True)
    data = values(program)
    assert rel_err(run(synced(program, tp=3), data), run_whole(program, data)) < BOUND


def test_norm_between_partial_sum_and_residual_stream_is_refused() -> None:
    block = Block()
    weight = block.param("weight", HIDDEN)
    normed = block.call(
        aten.layer_norm.default, block.mlp(block.x, "a"), [HIDDEN], weight, at="post_norm"
    )
    hidden = block.add(block.x, normed)
    program = block.program(block.add(hidden, block.mlp(hidden, "b")))
    lowered, data = synced(program), values(program)
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND
    with pytest.raises(RefusalError, match=r"post_norm acts on the sum before it reaches the res"):
        dropped(lowered, "mlp")


def _routed(
    block: Block, read: fx.Node, hidden: fx.Node, choose: Any = aten.argmax.default
) -> Program:
    """hidden + w * b(hidden), w being the chosen, largest entry of relu(read)."""
    scores = block.call(aten.relu.default, read)
    chosen = block.call(choose, scores, -1, True, at="router")
    weight = block.call(aten.gather.default, scores, -1, chosen)
    experts = block.call(aten.mul.Tensor, block.mlp(hidden, "b"), weight)
    return block.program(block.add(hidden, experts))


@pytest.mark.parametrize("choose", (aten.argmax.default, aten.argsort.default))
def test_router_that_reads_a_dropped_sum_is_refused(choose: Any) -> None:
    block = Block()
    hidden = block.add(block.x, block.mlp(block.x, "a"))
    lowered = synced(_routed(block, hidden, hidden, choose))
    reason = r"router chooses .* would differ between the ranks.*router='replicated'"
    with pytest.raises(RefusalError, match=reason):
        dropped(lowered, "mlp")


def test_router_of_the_replicated_part_chooses_and_weighs_alike_on_all_ranks() -> None:
    """y = x + sum(P_i + w Z_i(x + P_i)), w being the largest entry of relu(x)."""
    block = Block()
    hidden = block.add(block.x, block.mlp(block.x, "a"))
    program = _routed(block, hidden, hidden)
    lowered = Drop(frozenset({(0, "mlp")}), Router.REPLICATED)(synced(program)).program
    data = values(program)
    p = torch.stack(_partials(data["x"], data, "a"))
    z = torch.stack(_partials(data["x"] + p, data, "b"))
    weight = F.relu(data["x"]).amax(-1, keepdim=True)
    expected = data["x"] + (p + weight * z).sum(0)
    assert rel_err(run(lowered, data), expected) < BOUND
    own_weight = F.relu(data["x"] + p).amax(-1, keepdim=True)
    assert rel_err(data["x"] + (p + own_weight * z).sum(0), expected) > 1e-3
    # What the ranks would have chosen by themselves is not computed.
    assert len(calls(lowered, aten.argmax.default)) == 1
    assert len(calls(lowered, aten.gather.default)) == 1


def test_router_of_a_partial_sum_alone_is_refused_under_both_settings() -> None:
    block = Block()
    partial = block.mlp(block.x, "a")
    lowered = synced(_routed(block, partial, block.add(block.x, partial)))
    reason = "a is a partial sum alone: no part of it is replicated"
    for router in Router:
        with pytest.raises(RefusalError, match=reason):
            Drop(frozenset({(0, "mlp")}), router)(lowered)


def test_value_of_the_stream_that_depends_on_the_rank_is_refused() -> None:
    """relu(x + a(x)) is added to the stream itself: the ranks would disagree for good."""
    block = Block()
    hidden = block.add(block.x, block.mlp(block.x, "a"))
    gate = block.call(aten.relu.default, hidden, at="gate")
    lowered = synced(block.program(block.add(block.add(hidden, gate), block.mlp(hidden, "b"))))
    with pytest.raises(RefusalError, match="gate acts on the sum"):
        dropped(lowered, "mlp")


def test_last_point_is_refused() -> None:
    with pytest.raises(RefusalError, match="it is the last one"):
        dropped(synced(_two_in_a_row()), "mlp_2")


def test_operator_without_a_rule_on_channels_leaves_its_region_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(RULES, aten.roll.default)
    block = Block()
    up = block.param("up", CHANNELS, HIDDEN)
    down = block.param("down", HIDDEN, CHANNELS)
    inner = block.call(aten.linear.default, block.x, up)
    turned = block.call(aten.roll.default, inner, [1], [-1], at="turn")
    hidden = block.add(block.x, block.call(aten.linear.default, turned, down))
    program = block.program(block.add(hidden, block.mlp(hidden, "b")))
    result = placed(program)
    texts = [f"{refusal.subject}: {refusal.reason}" for refusal in result.refusals]
    assert any("aten.roll.default (layers.0.turn) has no placement rule" in t for t in texts)
    assert set(result.program.parts[0].shards) == {"b_up", "b_down"}
    assert all(node.meta["placement"] == R for node in calls(result.program, aten.roll.default))
    data = values(program)
    assert rel_err(run(synced(program), data), run_whole(program, data)) < BOUND


def test_operator_without_a_rule_on_a_partial_sum_gets_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is known of roll, so it is not taken for linear; its point cannot be dropped."""
    monkeypatch.delitem(RULES, aten.roll.default)
    block = Block()
    turned = block.call(aten.roll.default, block.mlp(block.x, "a"), [1], [-1], at="turn")
    hidden = block.add(block.x, turned)
    program = block.program(block.add(hidden, block.mlp(hidden, "b")))
    lowered, data = synced(program), values(program)
    (first, _) = calls(lowered, SYNC)
    assert calls(lowered, aten.roll.default)[0].args[0] is first
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND
    with pytest.raises(RefusalError, match="turn acts on the sum"):
        dropped(lowered, "mlp")


def test_value_added_to_several_rows_of_a_partial_sum_is_carried_in_all_of_them() -> None:
    """A bias [1, 1, H] meets a partial sum [1, 2, H]: summing its rows takes the bias twice."""
    block = Block()
    partial = block.mlp(block.x, "a")
    rows = block.call(aten.expand.default, partial, [1, 2, HIDDEN])
    biased = block.add(rows, block.param("bias", 1, 1, HIDDEN))
    total = block.call(aten.sum.dim_IntList, biased, [1], True)
    program = block.program(block.add(block.x, total))
    data = values(program)
    assert rel_err(run(synced(program), data), run_whole(program, data)) < BOUND


def test_passes_leave_their_input_as_it_was() -> None:
    program = _two_in_a_row(bias=True)
    before = str(program.graphs["block"].module.graph)
    first = synced(program)
    text = str(first.graphs["block"].module.graph)
    assert str(program.graphs["block"].module.graph) == before
    dropped(first, "mlp")
    assert str(first.graphs["block"].module.graph) == text
    assert str(synced(program).graphs["block"].module.graph) == text


def test_split_weight_reads_the_sum() -> None:
    """A linear is linear in what it reads, but each rank has other rows of a split weight."""
    block = Block()
    program = block.program(block.add(block.x, block.mlp(block.mlp(block.x, "a"), "b")))
    lowered, data = synced(program), values(program)
    (first, _) = calls(lowered, SYNC)
    assert [reader.target for reader in first.users] == [aten.linear.default]
    assert rel_err(run(lowered, data), run_whole(program, data)) < BOUND


def test_block_that_is_given_other_pending_values_has_another_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drop, "rewrite_with_dropped", lambda *_: Rewritten(fx.Graph(), (), {}, {}))
    program = synced(_two_in_a_row())
    dropper = drop._Dropper(program, Router.EXACT)
    given = [frozenset({"x"}), frozenset({"y"}), frozenset({"x", "y"}), frozenset({"x"})]
    keys = [dropper._variant(program.parts[0], frozenset(), pending)[0] for pending in given]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3 == len(dropper.graphs.keys() & set(keys))

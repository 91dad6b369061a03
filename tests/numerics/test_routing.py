"""Mixtures of experts without attention sync points: the router reads the replicated part.

Bounds, relative to the largest logit: those of test_lossless.py. The seeds are fixed, because a
near tie between two experts may fall either way under rounding.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import spdcompile
from spdcompile import Plan, Router
from spdcompile.compiled import CompiledModel
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.passes.ops import SYNC
from tests.compare import rel_err
from tests.models import tiny, token_ids
from tests.moe_reference import MOE_FAMILIES, routed_logits, tiny_moe

F32_BOUND = 1e-5
VISIBLE = 1e-3  # a change that no rounding explains
LAYERS = 3
EVERY_ATTN = frozenset((layer, "attn") for layer in range(LAYERS))
RUN = frozenset({(0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp"), (2, "attn")})
PLANS = {
    "one": frozenset({(1, "attn")}),
    "every attn": EVERY_ATTN,
    "mlp before a kept attn": frozenset({(0, "mlp"), (1, "mlp")}),
    "mlp before a dropped attn": frozenset({(0, "mlp"), (1, "attn")}),
    "all but the last": RUN,
}


@cache
def _compiled(family: str, tp: int) -> CompiledModel:
    model = tiny_moe(family)
    return spdcompile.compile(model, tp=tp, router="replicated", executor="local", backend="eager")


def _plan(tp: int, dropped: frozenset[tuple[int, str]], router: Router) -> Plan:
    return Plan(tp, LAYERS, dropped, router=router)


def _points(compiled: CompiledModel, dropped: frozenset[tuple[int, str]]) -> frozenset:
    """The points by the names that they have: a shared expert's sum may be merged into them."""
    blocks = [part for part in compiled.base.program.parts if part.layer is not None]
    last = [compiled.base.program.graph_of(part).sync_points[-1].name for part in blocks]
    return frozenset((layer, last[layer] if name == "mlp" else name) for layer, name in dropped)


@torch.no_grad()
def _hugging_face(family: str, ids: Tensor) -> Tensor:
    return _compiled(family, 2).model(ids).logits


@pytest.mark.parametrize(("name", "tp"), [*((name, 2) for name in PLANS), ("all but the last", 3)])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_replicated_router_equals_the_reference(family: str, name: str, tp: int) -> None:
    compiled, ids, dropped = _compiled(family, tp), token_ids(), PLANS[name]
    plan = _plan(tp, _points(compiled, dropped), Router.REPLICATED)
    result = compiled.with_mask(plan)(ids).logits
    expected = routed_logits(compiled.model, ids, tp=tp, dropped=dropped)
    assert rel_err(result, expected) < F32_BOUND
    assert rel_err(result, _hugging_face(family, ids)) > VISIBLE


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_reference_without_a_drop_is_the_model(family: str) -> None:
    ids = token_ids()
    for tp in (1, 2, 3):
        result = routed_logits(tiny_moe(family), ids, tp=tp, dropped=frozenset())
        assert rel_err(result, _hugging_face(family, ids)) < F32_BOUND


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_empty_mask_stays_exact(family: str) -> None:
    compiled, ids = _compiled(family, 2), token_ids()
    assert rel_err(compiled(ids).logits, _hugging_face(family, ids)) < F32_BOUND
    exact = compiled.with_mask(_plan(2, frozenset(), Router.EXACT))
    assert compiled.program.graphs.keys() == exact.program.graphs.keys()
    assert torch.equal(compiled(ids).logits, exact(ids).logits)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_routers_choose_by_values_that_no_rank_has_to_itself(family: str) -> None:
    """One all-reduce a block is left, and the report says which modules are approximated."""
    dropped = _compiled(family, 2).with_mask([True] * LAYERS)
    syncs = [
        sum(node.target is SYNC for node in dropped.program.graph_of(part).module.graph.nodes)
        for part in dropped.program.parts
        if part.layer is not None
    ]
    assert syncs == [1] * LAYERS
    routers = {layer: block.routers for block in dropped.report.blocks for layer in block.layers}
    gates = ("mlp.gate", "mlp.shared_expert_gate") if family == "qwen2_moe" else ("mlp.gate",)
    assert routers[LAYERS - 1] == gates
    assert routers[0] == (gates if family == "mixtral" else ())
    assert "Approximated: these read only what all ranks share" in str(dropped.report)
    assert "Approximated" not in str(_compiled(family, 2).report)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_exact_router_refuses_and_names_the_setting(family: str) -> None:
    compiled = _compiled(family, 2)
    with pytest.raises(RefusalError, match=r"mlp\.gate chooses .*router='replicated'"):
        compiled.with_mask(_plan(2, frozenset({(LAYERS - 1, "attn")}), Router.EXACT))
    states = [
        (point.state, bool(point.reason))
        for block in compiled.report.blocks
        for point in block.sync_points
        if point.name == "attn" and LAYERS - 1 in block.layers
    ]
    assert states == [("cannot be dropped", True)]


def test_dense_model_is_the_same_under_both_settings() -> None:
    model, ids = tiny("llama", layers=LAYERS), token_ids()
    compiled = spdcompile.compile(model, tp=2, executor="local", backend="eager")
    results = [
        compiled.with_mask(_plan(2, RUN, router))(ids).logits
        for router in (Router.EXACT, Router.REPLICATED)
    ]
    assert torch.equal(*results)


def test_compiled_blocks_equal_eager_ones() -> None:
    model = tiny_moe("mixtral", layers=2)
    eager, inductor = (
        spdcompile.compile(
            model,
            tp=2,
            spd_mask=[True, True],
            router="replicated",
            executor="local",
            backend=backend,
        )
        for backend in ("eager", "inductor")
    )
    for length in (12, 7):
        ids = token_ids(length=length)
        assert rel_err(inductor(ids).logits, eager(ids).logits) < F32_BOUND


def test_mask_keeps_the_setting_and_a_plan_brings_its_own() -> None:
    compiled = _compiled("mixtral", 2)
    assert compiled.with_mask([True] * LAYERS).plan.router is Router.REPLICATED
    plan = _plan(2, frozenset(), Router.EXACT)
    assert compiled.with_mask(plan).plan.router is Router.EXACT
    with pytest.raises(UsageError, match="A Plan brings its own router setting"):
        spdcompile.compile(compiled.model, tp=2, spd_mask=plan, router="replicated")
    with pytest.raises(UsageError, match="There is no router 'local'"):
        spdcompile.compile(compiled.model, tp=2, router="local")


def test_plan_file_holds_the_setting_and_older_ones_are_read() -> None:
    plan = _plan(2, RUN, Router.REPLICATED)
    data = plan.to_dict()
    assert data["router"] == "replicated"
    assert Plan.from_dict(data) == plan
    exact = _plan(2, RUN, Router.EXACT)
    assert plan.content_hash != exact.content_hash
    older = {key: value for key, value in data.items() if key != "router"}
    assert Plan.from_dict(older) == exact
    with pytest.raises(PlanError, match="'nearest'"):
        Plan.from_dict({**data, "router": "nearest"})


def test_calibration_and_distillation_take_the_setting() -> None:
    model, tokens = tiny_moe("mixtral", layers=2), token_ids(batch=4)
    attention = spdcompile.CalibrateSettings(points=spdcompile.Points.ATTENTION)
    with pytest.raises(RefusalError, match="router='replicated'"):
        spdcompile.calibrate(model, tokens, tp=2, settings=attention, progress=False)
    found = spdcompile.calibrate(
        model, tokens, tp=2, router="replicated", settings=attention, progress=False
    )
    assert all(abs(score) > 0 for score in found.scores)
    mask = [True, True]
    steps = spdcompile.DistillSettings(steps=20, batch_size=4)
    with pytest.raises(RefusalError, match="router='replicated'"):
        spdcompile.distill(model, tokens, tp=2, spd_mask=mask, progress=False)
    plan = Plan(2, 2, frozenset({(0, "attn"), (1, "attn")}), router=Router.REPLICATED)
    results = [
        spdcompile.distill(model, tokens, tp=2, progress=False, settings=steps, **how)
        for how in ({"spd_mask": mask, "router": "replicated"}, {"spd_mask": plan})
    ]
    assert results[0].history == results[1].history
    assert all(block.after < block.before for block in results[0].history)
    with pytest.raises(UsageError, match="A Plan brings its own router setting"):
        spdcompile.distill(model, tokens, tp=2, spd_mask=plan, router="exact", progress=False)

"""Tuning on a tiny model, on text of its own: budgets that are met and that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spdcompile
from spdcompile import Budget, Plan, PointClass, Points, Tuned
from spdcompile.compiled import CompiledModel
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.runtime.data import perplexity
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.validation import HeldOut, Validation
from spdcompile.tuning.ladder import Effort, Rung
from spdcompile.tuning.trials import RecordedTrials
from tests.models import tiny
from tests.science.tuned_model import (
    LAYERS,
    SETTINGS,
    TP,
    ZERO_SHOT,
    compiled_model,
    model,
    tokens,
    tuned,
)


@cache
def _by_loss() -> Tuned:
    """The loss that is allowed lies between what the last point costs and nothing."""
    return tuned(Budget(max_loss=0.15))


@cache
def _by_saving() -> Tuned:
    return tuned(Budget(min_saved=0.5))


def _held_out(found: Tuned) -> float:
    """Perplexity of a plan with its weights, by other means than tuning's."""
    compiled = spdcompile.compile(
        model(), tp=TP, spd_mask=found.plan, executor="local", backend="eager"
    )
    if found.tensors:
        compiled = compiled.with_weights(dict(found.tensors))
    return perplexity(compiled.executor, tokens()[-3:])


def test_drops_cost_something_here() -> None:
    zero_shot = tuned(Budget(min_saved=0.5), ZERO_SHOT)
    assert zero_shot.increase > 0.05 and zero_shot.recovery is Rung.ZERO_SHOT
    assert zero_shot.tensors == {} and zero_shot.zero_shot == zero_shot.recovered
    assert zero_shot.tau1 is None


@pytest.mark.parametrize("find", [_by_loss, _by_saving])
def test_budget_is_met_on_held_out_text(find: Callable[[], Tuned]) -> None:
    found = find()
    assert found.met and found.plan.dropped
    assert found.recovered.perplexity == pytest.approx(_held_out(found), rel=1e-5)
    assert found.undropped.perplexity == pytest.approx(
        perplexity(compiled_model().executor, tokens()[-3:]), rel=1e-5
    )
    assert found.budget.allows(found.increase)
    assert found.savings.remaining == 2 * LAYERS - len(found.plan.dropped)
    if found.budget.min_saved is not None:
        assert found.savings.saved == len(found.plan.dropped) / (2 * LAYERS) == 0.5


def test_recovery_is_better_than_none() -> None:
    found = _by_saving()
    assert found.recovery is not Rung.ZERO_SHOT and found.tensors
    assert found.recovered.perplexity < found.zero_shot.perplexity


def test_loss_drops_as_many_points_as_it_allows() -> None:
    found = _by_loss()
    count = len(found.plan.dropped)
    assert all(
        attempt.increase > 0.15 or attempt.refused
        for attempt in found.attempts
        if attempt.count > count
    )
    assert tuned(Budget(max_loss=0.0), ZERO_SHOT).plan.dropped == frozenset()
    assert len(tuned(Budget(max_loss=9.0)).plan.dropped) == LAYERS


def test_budget_that_cannot_be_met_gives_the_best_plan() -> None:
    found = tuned(Budget(min_saved=0.9), ZERO_SHOT)
    assert not found.met and len(found.plan.dropped) == LAYERS
    assert found.plan.measured["tuning"]["met"] is False
    found = tuned(Budget(max_loss=1e-6, min_saved=0.5))
    assert not found.met and found.savings.saved == 0.5
    assert found.increase == min(
        attempt.increase for attempt in found.attempts if attempt.rung is found.recovery
    )


def test_everything_is_in_the_plan() -> None:
    found = _by_loss()
    data = json.loads(json.dumps(found.to_dict()))
    assert Plan.from_dict(data).content_hash == found.plan.content_hash
    figures = data["measured"]["tuning"]
    assert figures["budget"] == {"max_loss": 0.15, "min_saved": None, "min_faster": None}
    assert figures["met"] and figures["recovered"]["perplexity"] == found.recovered.perplexity
    assert [entry["point"] for entry in figures["points"]] == [
        f"{layer}.{name}" for layer, name in (decision.point for decision in found.points)
    ]
    assert {entry["recovery"] for entry in figures["attempts"]} >= {"zero-shot", "B2B"}
    assert (figures["tau1"], figures["tau2"]) == (found.tau1, found.tau2)


def test_every_point_has_a_decision() -> None:
    found = tuned(Budget(max_loss=0.02), ZERO_SHOT, Points.ALL)
    kinds = {decision.point: decision for decision in found.points}
    assert len(kinds) == 2 * LAYERS
    last = kinds[LAYERS - 1, "mlp"]
    assert last.kind is PointClass.REFUSED and "it is the last one" in last.outcome
    for point, decision in kinds.items():
        assert (point in found.plan.dropped) == decision.outcome.startswith("dropped")
    assert found.kinds(PointClass.REFUSED) == ((LAYERS - 1, "mlp"),)


def test_validation_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watching(compiled: CompiledModel, given: Tensor, **settings: object) -> object:
        seen.append(given)
        return spdcompile.distill(compiled, given, **settings)

    monkeypatch.setattr("spdcompile.tuning.trials.distill", watching)
    tuned(Budget(min_saved=0.5), SETTINGS)
    trained, held = tokens()[:-3], tokens()[-3:]
    assert len(seen) == 2 and all(torch.equal(given, trained) for given in seen)
    assert not (trained[:, None] == held).all(-1).any()
    seen.clear()
    found = tuned(Budget(min_saved=0.5), ZERO_SHOT, validation=tokens()[:5])
    expected = perplexity(compiled_model().executor, tokens()[:5])
    assert found.undropped.perplexity == pytest.approx(expected, rel=1e-5)


def test_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, resume=tmp_path)
    first = tuned(Budget(min_saved=0.5), settings)
    assert first.plan.dropped == _by_saving().plan.dropped
    assert first.recovered == _by_saving().recovered

    def failing(*args: object, **kwargs: object) -> None:
        raise AssertionError("run again")

    for owner, name in ((Evaluator, "_measured"), (Validation, "measure")):
        monkeypatch.setattr(owner, name, failing)
    monkeypatch.setattr(RecordedTrials, "_distilled", failing)
    monkeypatch.setattr("spdcompile.tuning.trials.group_heads", failing)
    again = tuned(Budget(min_saved=0.5), settings)
    assert again.plan.content_hash == first.plan.content_hash
    assert again.recovered == first.recovered and again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], x) for name, x in first.tensors.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "only what was taken is kept"


def test_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, resume=tmp_path)
    measure, calls = Validation.measure, []

    def killing(self: Validation, executor: Executor) -> HeldOut:
        calls.append(executor)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, executor)

    monkeypatch.setattr(Validation, "measure", killing)
    with pytest.raises(KeyboardInterrupt):
        tuned(Budget(min_saved=0.5), settings)
    before, calls[:] = len(calls), [None] * 9
    found = tuned(Budget(min_saved=0.5), settings)
    assert found.recovered == _by_saving().recovered
    assert len(calls) - 9 <= len(_by_saving().attempts) + 1 - (before - 1)


def test_head_groups_are_part_of_the_plan(tmp_path: Path) -> None:
    settings = replace(SETTINGS, effort=Effort(), resume=tmp_path)
    found = tuned(Budget(min_saved=1 / 6), settings)
    (grouped,) = (a for a in found.attempts if a.rung is Rung.GROUP and not a.full)
    assert not grouped.refused and grouped.layers == {layer for layer, _ in found.plan.dropped}
    expected = grouped.layers if found.recovery is Rung.GROUP else set()
    assert found.plan.head_groups.keys() == expected
    again = tuned(Budget(min_saved=1 / 6), settings)
    assert again.plan.content_hash == found.plan.content_hash
    assert all(attempt.seconds == 0 for attempt in again.attempts)


def test_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    found = _by_saving()
    found.export_hf(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    compiled = spdcompile.compile(
        loaded, tp=TP, spd_mask=Plan.load(tmp_path / "out"), executor="local", backend="eager"
    )
    assert perplexity(compiled.executor, tokens()[-3:]) == pytest.approx(
        found.recovered.perplexity, rel=1e-5
    )


def test_weights_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    """A checkpoint in bfloat16 rounds what was distilled, and that is part of the result."""
    rounded = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48, dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path / "model")
    found = spdcompile.tune(
        tmp_path / "model",
        tokens(),
        tp=TP,
        budget=Budget(min_saved=0.5),
        settings=SETTINGS,
        progress=False,
    )
    assert found.savings.saved == 0.5
    found.export_hf(tmp_path / "out")
    compiled = spdcompile.compile(
        tmp_path / "out",
        tp=TP,
        spd_mask=Plan.load(tmp_path / "out"),
        executor="local",
        backend="eager",
        dtype=torch.float32,
    )
    held_out = perplexity(compiled.executor, tokens()[-3:])
    assert held_out == pytest.approx(found.recovered.perplexity, rel=1e-5)
    assert {tensor.dtype for tensor in found.tensors.values()} <= {torch.bfloat16}


def test_plan_is_for_this_model_alone() -> None:
    other = tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=56)
    with pytest.raises(PlanError, match="made for something else"):
        spdcompile.compile(
            other, tp=TP, spd_mask=_by_saving().plan, executor="local", backend="eager"
        )


# ---- what cannot be tuned


def test_model_without_a_point_to_drop_is_refused() -> None:
    parallel = tiny("gpt_neox", layers=1, hidden=32, heads=4, intermediate=48)
    with pytest.raises(RefusalError, match="no sync point to drop"):
        spdcompile.tune(
            parallel,
            tokens(),
            tp=TP,
            budget=Budget(max_loss=0.1),
            points=Points.ATTENTION,
            progress=False,
        )


def test_single_chunk_leaves_nothing_to_hold_out() -> None:
    with pytest.raises(UsageError, match="too short to hold some of it out"):
        spdcompile.tune(
            compiled_model(), tokens()[:1], tp=TP, budget=Budget(max_loss=0.1), progress=False
        )

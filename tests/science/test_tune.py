"""Tuning on a tiny model, on text of its own: budgets that are met and that are not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spdcompile
from spdcompile import Budget, DistillSettings, Plan, PointClass, Points, Tuned, TuneSettings
from spdcompile import tuning as tuning_module
from spdcompile.compiled import CompiledModel
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.ladder import Attempt, Choice, Effort, Rung
from spdcompile.latency import Latencies, step_seconds
from spdcompile.runtime.data import perplexity
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.order import Order, Step
from spdcompile.runtime.validation import HeldOut, Validation
from spdcompile.trials import RecordedTrials
from spdcompile.tuned import decisions_of, thresholds_of
from tests.models import tiny

TP, LAYERS = 2, 3
SETTINGS = TuneSettings(
    distill=DistillSettings(steps=16, batch_size=4, learning_rate=3e-3),
    search=DistillSettings(steps=4, batch_size=4, learning_rate=3e-3),
    order_chunks=4,
    batch_size=4,
    effort=Effort(full_runs=2),
)
ZERO_SHOT = replace(SETTINGS, effort=Effort(rungs=(Rung.ZERO_SHOT,)))


@cache
def _model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@cache
@torch.no_grad()
def _tokens() -> Tensor:
    """Drawn from the model itself, sharpened: on random text a drop may even do good."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 96, (24, 1), generator=generator)
    for _ in range(15):
        chances = (2 * _model()(tokens).logits[:, -1]).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens


@cache
def _compiled() -> CompiledModel:
    return spdcompile.compile(_model(), tp=TP, executor="local", backend="eager")


def _tuned(
    budget: Budget,
    settings: TuneSettings = SETTINGS,
    points: Points = Points.ATTENTION,
    validation: Tensor | None = None,
) -> Tuned:
    return spdcompile.tune(
        _compiled(),
        _tokens(),
        tp=TP,
        budget=budget,
        points=points,
        validation=validation,
        settings=settings,
        progress=False,
    )


@cache
def _by_loss() -> Tuned:
    """The loss that is allowed lies between what the last point costs and nothing."""
    return _tuned(Budget(max_loss=0.15))


@cache
def _by_saving() -> Tuned:
    return _tuned(Budget(min_saved=0.5))


def _held_out(tuned: Tuned) -> float:
    """Perplexity of a plan with its weights, by other means than tuning's."""
    compiled = spdcompile.compile(
        _model(), tp=TP, spd_mask=tuned.plan, executor="local", backend="eager"
    )
    if tuned.tensors:
        compiled = compiled.with_weights(dict(tuned.tensors))
    return perplexity(compiled.executor, _tokens()[-3:])


def test_drops_cost_something_here() -> None:
    zero_shot = _tuned(Budget(min_saved=0.5), ZERO_SHOT)
    assert zero_shot.increase > 0.05 and zero_shot.recovery is Rung.ZERO_SHOT
    assert zero_shot.tensors == {} and zero_shot.zero_shot == zero_shot.recovered
    assert zero_shot.tau1 is None


@pytest.mark.parametrize("tuned", [_by_loss, _by_saving])
def test_budget_is_met_on_held_out_text(tuned) -> None:
    found: Tuned = tuned()
    assert found.met and found.plan.dropped
    assert found.recovered.perplexity == pytest.approx(_held_out(found), rel=1e-5)
    assert found.undropped.perplexity == pytest.approx(
        perplexity(_compiled().executor, _tokens()[-3:]), rel=1e-5
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
    assert _tuned(Budget(max_loss=0.0), ZERO_SHOT).plan.dropped == frozenset()
    assert len(_tuned(Budget(max_loss=9.0)).plan.dropped) == LAYERS


def test_budget_that_cannot_be_met_gives_the_best_plan() -> None:
    found = _tuned(Budget(min_saved=0.9), ZERO_SHOT)
    assert not found.met and len(found.plan.dropped) == LAYERS
    assert found.plan.measured["tuning"]["met"] is False
    found = _tuned(Budget(max_loss=1e-6, min_saved=0.5))
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
    found = _tuned(Budget(max_loss=0.02), ZERO_SHOT, Points.ALL)
    kinds = {decision.point: decision for decision in found.points}
    assert len(kinds) == 2 * LAYERS
    last = kinds[LAYERS - 1, "mlp"]
    assert last.kind is PointClass.REFUSED and "it is the last one" in last.outcome
    for point, decision in kinds.items():
        assert (point in found.plan.dropped) == decision.outcome.startswith("dropped")
    assert found.kinds(PointClass.REFUSED) == ((LAYERS - 1, "mlp"),)


@given(st.data())
def test_thresholds_are_where_the_class_changes(data: st.DataObject) -> None:
    scores = sorted(data.draw(st.lists(st.floats(1e-6, 9.0), min_size=1, max_size=9, unique=True)))
    order = Order(
        tuple(Step((place, "attn"), 0.0, score, score) for place, score in enumerate(scores)), {}, 0
    )
    taken = data.draw(st.integers(0, len(scores)))
    sensitive = data.draw(st.integers(0, taken))
    in_sensitive = data.draw(st.integers(0, sensitive))
    attempt = Attempt(taken, Rung.GROUP, True, HeldOut((1.0,), 0.0, 1.0), 0.0)
    choice = Choice(attempt, in_sensitive, sensitive, "")
    tau1, tau2 = (math.inf if tau is None else tau for tau in thresholds_of(order, choice))
    assert tau1 <= tau2
    for decision in decisions_of(order, choice, [attempt], {}):
        by_score = {
            PointClass.IN_SENSITIVE: decision.score <= tau1,
            PointClass.SENSITIVE: tau1 < decision.score <= tau2,
            PointClass.EXTREMELY_SENSITIVE: tau2 < decision.score,
            PointClass.KEPT: decision.score > scores[taken - 1] if taken else True,
        }
        assert by_score[decision.kind], decision


def test_validation_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watching(model: CompiledModel, tokens: Tensor, **settings: object) -> object:
        seen.append(tokens)
        return spdcompile.distill(model, tokens, **settings)

    monkeypatch.setattr("spdcompile.trials.distill", watching)
    _tuned(Budget(min_saved=0.5), replace(SETTINGS, effort=Effort(rungs=tuple(Rung)[:2])))
    assert seen and all(torch.equal(tokens, _tokens()[:-3]) for tokens in seen)
    seen.clear()
    found = _tuned(Budget(min_saved=0.5), ZERO_SHOT, validation=_tokens()[:5])
    expected = perplexity(_compiled().executor, _tokens()[:5])
    assert found.undropped.perplexity == pytest.approx(expected, rel=1e-5)


def test_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, resume=tmp_path)
    first = _tuned(Budget(min_saved=0.5), settings)
    assert first.plan.dropped == _by_saving().plan.dropped
    assert first.recovered == _by_saving().recovered

    def failing(*args: object, **kwargs: object) -> None:
        raise AssertionError("run again")

    for owner, name in ((Evaluator, "_measured"), (Validation, "measure")):
        monkeypatch.setattr(owner, name, failing)
    monkeypatch.setattr(RecordedTrials, "_distilled", failing)
    monkeypatch.setattr("spdcompile.trials.group_heads", failing)
    again = _tuned(Budget(min_saved=0.5), settings)
    assert again.plan.content_hash == first.plan.content_hash
    assert again.recovered == first.recovered and again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], x) for name, x in first.tensors.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "only what was taken is kept"


def test_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, resume=tmp_path)
    measure, calls = Validation.measure, []

    def killing(self: Validation, executor: object) -> HeldOut:
        calls.append(executor)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, executor)

    monkeypatch.setattr(Validation, "measure", killing)
    with pytest.raises(KeyboardInterrupt):
        _tuned(Budget(min_saved=0.5), settings)
    before, calls[:] = len(calls), [None] * 9
    found = _tuned(Budget(min_saved=0.5), settings)
    assert found.recovered == _by_saving().recovered
    assert len(calls) - 9 <= len(_by_saving().attempts) + 1 - (before - 1)


def test_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    found = _by_saving()
    found.export_hf(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    compiled = spdcompile.compile(
        loaded, tp=TP, spd_mask=Plan.load(tmp_path / "out"), executor="local", backend="eager"
    )
    assert perplexity(compiled.executor, _tokens()[-3:]) == pytest.approx(
        found.recovered.perplexity, rel=1e-5
    )


def test_weights_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    """A checkpoint in bfloat16 rounds what was distilled, and that is part of the result."""
    model = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    settings = replace(SETTINGS, effort=Effort(rungs=tuple(Rung)[:2]))
    found = spdcompile.tune(
        tmp_path / "model",
        _tokens(),
        tp=TP,
        budget=Budget(min_saved=0.5),
        settings=settings,
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
    held_out = perplexity(compiled.executor, _tokens()[-3:])
    assert held_out == pytest.approx(found.recovered.perplexity, rel=1e-5)
    assert {tensor.dtype for tensor in found.tensors.values()} <= {torch.bfloat16}


def test_plan_is_for_this_model_alone() -> None:
    other = tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=56)
    with pytest.raises(PlanError, match="made for something else"):
        spdcompile.compile(
            other, tp=TP, spd_mask=_by_saving().plan, executor="local", backend="eager"
        )


# ---- latencies


def test_table_of_latencies_says_how_many_points_go(tmp_path: Path) -> None:
    Latencies(TP, 64, seconds=0.1, all_reduce_seconds=0.01).save(tmp_path / "table.json")
    table = Latencies.load(tmp_path / "table.json")
    settings = replace(ZERO_SHOT, latencies=table)
    found = _tuned(Budget(min_faster=0.15), settings)
    assert found.met and len(found.plan.dropped) == 2
    assert found.savings.faster == pytest.approx(0.2) and found.savings.measured is None
    assert not _tuned(Budget(min_faster=0.5), settings).met
    both = _tuned(Budget(min_faster=0.05, min_saved=0.5), settings)
    assert both.met and len(both.plan.dropped) == 3


def test_measured_latencies_are_checked_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def seconds(model: object, plan: Plan, *, tokens: int) -> tuple[float, float]:
        plans.append(plan)
        return 1.0, 1.0 - 0.1 * len(plan.dropped)

    monkeypatch.setattr("spdcompile.latency.step_seconds", seconds)
    monkeypatch.setattr(tuning_module, "step_seconds", seconds)
    monkeypatch.setattr(tuning_module, "check_cores", lambda tp: None)
    found = _tuned(Budget(min_faster=0.15), ZERO_SHOT)
    assert [len(plan.dropped) for plan in plans] == [LAYERS, 2]
    assert found.savings.faster == pytest.approx(0.2) == found.savings.measured
    assert plans[1].dropped == found.plan.dropped


def test_latencies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = Latencies(TP + 1, 64, 0.1, 0.01)
    with pytest.raises(UsageError, match=f"a table for tp={TP + 1}"):
        _tuned(Budget(min_faster=0.1), replace(SETTINGS, latencies=table))
    with pytest.raises(UsageError, match=r"cannot be measured[\s\S]*wait for each other"):
        spdcompile.tune(_model(), _tokens(), tp=4096, budget=Budget(min_faster=0.1), progress=False)
    path = tmp_path / "table.json"
    for text in ("", "[]", '{"format": "other"}', json.dumps({**table.to_dict(), "seconds": 0})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="latencies cannot be read"):
            Latencies.load(path)


@pytest.mark.slow
@pytest.mark.distributed
def test_latency_is_measured_by_two_processes() -> None:
    model = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48)
    plan = Plan(2, 1, frozenset({(0, "attn")}))
    undropped, dropped = step_seconds(model, plan, tokens=8, rounds=3, backend="eager")
    assert 0 < undropped < 5 and 0 < dropped < 5


# ---- what cannot be tuned


def test_model_without_a_point_to_drop_is_refused() -> None:
    model = tiny("gpt_neox", layers=1, hidden=32, heads=4, intermediate=48)
    with pytest.raises(RefusalError, match="no sync point to drop"):
        spdcompile.tune(
            model,
            _tokens(),
            tp=TP,
            budget=Budget(max_loss=0.1),
            points=Points.ATTENTION,
            progress=False,
        )


def test_single_chunk_leaves_nothing_to_hold_out() -> None:
    with pytest.raises(UsageError, match="too short to hold some of it out"):
        spdcompile.tune(
            _compiled(), _tokens()[:1], tp=TP, budget=Budget(max_loss=0.1), progress=False
        )

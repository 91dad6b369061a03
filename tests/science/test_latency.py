"""Latency budgets: from a table, and measured by processes of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import spdcompile
from spdcompile import Budget, Latencies, Plan
from spdcompile.errors import UsageError
from spdcompile.tuning import saving
from spdcompile.tuning.latency import Seconds, step_seconds
from tests.models import tiny
from tests.science.tuned_model import LAYERS, SETTINGS, TP, ZERO_SHOT, model, tokens, tuned


def test_table_of_latencies_says_how_many_points_go(tmp_path: Path) -> None:
    Latencies(TP, 64, seconds=0.1, all_reduce_seconds=0.01).save(tmp_path / "table.json")
    table = Latencies.load(tmp_path / "table.json")
    settings = replace(ZERO_SHOT, latencies=table)
    found = tuned(Budget(min_faster=0.15), settings)
    assert found.met and len(found.plan.dropped) == 2
    assert found.savings.faster == pytest.approx(0.2) and found.savings.measured is None
    assert not tuned(Budget(min_faster=0.5), settings).met
    both = tuned(Budget(min_faster=0.05, min_saved=0.5), settings)
    assert both.met and len(both.plan.dropped) == 3


def test_measured_latencies_are_checked_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def seconds(source: object, plan: Plan, *, tokens: int) -> Seconds:
        plans.append(plan)
        return Seconds(1.0, 1.0 - 0.1 * len(plan.dropped), "thought")

    monkeypatch.setattr("spdcompile.tuning.latency.step_seconds", seconds)
    monkeypatch.setattr(saving, "step_seconds", seconds)
    monkeypatch.setattr(saving, "check_cores", lambda tp, *, fix: None)
    found = tuned(Budget(min_faster=0.15), ZERO_SHOT)
    assert [len(plan.dropped) for plan in plans] == [LAYERS, 2]
    assert found.savings.faster == pytest.approx(0.2) == found.savings.measured
    assert plans[1].dropped == found.plan.dropped


def test_latencies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = Latencies(TP + 1, 64, 0.1, 0.01)
    with pytest.raises(UsageError, match=f"a table for tp={TP + 1}"):
        tuned(Budget(min_faster=0.1), replace(SETTINGS, latencies=table))
    with pytest.raises(UsageError, match=r"cannot be measured[\s\S]*wait for each other"):
        spdcompile.tune(model(), tokens(), tp=4096, budget=Budget(min_faster=0.1), progress=False)
    path = tmp_path / "table.json"
    for text in ("", "[]", '{"format": "other"}', json.dumps({**table.to_dict(), "seconds": 0})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="latencies cannot be read"):
            Latencies.load(path)


@pytest.mark.slow
@pytest.mark.distributed
def test_latency_is_measured_by_two_processes() -> None:
    small = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48)
    plan = Plan(2, 1, frozenset({(0, "attn")}))
    found = step_seconds(small, plan, tokens=8, rounds=3, backend="eager")
    assert 0 < found.undropped < 5 and 0 < found.dropped < 5 and found.transport

"""Plans as data: files, hashes, and what is no plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdcompile import Plan
from spdcompile.errors import PlanError
from spdcompile.plan import attention_points
from spdcompile.planning import make_plan
from tests.zoo.models import build


def test_plan_survives_a_file(tmp_path: Path) -> None:
    plan = Plan(4, 3, frozenset({(2, "attn"), (0, "mlp")}), {1: ((3,), (1,), (0,), (2,))})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["dropped"] == ["0.mlp", "2.attn"]
    assert data["head_groups"] == {"1": [[3], [1], [0], [2]]}


def test_hash_tells_what_changes_the_program() -> None:
    plan = Plan(2, 3, frozenset({(0, "attn")}), {0: ((0,), (1,))})
    same = Plan(2, 3, frozenset({(0, "attn")}), {0: ((0,), (1,))}, measured={"ppl": 1.0})
    assert plan.content_hash == same.content_hash
    others = [
        Plan(4, 3, plan.dropped, plan.head_groups),
        Plan(2, 4, plan.dropped, plan.head_groups),
        Plan(2, 3, frozenset({(1, "attn")}), plan.head_groups),
        Plan(2, 3, frozenset({(0, "mlp")}), plan.head_groups),
        Plan(2, 3, plan.dropped, {0: ((1,), (0,))}),
    ]
    assert len({other.content_hash for other in (plan, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "spdcompile-plan-0"},
        {"dropped": ["attn"]},
        {"dropped": ["x.attn"]},
        {"dropped": [3]},
        {"dropped": None},
        {"tp": None},
        {"tp": "two"},
        {"head_groups": []},
        {"head_groups": {"a": [[0]]}},
        {"measured": None},
    ],
)
def test_data_that_is_no_plan_is_refused(change: dict[str, Any]) -> None:
    data = Plan(2, 2, frozenset({(0, "attn")})).to_dict()
    assert Plan.from_dict(data) == Plan(2, 2, frozenset({(0, "attn")}))
    with pytest.raises(PlanError, match=r"This is not a plan\.[\s\S]*spdcompile-plan-1"):
        Plan.from_dict(data | change)
    for name in change:
        with pytest.raises(PlanError, match=f"KeyError: '{name}'"):
            Plan.from_dict({key: value for key, value in data.items() if key != name})


def test_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"Cannot read the plan[\s\S]*plan\.json"):
        Plan.load(path)
    for text in ("{", "[]", "3", '"plan"', "{}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PlanError):
            Plan.load(path)


def test_attention_points_of_a_mask() -> None:
    assert attention_points(None, 3) == frozenset()
    assert attention_points([True, False, True], 3) == {(0, "attn"), (2, "attn")}
    assert attention_points((False,), 1) == frozenset()


def test_layers_are_counted_on_the_model() -> None:
    model = build("blt")
    assert not hasattr(model.config, "num_hidden_layers")
    assert make_plan(model, 2, None).num_layers == 2

"""What a user reads when an operator has no placement rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spdcompile
from spdcompile.errors import NoRuleError
from spdcompile.passes.placement import RULES
from tests.compare import rel_err
from tests.models import tiny, token_ids

SILU = torch.ops.aten.silu.default


class _NoAnswer:
    """A rule that covers nothing, whole values included."""

    def follow(self, call: Any, channels: Any) -> Any:
        return call.operands()[0].ids

    def place(self, call: Any) -> None:
        return None


def test_operator_without_a_rule_keeps_its_linears_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, SILU)
    model = tiny("llama", layers=1)
    compiled = spdcompile.compile(model, tp=2, backend="eager")
    reasons = [refusal.reason for refusal in compiled.report.refusals]
    assert any("aten.silu.default" in r and "has no placement rule" in r for r in reasons)
    linears = [linear for block in compiled.report.blocks for linear in block.whole]
    assert any("gate_proj" in name for name in linears)
    ids = token_ids()
    with torch.no_grad():
        assert rel_err(compiled(ids).logits, model(ids).logits) < 1e-5


def test_rule_that_covers_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, SILU, _NoAnswer())
    with pytest.raises(NoRuleError) as caught:
        spdcompile.compile(tiny("llama", layers=1), tp=2, backend="eager")
    assert str(caught.value).splitlines() == [
        "aten.silu.default has no placement rule.",
        "  where  : silu (model.layers.0.mlp.act_fn)",
        "  found  : operands placed R",
        "  needed : a row for R",
        "  fix    : add it to the operator's family in passes/placement/",
    ]

"""Sensitivity: cached evaluations equal the naive ones, at the cost that the method promises."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile import CalibrateSettings, Method, Plan, Points, Quality
from spdcompile.compiled import CompiledModel
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.passes.drop import PointName
from spdcompile.runtime.calibrate import Sensitivity
from spdcompile.runtime.data import token_loss
from tests.models import tiny, token_ids

LAYERS, TP = 3, 2
# Both run the same graphs on the same batches, and add up the losses alike.
BOUND = 1e-6
GROUPS = {1: ((0, 3), (1, 2))}
ATTENTION = CalibrateSettings(points=Points.ATTENTION, batch_size=2)
BOTH = CalibrateSettings(methods=(Method.CUMULATIVE, Method.ALONE), batch_size=2)
EAGER = {"executor": "local", "backend": "eager"}
POINTS = ((0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp"), (2, "attn"))


@cache
def _model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return _model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return token_ids(batch=5, length=16)


@pytest.fixture(scope="module")
def sensitivity(tokens: Tensor) -> Sensitivity:
    return spdcompile.calibrate(_compiled(), tokens, tp=TP, settings=ATTENTION, progress=False)


@pytest.fixture(scope="module")
def both(model: PreTrainedModel, tokens: Tensor) -> Sensitivity:
    return spdcompile.calibrate(model, tokens, tp=TP, settings=BOTH, progress=False)


@cache
def _compiled(head_groups: bool = False) -> CompiledModel:
    groups = GROUPS if head_groups else None
    return spdcompile.compile(_model(), tp=TP, head_groups=groups, **EAGER)


def _logits(tokens: Tensor, points: Iterable[PointName], head_groups: bool = False) -> Tensor:
    plan = Plan(TP, LAYERS, frozenset(points), GROUPS if head_groups else {})
    logits = _compiled(head_groups).with_mask(plan)(tokens).logits
    assert logits is not None
    return logits


def _naive(tokens: Tensor, points: Iterable[PointName], head_groups: bool = False) -> float:
    loss, count = token_loss(_logits(tokens, points, head_groups), tokens)
    return math.exp(loss / count)


def _perplexities(sensitivity: Sensitivity, method: Method = Method.CUMULATIVE) -> list[float]:
    return [quality.perplexity for quality in sensitivity.found[method]]


def test_perplexities_are_those_of_whole_evaluations(
    tokens: Tensor, sensitivity: Sensitivity
) -> None:
    naive = [
        _naive(tokens, [(layer, "attn") for layer in range(start, LAYERS)])
        for start in range(LAYERS + 1)
    ]
    found = [*_perplexities(sensitivity), sensitivity.undropped.perplexity]
    assert found == pytest.approx(naive, rel=BOUND)
    assert len({round(value, 3) for value in naive}) == LAYERS + 1, "each drop shows"
    assert sensitivity.points == tuple((layer, "attn") for layer in range(LAYERS))


def test_mlp_points_are_measured_too(tokens: Tensor, both: Sensitivity) -> None:
    assert both.points == POINTS
    naive = [_naive(tokens, POINTS[place:]) for place in range(len(POINTS))]
    assert _perplexities(both) == pytest.approx(naive, rel=BOUND)
    alone = [_naive(tokens, [point]) for point in POINTS]
    assert _perplexities(both, Method.ALONE) == pytest.approx(alone, rel=BOUND)
    assert list(both.refused) == [(2, "mlp")] and "last one" in both.refused[2, "mlp"]


def test_scores_are_differences_of_perplexities(both: Sensitivity) -> None:
    kept = both.undropped.perplexity
    perplexities = _perplexities(both)
    assert both.scores[0] == perplexities[0] - perplexities[1]
    assert sum(both.scores) == pytest.approx(perplexities[0] - kept)
    alone = both.scores_by(Method.ALONE)
    assert alone[1, "mlp"] == _perplexities(both, Method.ALONE)[3] - kept
    assert alone[2, "attn"] == both.scores[-1], "the last one is alone in both"


def test_kl_and_agreement_are_those_to_the_model(
    model: PreTrainedModel, tokens: Tensor, both: Sensitivity
) -> None:
    with torch.no_grad():
        own = model(tokens).logits[:, :-1].log_softmax(-1)
    assert both.undropped.kl == 0 and both.undropped.agreement == 1
    for place, points in enumerate(POINTS):
        other = _logits(tokens, [points])[:, :-1].log_softmax(-1)
        kl = float((own.exp() * (own - other)).sum(-1).mean())
        same = float((own.argmax(-1) == other.argmax(-1)).double().mean())
        quality = both.found[Method.ALONE][place]
        assert quality.kl == pytest.approx(kl, rel=1e-4) and kl > 0.01
        assert quality.agreement == pytest.approx(same) and same < 1


def test_undropped_perplexity_is_that_of_the_model(
    model: PreTrainedModel, tokens: Tensor, sensitivity: Sensitivity
) -> None:
    with torch.no_grad():
        loss, count = token_loss(model(tokens).logits, tokens)
    assert sensitivity.undropped.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_blocks_before_the_range_are_run_once(sensitivity: Sensitivity) -> None:
    """3 blocks once, then 0 + 1 + 2 + 3 of them; 4 whole evaluations would run 12."""
    assert sensitivity.block_evaluations == 3 + 6
    assert sensitivity.naive_block_evaluations == 12


def test_evaluations_that_two_methods_need_are_run_once(both: Sensitivity) -> None:
    """3 blocks once, 3 + 3 + 2 + 2 + 1 twice, less the last point's, which both drop alone."""
    assert both.block_evaluations == 3 + 11 + 11 - 1
    assert both.naive_block_evaluations == (1 + 5 + 5 - 1) * 3


def test_least_sensitive_points_come_in_program_order() -> None:
    points = tuple((layer, "attn") for layer in range(4))
    found = tuple(Quality(value) for value in (16.0, 10.0, 9.5, 6.5))
    sensitivity = Sensitivity(points, Quality(6.0), {Method.CUMULATIVE: found})
    assert sensitivity.scores == (6.0, 0.5, 3.0, 0.5)
    assert sensitivity.least_sensitive(0) == ()
    assert sensitivity.least_sensitive(2) == (points[1], points[3])
    assert sensitivity.least_sensitive(3) == points[1:]


def test_head_groups_reach_the_evaluations(model: PreTrainedModel, tokens: Tensor) -> None:
    points = ((1, "attn"), (2, "attn"))
    expected = _naive(tokens, points, head_groups=True)
    plan = Plan(TP, LAYERS, frozenset(points), GROUPS)
    for how in ({"head_groups": GROUPS}, {"plan": plan}):
        result = spdcompile.calibrate(
            model, tokens, tp=TP, settings=ATTENTION, progress=False, **how
        )
        assert _perplexities(result)[1] == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize("compiled_before", (False, True))
@pytest.mark.parametrize(
    ("plan", "found"),
    [
        (Plan(3, LAYERS), "tp=3"),
        (Plan(TP, 5), "5 layers"),
        (Plan(TP, LAYERS, model="of another"), "of another"),
    ],
)
def test_plan_of_another_model_or_tp_is_refused(
    model: PreTrainedModel, tokens: Tensor, plan: Plan, found: str, compiled_before: bool
) -> None:
    given = _compiled() if compiled_before else model
    with pytest.raises(PlanError, match=f"made for something else[\\s\\S]*{found}"):
        spdcompile.calibrate(given, tokens, tp=TP, plan=plan, progress=False)


@pytest.mark.parametrize(("family", "reason"), [("gpt_neox", "merged"), ("gemma2", "layernorm")])
def test_model_whose_points_cannot_be_dropped_is_refused(family: str, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        spdcompile.calibrate(
            tiny(family, layers=1), token_ids(), tp=TP, settings=ATTENTION, progress=False
        )


@pytest.mark.parametrize("shape", [(4,), (0, 8), (1, 2, 3)])
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    tokens = torch.ones(shape, dtype=torch.long)
    with pytest.raises(UsageError, match=r"calibration tokens do not fit[\s\S]*\[chunks, length\]"):
        spdcompile.calibrate(_compiled(), tokens, tp=TP, progress=False)


@pytest.mark.parametrize("outside", [96, -1])
def test_tokens_outside_the_vocabulary_are_refused(outside: int) -> None:
    tokens = token_ids()
    tokens[1, 7] = outside
    with pytest.raises(UsageError, match=rf"tokens\[1, 7\]\n.*id {outside}\n.*0 to 95"):
        spdcompile.calibrate(_compiled(), tokens, tp=TP, progress=False)

"""Sensitivity: cached evaluations equal the naive ones, at the cost that the method promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile.errors import RefusalError, UsageError
from spdcompile.runtime.calibrate import Sensitivity
from spdcompile.runtime.data import token_loss
from tests.models import tiny, token_ids

LAYERS, TP = 3, 2
# Both run the same graphs on the same batches, and add up the losses alike.
BOUND = 1e-6
GROUPS = {1: ((0, 3), (1, 2))}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return token_ids(batch=5, length=16)


@pytest.fixture(scope="module")
def sensitivity(model: PreTrainedModel, tokens: Tensor) -> Sensitivity:
    return spdcompile.calibrate(model, tokens, tp=TP, batch_size=2, progress=False)


def _naive(model: PreTrainedModel, tokens: Tensor, mask: list[bool], **settings: object) -> float:
    compiled = spdcompile.compile(
        model, tp=TP, spd_mask=mask, executor="local", backend="eager", **settings
    )
    loss, count = token_loss(compiled(tokens).logits, tokens)
    return math.exp(loss / count)


def test_perplexities_are_those_of_whole_evaluations(
    model: PreTrainedModel, tokens: Tensor, sensitivity: Sensitivity
) -> None:
    naive = [
        _naive(model, tokens, [layer >= start for layer in range(LAYERS)])
        for start in range(LAYERS + 1)
    ]
    assert sensitivity.perplexities == pytest.approx(naive, rel=BOUND)
    assert len({round(value, 3) for value in naive}) == LAYERS + 1, "each drop shows"


def test_last_perplexity_is_that_of_the_model(
    model: PreTrainedModel, tokens: Tensor, sensitivity: Sensitivity
) -> None:
    with torch.no_grad():
        loss, count = token_loss(model(tokens).logits, tokens)
    assert sensitivity.perplexities[-1] == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_scores_add_up_to_the_whole_loss(sensitivity: Sensitivity) -> None:
    assert len(sensitivity.scores) == LAYERS
    total = sensitivity.perplexities[0] - sensitivity.perplexities[-1]
    assert sum(sensitivity.scores) == pytest.approx(total)


def test_blocks_before_the_range_are_run_once(sensitivity: Sensitivity) -> None:
    """3 blocks once, then 0 + 1 + 2 + 3 of them; 4 whole evaluations would run 12."""
    assert sensitivity.block_evaluations == 3 + 6
    assert sensitivity.naive_block_evaluations == 12


def test_least_sensitive_blocks_come_in_order_of_layer() -> None:
    sensitivity = Sensitivity((16.0, 10.0, 9.5, 6.5, 6.0), 0, 0)  # scores 6, 0.5, 3, 0.5
    assert sensitivity.scores == (6.0, 0.5, 3.0, 0.5)
    assert sensitivity.least_sensitive(0) == ()
    assert sensitivity.least_sensitive(2) == (1, 3)
    assert sensitivity.least_sensitive(3) == (1, 2, 3)


def test_head_groups_reach_the_evaluations(model: PreTrainedModel, tokens: Tensor) -> None:
    result = spdcompile.calibrate(model, tokens, tp=TP, head_groups=GROUPS, progress=False)
    expected = _naive(model, tokens, [False, True, True], head_groups=GROUPS)
    assert result.perplexities[1] == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize(("family", "reason"), [("gpt_neox", "merged"), ("gemma2", "layernorm")])
def test_model_whose_points_cannot_be_dropped_is_refused(family: str, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        spdcompile.calibrate(tiny(family, layers=1), token_ids(), tp=TP, progress=False)


@pytest.mark.parametrize("shape", [(4,), (0, 8), (1, 2, 3)])
def test_tokens_that_do_not_fit_are_refused(model: PreTrainedModel, shape: tuple[int, ...]) -> None:
    tokens = torch.ones(shape, dtype=torch.long)
    with pytest.raises(UsageError, match=r"calibration tokens do not fit[\s\S]*\[chunks, length\]"):
        spdcompile.calibrate(model, tokens, tp=TP, progress=False)

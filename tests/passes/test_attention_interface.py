"""What attention layers ask for is honoured or refused, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import spdcompile.runtime.executor  # noqa: F401  (gives the operators their kernels)
from spdcompile.passes.attention_interface import (
    UnsupportedAttentionError,
    attention_as_operator,
)
from tests.compare import rel_err
from tests.models import tiny

BATCH, LENGTH, HEADS, WIDTH, WINDOW, CHUNK = 2, 9, 4, 6, 3, 4
VALID = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * LENGTH])
MASKS: dict[str, Callable[..., Tensor | None]] = {
    "full": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunk": masking_utils.create_chunked_causal_mask,
}


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny("llama", hidden=HEADS * WIDTH, heads=HEADS, layers=1)
    model.config.sliding_window, model.config.attention_chunk_size = WINDOW, CHUNK
    return model


def _mask(model: PreTrainedModel, kind: str, **settings: Any) -> Tensor | None:
    hidden = torch.zeros(BATCH, LENGTH, HEADS * WIDTH)
    return MASKS[kind](model.config, hidden, VALID, None, **settings)


def _attend(model: PreTrainedModel, mask: Tensor | None, **settings: Any) -> Tensor:
    """What a layer gets from the attention function that the model is set to, [B, S, H, D]."""
    make = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, BATCH, HEADS, LENGTH, WIDTH, generator=make)
    layer = nn.Module()
    layer.num_key_value_groups, layer.training = 1, False
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)
    return attend(layer, q, k, v, mask, scaling=0.5, **settings)[0]


@pytest.mark.parametrize("kind", MASKS)
def test_mask_means_what_the_model_said(model: PreTrainedModel, kind: str) -> None:
    model.set_attn_implementation("sdpa")
    expected = _attend(model, _mask(model, kind))
    with attention_as_operator(model):
        # As an Exaone 4 layer without a window does, which passes one all the same.
        found = _attend(model, _mask(model, kind), sliding_window=WINDOW, dropout=0.0)
    assert rel_err(found, expected, real=VALID) < 1e-5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "takes position_bias"),
        ({"indices": torch.zeros(1)}, "takes indices"),
        ({"dropout": 0.1}, "has dropout"),
        ({"a_new_one": 3}, "takes a_new_one"),
    ],
)
def test_settings_that_change_attention_are_refused(
    model: PreTrainedModel, settings: dict[str, Any], reason: str
) -> None:
    with (
        attention_as_operator(model),
        pytest.raises(UnsupportedAttentionError, match=reason),
    ):
        _attend(model, _mask(model, "full"), **settings)


def test_masks_of_unknown_meaning_are_refused(model: PreTrainedModel) -> None:
    def sees_even(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key % 2 == 0

    with attention_as_operator(model):
        known = _mask(model, "full")
        combined = _mask(model, "full", and_mask_function=sees_even)
        for mask, reason in (
            (combined, "computed from data"),
            (known & True, "computed from data"),
            (None, "takes no mask"),
        ):
            with pytest.raises(UnsupportedAttentionError, match=reason):
                _attend(model, mask)


def test_mask_can_be_read_as_a_mask(model: PreTrainedModel) -> None:
    with attention_as_operator(model):
        mask = _mask(model, "window")
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (columns <= rows) & (rows - columns < WINDOW) & VALID.bool()[:, None, None, :]
    assert mask.equal(seen)

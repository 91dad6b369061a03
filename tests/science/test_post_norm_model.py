"""The plain-torch model that examples/measure_post_norm.py drops sync points of."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compare import rel_err
from tests.models import tiny, token_ids
from tests.spd_reference import spd_logits

EXAMPLE = Path(__file__).parents[2] / "examples" / "post_norm_model.py"
F32_BOUND = 1e-5
VISIBLE = 1e-3
LAYERS = frozenset({0, 2})


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("way", ("own", "frozen"))
@pytest.mark.parametrize("tp", (2, 4))
@torch.no_grad()
def test_without_norms_a_drop_is_that_of_the_reference(
    example: dict[str, Any], tp: int, way: str
) -> None:
    llama, ids = tiny("llama", layers=3), token_ids()
    result = example["PostNormModel"](llama)(ids, example["Drop"](tp, LAYERS, way))
    dropped = frozenset((layer, "attn") for layer in LAYERS)
    assert rel_err(result, spd_logits(llama, ids, tp=tp, dropped=dropped)) < F32_BOUND


@torch.no_grad()
def test_nothing_dropped_is_the_model_with_its_norms(example: dict[str, Any]) -> None:
    """The norms written into the Hugging Face model itself."""
    llama, ids = tiny("llama", layers=3), token_ids()
    model = example["PostNormModel"](llama)
    plain = model(ids, example["Drop"](2))
    assert rel_err(plain, llama(ids).logits) < F32_BOUND
    for layer, attn, mlp in zip(llama.model.layers, model.attn_norms, model.mlp_norms, strict=True):
        for norm, module, name in (
            (attn, layer.self_attn, "o_proj"),
            (mlp, layer.mlp, "down_proj"),
        ):
            norm.weight = nn.Parameter(0.5 + torch.rand(64))
            behind = nn.RMSNorm(64, eps=1e-6)
            behind.weight.copy_(norm.weight)
            setattr(module, name, nn.Sequential(getattr(module, name), behind))
    expected = llama(ids).logits
    for layer in llama.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = (
            layer.self_attn.o_proj[0],
            layer.mlp.down_proj[0],
        )
    result = model(ids, example["Drop"](2))
    assert rel_err(result, expected) < F32_BOUND
    assert rel_err(plain, expected) > VISIBLE
    ways = [
        model(ids, example["Drop"](2, LAYERS, way))
        for way in ("own", "own, mean", "share", "frozen", "unseen", "carried")
    ]
    for number, one in enumerate(ways):
        assert all(rel_err(one, other) > VISIBLE for other in (result, *ways[:number]))

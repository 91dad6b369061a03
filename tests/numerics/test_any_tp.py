"""Any number of ranks: nothing divides anything, and the logits stay those of Hugging Face.

Units that do not divide by tp are padded with zero units; ranks beyond the K/V heads share them,
each with its own query heads; vocabulary and intermediate sizes are odd. Bound: float32 ranks sum
in another order than one process, 1e-5 of the largest logit, about ten times what was seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import spdcompile
from spdcompile.passes.base import RegionKind
from tests.compare import rel_err
from tests.models import left_padded, tiny, token_ids

BOUND = 1e-5


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Heads, K/V heads, widths and vocabulary that share no factor by design."""
    kv_heads = draw(st.sampled_from((1, 2, 3, 5, 7)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 3, 5)))
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": heads * 4,
        "intermediate": draw(st.integers(3, 41)),
        "vocab": draw(st.integers(23, 67)),
        "seed": draw(st.integers(0, 9)),
    }


@given(
    family=st.sampled_from(("llama_gqa", "qwen3", "phi3")),
    chosen=sizes(),
    tp=st.integers(2, 9),
)
@example("llama_gqa", {"heads": 25, "kv_heads": 5, "hidden": 100, "vocab": 37}, 2)
@example("llama_gqa", {"heads": 28, "kv_heads": 7, "hidden": 56, "vocab": 37}, 2)
@example("qwen3", {"heads": 6, "kv_heads": 2, "hidden": 24, "vocab": 37}, 3)
@example("phi3", {"heads": 6, "kv_heads": 2, "hidden": 24, "vocab": 37}, 4)
@settings(max_examples=12)
def test_nothing_divides_anything(family: str, chosen: dict[str, Any], tp: int) -> None:
    model = tiny(family, layers=1, **chosen)
    assert error_at(model, tp) < BOUND


@pytest.mark.parametrize("tp", (2, 3, 8, 11))
def test_one_kv_head_serves_all_ranks(tp: int) -> None:
    """Multi-query attention: every rank holds the one K/V head, and its share of query heads."""
    model = tiny("llama_gqa", layers=1, kv_heads=1)
    assert error_at(model, tp) < BOUND
    assert attention_units(model, tp) == 8


@pytest.mark.parametrize(("tp", "units"), ((2, 2), (3, 8), (4, 4), (5, 8), (8, 8), (9, 8)))
def test_units_are_as_coarse_as_the_ranks_allow(tp: int, units: int) -> None:
    """Two K/V heads and eight query heads: K/V heads are held as often as the ranks need."""
    assert attention_units(tiny("llama_gqa", layers=1, kv_heads=2), tp) == units


def test_shared_heads_are_held_whole() -> None:
    """Eight ranks over two K/V heads: each holds one of them, next to its own query head."""
    model = tiny("llama_gqa", layers=1, kv_heads=2)
    compiled = spdcompile.compile(model, tp=8, executor="local", backend="eager")
    part = compiled.program.parts[1]
    local = {name: spec.index.shape[1] for name, spec in part.shards.items()}
    assert local["self_attn_q_proj_weight"] == 8
    assert local["self_attn_k_proj_weight"] == local["self_attn_v_proj_weight"] == 8
    spec = part.shards["self_attn_k_proj_weight"]
    assert [int(row[0]) // 8 for row in spec.index] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert spec.repeated == 3 * 16
    assert spec.padded == 0


def error_at(model: PreTrainedModel, tp: int) -> float:
    """Largest relative error over a padded and an unpadded batch."""
    compiled = spdcompile.compile(model, tp=tp, executor="local", backend="eager")
    worst = 0.0
    for shape in ((2, 7), (1, 3)):
        ids = token_ids(batch=shape[0], length=shape[1], vocab=model.config.vocab_size)
        padded, mask = left_padded(ids, num_pads=2)
        with torch.no_grad():
            expected = model(input_ids=padded, attention_mask=mask).logits
        logits = compiled(padded, attention_mask=mask).logits
        worst = max(worst, rel_err(logits, expected, real=mask))
    return worst


def attention_units(model: PreTrainedModel, tp: int) -> int:
    """Units of the first block's attention."""
    compiled = spdcompile.compile(model, tp=tp, executor="local", backend="eager")
    regions = compiled.program.graph_of(compiled.program.parts[1]).regions
    (units,) = {r.num_units for r in regions if r.kind is RegionKind.ATTENTION}
    return units

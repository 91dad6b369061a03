"""Blocks joined into one graph compute what they compute one by one, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import spdcompile
from spdcompile import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.plan import Plan
from tests.compare import rel_err
from tests.models import left_padded as padded
from tests.models import tiny
from tests.models import token_ids as ids_of
from tests.zoo.models import build, entries, left_padded, token_ids

FAMILIES = ("llama_gqa", "opt", "gpt2", "gpt_neox", "phi3")
SIZES = {"hidden": 32, "heads": 4, "intermediate": 50}
BOUND = 1e-5
# Beside blocks that hand on one value: keys and values that later blocks read, blocks of several
# kinds in turn, weights that several blocks share, latents.
ZOO = ("gemma3n_text", "lfm2", "zamba", "deepseek_v3", "bloom")


def compiled_with(
    layers: int, dropped: frozenset[tuple[int, str]], **settings: Any
) -> CompiledModel:
    family, tp = settings.pop("family", "llama_gqa"), settings.pop("tp", 2)
    return spdcompile.compile(
        tiny(family, layers=layers, **SIZES),
        tp=tp,
        spd_mask=Plan(tp=tp, num_layers=layers, dropped=dropped),
        executor="local",
        **{"backend": "eager", **settings},
    )


def step_by_step(compiled: CompiledModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits of a prompt, and of two tokens after it, each by itself."""
    length = ids.shape[1] - 2
    cache = compiled.new_cache(ids.shape[0], ids.shape[1] + 3)
    prompt = compiled(ids[:, :length], mask[:, :length], past_key_values=cache, logits_to_keep=2)
    steps = [
        compiled(ids[:, end - 1 : end], mask[:, :end], past_key_values=cache)
        for end in (length + 1, length + 2)
    ]
    return [prompt.logits, *(step.logits for step in steps)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    family, layers = draw(st.sampled_from(FAMILIES)), draw(st.integers(1, 6))
    last = 0 if family == "gpt_neox" else layers - 1  # both halves of its blocks share one sum
    points = [(layer, name) for layer in range(last) for name in ("attn", "mlp")]
    return {
        "family": family,
        "layers": layers,
        "tp": draw(st.integers(1, 3)),
        "dropped": frozenset(point for point in points if draw(st.booleans())),
        "blocks_per_graph": draw(st.integers(2, 7)),
    }


@settings(max_examples=8, deadline=None)
@given(case=cases())
@example(
    {"layers": 5, "dropped": frozenset({(1, "attn"), (2, "mlp")}), "tp": 2, "blocks_per_graph": 2}
)
def test_joined_blocks_compute_the_same_bits(case: dict[str, Any]) -> None:
    blocks = case["blocks_per_graph"]
    joined, one_by_one = (compiled_with(**{**case, "blocks_per_graph": n}) for n in (blocks, 1))
    ids, mask = padded(ids_of(length=9))
    assert torch.equal(joined(ids, mask).logits, one_by_one(ids, mask).logits)
    found, expected = (step_by_step(each, ids, mask) for each in (joined, one_by_one))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(joined.executor.program.parts) == 2 + -(-case["layers"] // blocks)
    told, expected = (replace(each.report, passes=()) for each in (joined, one_by_one))
    assert told == expected, "the report tells of blocks as they are"


@pytest.mark.parametrize("entry", ZOO)
def test_other_architectures_can_be_joined(entry: str) -> None:
    if entry not in entries():
        pytest.skip(f"this transformers has no {entry}")
    model = build(entry)
    ids = token_ids((3, 9), model.config.get_text_config().vocab_size)
    ids, mask = left_padded(ids, (0, 2, 6))
    joined, one_by_one = (
        spdcompile.compile(model, tp=2, backend="eager", executor="local", blocks_per_graph=blocks)
        for blocks in (3, 1)
    )
    assert len(joined.executor.program.parts) < len(one_by_one.executor.program.parts)
    assert torch.equal(joined(ids, mask).logits, one_by_one(ids, mask).logits)
    if not joined.cache_refusal:
        found, expected = (step_by_step(each, ids, mask) for each in (joined, one_by_one))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("layers", "dropped", "graphs"),
    [
        (4, frozenset(), 1),
        (6, frozenset(), 1),
        (5, frozenset(), 2),  # the last block has one by itself
        (4, frozenset({(0, "attn"), (2, "attn")}), 1),
        (4, frozenset({(0, "attn"), (3, "attn")}), 2),
    ],
)
def test_equal_runs_of_blocks_are_one_graph(
    layers: int, dropped: frozenset[tuple[int, str]], graphs: int
) -> None:
    compiled = compiled_with(layers, dropped, blocks_per_graph=2)
    program = compiled.executor.program
    assert len({part.graph for part in program.parts[1:-1]}) == graphs
    counts = [count_sync_nodes(program.graph_of(part).module) for part in program.parts[1:-1]]
    assert sum(counts) == 2 * layers - len(dropped)


def test_they_stay_joined_with_another_mask_and_other_weights(tmp_path: Path) -> None:
    compiled = compiled_with(4, frozenset(), blocks_per_graph=2)
    ids, mask = padded(ids_of(length=9))
    one_by_one = compiled_with(4, frozenset())
    masked = compiled.with_mask([True, False, True, True])
    assert len(masked.executor.program.parts) == 4
    expected = one_by_one.with_mask([True, False, True, True])(ids, mask).logits
    assert torch.equal(masked(ids, mask).logits, expected)
    other = {name: 1.5 * x for name, x in compiled.model.state_dict().items() if "mlp" in name}
    assert torch.equal(
        masked.with_weights(other)(ids, mask).logits,
        one_by_one.with_mask([True, False, True, True]).with_weights(other)(ids, mask).logits,
    )
    compiled.save(tmp_path, weights="included")
    loaded = spdcompile.load(tmp_path, executor="local", backend="eager", blocks_per_graph=4)
    assert len(loaded.executor.program.parts) == 3
    assert torch.equal(loaded(ids, mask).logits, one_by_one(ids, mask).logits)


def test_inductor_compiles_joined_blocks() -> None:
    compiled, eager = (
        compiled_with(2, frozenset({(0, "attn")}), backend=backend, blocks_per_graph=2)
        for backend in ("inductor", "eager")
    )
    ids, mask = padded(ids_of(length=9))
    found, expected = (step_by_step(each, ids, mask) for each in (compiled, eager))
    for logits, wanted in zip(found, expected, strict=True):
        assert rel_err(logits, wanted) < BOUND


@pytest.mark.parametrize("blocks", [0, -1, 1.5, "2"])
def test_a_graph_holds_at_least_one_block(blocks: Any) -> None:
    with pytest.raises(UsageError, match="blocks_per_graph"):
        compiled_with(2, frozenset(), blocks_per_graph=blocks)


def test_distillation_asks_for_single_blocks() -> None:
    compiled = compiled_with(2, frozenset(), blocks_per_graph=2)
    with pytest.raises(UsageError, match="blocks_per_graph=1"):
        spdcompile.distill(compiled, ids_of(length=9), tp=2, spd_mask=[True, False])

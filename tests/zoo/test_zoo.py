"""A slice of the zoo, and what the whole of it must cover."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig

import spdcompile
from tests.zoo.measure import References, measure, run_of
from tests.zoo.models import (
    build,
    entries,
    mapped_types,
    model_type,
    reasons_without,
    uncovered_types,
)
from tests.zoo.rows import MIN_CONTROL

SLICE = (
    "bart",  # norms after the residual, biases everywhere
    "cohere2",  # attention and MLP in parallel, windows and no positions in turn
    "diffllama",  # two attentions a layer, their difference
    "falcon@alibi",  # its own attention, ALiBi, fused projections
    "gemma3_text",  # norms on each side, windows, tied head
    "gpt_neox@seq",  # fused projections by head, partial rotary
    "granite_swa",  # sinks
    "minimax_m3_vl_text",  # real tokens that see what padding computes
    "mixtral",  # experts
    "olmo2",  # norms over all heads
    "opt@350m",  # learned positions, projections around the blocks
    "prophetnet",  # reads each token three times; biases of heads that mix tokens
    "youtu",  # latent attention
)


@pytest.mark.parametrize("entry", SLICE)
def test_equal_the_unsharded_model(entry: str) -> None:
    if entry not in entries():
        pytest.skip(f"this transformers has no {model_type(entry)}")
    row = measure(entry, (2,))
    assert not row.complaints
    assert row.is_exact, row.failure or row.runs[0].failure


# Experts of which each is a part of one matrix; that are some of a tensor; that attend.
@pytest.mark.parametrize("entry", ["dbrx", "longcat_flash", "jetmoe"])
def test_split_experts_that_lie_otherwise_in_their_weights(entry: str) -> None:
    row = measure(entry, (3,))
    assert row.structure is not None
    experts = row.structure.weights["experts"]
    assert experts.split == experts.total > 0
    assert row.is_exact, row.runs[0]


# Sizes taken from another value; norms that are a module for each head.
@pytest.mark.parametrize("entry", ["roformer", "stablelm@par"])
def test_split_attention_that_was_whole_for_its_spelling(entry: str) -> None:
    row = measure(entry, (3,))
    assert row.structure is not None
    attention = row.structure.weights["attention"]
    assert attention.split == attention.total > 0
    assert row.is_exact, row.runs[0]


def test_cover_every_type_of_the_mapping() -> None:
    missing = uncovered_types()
    assert not missing, (
        f"transformers maps causal LMs that tests/zoo/configs.json does not know: {missing}; give "
        "each a small config under 'configs', or a reason under 'without'"
    )


@pytest.mark.parametrize("kind", sorted(set(reasons_without()) & set(mapped_types())))
def test_give_a_true_reason_for_no_row(kind: str) -> None:
    reason = reasons_without()[kind]
    if reason.startswith("same class as "):
        twin = reason.removeprefix("same class as ").partition(",")[0]
        assert mapped_types()[kind] == mapped_types()[twin]
        assert twin in entries()
    elif reason.startswith("multimodal wrapper; its decoder is "):
        decoder = reason.rpartition(" ")[2]
        assert AutoConfig.for_model(kind).get_text_config().model_type == decoder
        assert decoder in entries()
    else:
        assert reason.startswith(("no text decoder: ", "no decoder of its own: "))


def test_name_variants_of_types_that_have_an_entry() -> None:
    assert {model_type(entry) for entry in entries()} <= set(entries())


def test_logits_that_are_not_finite_are_an_infinite_error() -> None:
    references = References(build("gpt2"))
    broken = [logits.clone() for logits in references.logits]
    broken[1][0, 0, 0] = torch.nan
    assert references.errors(broken) == [0.0, math.inf, 0.0]


def test_build_the_same_model_twice() -> None:
    first, second = (build("llama").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_leave_no_vector_at_its_initial_value() -> None:
    for entry in ("gpt2", "gpt_oss", "deepseek_v3"):
        for name, tensor in build(entry).state_dict().items():
            assert tensor.unique().numel() > 1, f"{entry}: {name}"


def test_see_each_weight_that_is_in_the_wrong_place() -> None:
    model = build("llama")
    references = References(model)
    compiled = spdcompile.compile(model, tp=2, backend="eager", executor="local")
    weights = [name for name, tensor in model.state_dict().items() if tensor.ndim > 1]
    for name in weights:
        rolled = {name: model.state_dict()[name].roll(1, 0)}
        run = run_of(compiled.with_weights(rolled), 2, references)
        assert run.unpadded is not None and run.unpadded > MIN_CONTROL, name

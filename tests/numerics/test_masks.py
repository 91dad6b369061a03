"""Any plan: the compiled model computes what the plain-torch reference of SPD computes.

Bounds, relative to the largest logit of a real token: those of test_lossless.py. A dropped sync
point changes the equations, not how they are rounded.

Each family is captured and lowered once; a plan costs one run of the drop pass.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile import Plan
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.drop import all_points
from spdcompile.passes.ops import SYNC
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.weights import checkpoint_tensors
from tests.compare import rel_err
from tests.models import left_padded, num_units, tiny, token_ids
from tests.spd_reference import spd_logits

F32_BOUND = 1e-5
F64_BOUND = 1e-10
VISIBLE = 1e-3  # a change that no rounding explains
LAYERS = 3
WITH_BIAS = ("opt", "gpt2", "bloom", "gpt_neox_seq")
WITHOUT_BIAS = ("llama", "llama_gqa", "qwen3", "phi3")
PARALLEL = ("gpt_neox",)
SEQUENTIAL = WITH_BIAS + WITHOUT_BIAS

Point = tuple[int, str]
Groups = dict[int, tuple[tuple[int, ...], ...]]


class Case(NamedTuple):
    """A model lowered for `tp` ranks, nothing dropped."""

    model: PreTrainedModel
    lowering: pipeline.Lowering
    executor: LocalExecutor


@cache
def _captured(
    family: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, pipeline.Lowering]:
    model = tiny(family, layers=LAYERS, hidden=32, heads=4, intermediate=48, dtype=dtype)
    return model, pipeline.start(model)


@cache
def _case(family: str, tp: int, groups: tuple = (), dtype: torch.dtype = torch.float32) -> Case:
    model, captured = _captured(family, dtype)
    lowering = pipeline.advance(captured, pipeline.preserving(tp, dict(groups)))
    executor = LocalExecutor(
        lowering.program,
        checkpoint_tensors(model),
        backend=Backend.EAGER,
        device=torch.device("cpu"),
    )
    return Case(model, lowering, executor)


def _dropping(case: Case, points: frozenset[Point]) -> Program:
    return pipeline.advance(case.lowering, pipeline.changing(points)).program


@torch.no_grad()
def _run(case: Case, points: frozenset[Point], ids: Tensor, mask: Tensor | None = None) -> Tensor:
    program = _dropping(case, points)
    return case.executor.with_program(program).run(program_inputs(program, ids, mask))


@torch.no_grad()
def _hugging_face(case: Case, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return case.model(input_ids=ids, attention_mask=mask).logits


def _droppable(family: str) -> list[Point]:
    """Every sync point but the last one, which no plan drops."""
    kinds = ("mlp",) if family in PARALLEL else ("attn", "mlp")
    return list(product(range(LAYERS), kinds))[:-1]


def _plans(family: str) -> st.SearchStrategy[frozenset[Point]]:
    return st.frozensets(st.sampled_from(_droppable(family)))


@st.composite
def _head_groups(draw: st.DrawFn, units: int, tp: int) -> Groups:
    """A random split of the units of some layers, as even as tp allows."""
    layers = draw(st.frozensets(st.integers(0, LAYERS - 1), min_size=1))
    bounds = [units * rank // tp for rank in range(tp + 1)]
    groups = {}
    for layer in sorted(layers):
        order = draw(st.permutations(range(units)))
        groups[layer] = tuple(tuple(sorted(order[a:b])) for a, b in pairwise(bounds))
    return groups


@given(data=st.data())
@settings(max_examples=60)
def test_any_mask_equals_the_reference(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((*SEQUENTIAL, *PARALLEL)), "family")
    tps = [tp for tp in (2, 3, 4) if tp <= num_units(_captured(family)[0].config)]
    case = _case(family, data.draw(st.sampled_from(tps), "tp"))
    points = data.draw(_plans(family), "dropped")
    ids, mask = left_padded(token_ids(seed=data.draw(st.integers(0, 9), "seed")))
    tp = case.lowering.program.tp
    expected = spd_logits(case.model, ids, mask, tp=tp, dropped=points)
    assert rel_err(_run(case, points, ids, mask), expected, real=mask) < F32_BOUND


@given(data=st.data())
@settings(max_examples=12)
def test_any_head_groups_equal_the_reference(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(SEQUENTIAL), "family")
    units, tp = num_units(_captured(family)[0].config), 2
    groups = data.draw(_head_groups(units, tp), "head_groups")
    case = _case(family, tp, tuple(groups.items()))
    ids, mask = left_padded(token_ids())
    for points in (frozenset(), data.draw(_plans(family), "dropped")):
        expected = spd_logits(case.model, ids, mask, tp=tp, dropped=points, head_groups=groups)
        assert rel_err(_run(case, points, ids, mask), expected, real=mask) < F32_BOUND


@given(data=st.data())
@settings(max_examples=10)
def test_any_mask_equals_the_reference_in_float64(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(("opt", "gpt2")), "family")
    case = _case(family, data.draw(st.sampled_from((2, 4)), "tp"), dtype=torch.float64)
    points = data.draw(_plans(family), "dropped")
    expected = spd_logits(case.model, token_ids(), tp=case.lowering.program.tp, dropped=points)
    assert rel_err(_run(case, points, token_ids()), expected) < F64_BOUND


def test_plan_through_the_public_face_equals_the_reference() -> None:
    model, _ = _captured("llama_gqa")
    groups = {0: ((1,), (0,)), 2: ((1,), (0,))}
    dropped = frozenset({(0, "attn"), (0, "mlp"), (2, "attn")})
    plan = Plan(tp=2, num_layers=LAYERS, dropped=dropped, head_groups=groups)
    compiled = spdcompile.compile(model, tp=2, spd_mask=plan, executor="local", backend="eager")
    ids, mask = left_padded(token_ids())
    expected = spd_logits(model, ids, mask, tp=2, dropped=dropped, head_groups=groups)
    assert rel_err(compiled(ids, mask).logits, expected, real=mask) < F32_BOUND


@pytest.mark.parametrize("family", (*SEQUENTIAL, *PARALLEL))
def test_one_rank_with_every_point_dropped_is_the_model(family: str) -> None:
    case, ids = _case(family, 1), token_ids()
    result = _run(case, frozenset(_droppable(family)), ids)
    assert rel_err(result, _hugging_face(case, ids)) < F32_BOUND


@pytest.mark.parametrize("family", (*SEQUENTIAL, *PARALLEL))
def test_each_dropped_point_changes_the_logits(family: str) -> None:
    case, ids = _case(family, 2), token_ids()
    nothing_dropped = _run(case, frozenset(), ids)
    assert rel_err(nothing_dropped, _hugging_face(case, ids)) < F32_BOUND
    for point in _droppable(family):
        changed = _run(case, frozenset({point}), ids)
        assert rel_err(changed, nothing_dropped) > VISIBLE, point


@given(data=st.data())
@settings(max_examples=30)
def test_emitted_all_reduces_are_the_kept_points(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((*SEQUENTIAL, *PARALLEL)), "family")
    case = _case(family, 2)
    points = data.draw(_plans(family), "dropped")
    program = _dropping(case, points)
    emitted = [
        (part.layer, node.args[1])
        for part in program.parts
        for node in program.graph_of(part).module.graph.nodes
        if node.target is SYNC
    ]
    blocks = [point for point in emitted if point[0] is not None]
    everything = all_points(case.lowering.program)
    assert blocks == [point for point in everything if point not in points]
    kinds = 1 if family in PARALLEL else 2
    assert len(everything) == kinds * LAYERS
    assert all(part.layer is not None or not part.dropped for part in program.parts)


def test_equal_blocks_with_equal_drops_share_a_graph() -> None:
    case = _case("llama", 2)
    every = frozenset((layer, "attn") for layer in range(LAYERS))
    program = _dropping(case, every)
    assert len({part.graph for part in program.parts}) == 3  # prelude, block, postlude
    program = _dropping(case, every - {(1, "attn")})
    assert len({part.graph for part in program.parts}) == 4

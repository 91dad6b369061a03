"""First-order costs: derivatives of programs that lead from a kept to a dropped sync point."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spdcompile
from spdcompile import CalibrateSettings, Method, Sensitivity
from spdcompile.compiled import CompiledModel
from spdcompile.errors import RefusalError
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.blend import GATE, blend
from spdcompile.passes.drop import PointName, all_points, refusal_of
from spdcompile.plan import Router
from spdcompile.runtime.inputs import program_inputs
from tests.models import SPD_FAMILIES, tiny, token_ids
from tests.moe_reference import tiny_moe

TP = 2
TOKENS = token_ids(batch=3, length=12)
# All in float32; each adds and subtracts the same sum once.
SAME = 1e-5
# In float64, but for the logits' softmax; a small step, to cross few of the kinks of a ReLU.
STEP, DERIVATIVE = 1e-5, 1e-4


@cache
def _compiled(family: str, dtype: torch.dtype = torch.float32) -> CompiledModel:
    model = tiny(family, layers=3, hidden=32, heads=4, intermediate=48, dtype=dtype)
    return spdcompile.compile(model, tp=TP, executor="local", backend="eager")


def _points(compiled: CompiledModel) -> list[PointName]:
    program = compiled.base.program
    return [point for point in all_points(program)[:-1] if not refusal_of(program, *point)]


def _dropped(compiled: CompiledModel, point: PointName) -> Program:
    return pipeline.advance(compiled.base, pipeline.changing(frozenset({point}))).program


@torch.no_grad()
def _logits(
    compiled: CompiledModel, program: Program, gate: float | None = None, tokens: Tensor = TOKENS
) -> Tensor:
    inputs = program_inputs(program, tokens)
    if gate is not None:
        inputs[GATE] = torch.full((len(tokens),), gate)
    return compiled.executor.with_program(program).run(inputs)


def _estimated(compiled: CompiledModel, tokens: Tensor, batch_size: int = 3) -> Sensitivity:
    settings = CalibrateSettings(methods=(Method.FIRST_ORDER,), batch_size=batch_size)
    return spdcompile.calibrate(compiled, tokens, tp=TP, settings=settings, progress=False)


def _loss(logits: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("family", SPD_FAMILIES)
def test_gate_leads_from_kept_to_dropped(family: str) -> None:
    compiled = _compiled(family)
    plain = _logits(compiled, compiled.base.program)
    for point in _points(compiled):
        program = _dropped(compiled, point)
        gated, dropped = blend(program), _logits(compiled, program)
        assert float((plain - dropped).abs().max()) > 0.1, point
        torch.testing.assert_close(_logits(compiled, gated, 0.0), plain, atol=SAME, rtol=0)
        torch.testing.assert_close(_logits(compiled, gated, 1.0), dropped, atol=SAME, rtol=0)


@pytest.mark.parametrize("family", ("gpt2", "opt", "gpt_neox"))
def test_derivative_is_that_of_small_steps(family: str) -> None:
    """Central differences of the whole program's loss by the gate."""
    compiled = _compiled(family, torch.float64)
    found = _estimated(compiled, TOKENS, batch_size=2)
    scores = found.scores_by(Method.FIRST_ORDER)
    assert list(scores) == _points(compiled)
    for point, score in scores.items():
        gated = blend(_dropped(compiled, point))
        ahead, behind = (_loss(_logits(compiled, gated, gate)) for gate in (STEP, -STEP))
        expected = found.undropped.perplexity * (ahead - behind) / (2 * STEP)
        assert score == pytest.approx(expected, rel=DERIVATIVE), point
        assert abs(score) > 0.01
    assert len(set(scores.values())) == len(scores)


def test_kl_is_the_second_order_of_small_steps() -> None:
    """On 300 chunks the standard error is 8 %: a factor of 2 or a wrong sum is found out."""
    compiled, tokens, step = _compiled("llama"), token_ids(batch=300, length=8), 0.02
    found = _estimated(compiled, tokens, batch_size=60)
    plain = _logits(compiled, compiled.base.program, tokens=tokens)[:, :-1].double().log_softmax(-1)
    for point, quality in zip(found.points, found.found[Method.FIRST_ORDER], strict=True):
        near = _logits(compiled, blend(_dropped(compiled, point)), step, tokens)
        near = near[:, :-1].double().log_softmax(-1)
        kl = float((plain.exp() * (plain - near)).sum(-1).mean()) / step**2
        assert quality.kl == pytest.approx(kl, rel=0.35), point
        assert quality.agreement is None


def test_estimate_holds_in_half_precision() -> None:
    exact, half = (
        _estimated(_compiled("llama_gqa", dtype), TOKENS)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(
        exact.found[Method.FIRST_ORDER], half.found[Method.FIRST_ORDER], strict=True
    ):
        assert other.perplexity == pytest.approx(one.perplexity, rel=0.1)


def test_one_pass_costs_less_than_leaving_out_each_point() -> None:
    found = _estimated(_compiled("llama"), TOKENS)
    # The plain run; forward and twice backward: 3 blocks that lose their attention point, and two
    # runs of 2 blocks, from an MLP point to the attention point that takes its sum.
    assert found.block_evaluations == 3 + 5 * (3 + 2 * 2)
    assert math.isfinite(sum(found.scores))


def test_routers_that_read_another_value_have_no_first_order() -> None:
    model = tiny_moe("mixtral", layers=2)
    settings = CalibrateSettings(methods=(Method.FIRST_ORDER,))
    with pytest.raises(RefusalError, match="no first-order estimate"):
        spdcompile.calibrate(
            model,
            token_ids(),
            tp=TP,
            router=Router.REPLICATED.value,
            settings=settings,
            progress=False,
        )

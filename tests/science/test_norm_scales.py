"""Norm weights of each rank's own: they are another way to write the linears behind a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile.passes import pipeline
from spdcompile.plan import Router
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.norm_scales import NormScales
from spdcompile.runtime.segments import bound, run_parts, segments_of, trainable
from spdcompile.runtime.weights import checkpoint_tensors
from tests.models import tiny, token_ids

TOKENS = token_ids(batch=4, length=12)


def _dropped(family: str, tp: int) -> tuple[PreTrainedModel, LocalExecutor, LocalExecutor]:
    model = tiny(family, layers=2, hidden=32, heads=4, intermediate=48)
    base = pipeline.advance(pipeline.start(model), pipeline.preserving(tp, {}))
    points = frozenset({(0, "attn")})
    changed = pipeline.advance(base, pipeline.changing(points, Router.EXACT)).program
    plain = LocalExecutor(
        base.program,
        checkpoint_tensors(model),
        backend=Backend.EAGER,
        device=torch.device("cpu"),
    )
    return model, plain, plain.with_program(changed)


@pytest.mark.parametrize("tp", (2, 3))
@pytest.mark.parametrize("family, groups", (("llama", 2), ("opt", 2), ("gpt2", 2), ("bloom", 2)))
@torch.no_grad()
def test_folded_scales_give_the_same_values(family: str, groups: int, tp: int) -> None:
    _, plain, student = _dropped(family, tp)
    segment = segments_of(plain.program, student.program)[0]
    scales = NormScales(student.program, segment.parts)
    tensors = trainable(plain, segment.original)
    ones = scales.ones(tensors)
    assert len(ones) == groups
    generator = torch.Generator().manual_seed(0)
    drawn = {name: one + torch.rand(one.shape, generator=generator) for name, one in ones.items()}
    env = program_inputs(student.program, TOKENS)
    student.run_parts(env, student.program.parts[:1])
    scaled = run_parts(student, segment.parts, env, scales.bound({**tensors, **drawn}))
    folded = scales.folded({**tensors, **drawn})
    assert folded.keys() == tensors.keys()
    again = run_parts(student, segment.parts, env, bound(segment.parts, folded))
    plainly = run_parts(student, segment.parts, env, bound(segment.parts, tensors))
    for name, value in scaled.items():
        torch.testing.assert_close(again[name], value)
        assert not torch.allclose(plainly[name], value, rtol=1e-3)


def test_shared_heads_have_no_scales() -> None:
    """A K/V head that two ranks hold is one tensor: it cannot be scaled for each of them."""
    model = tiny("llama_gqa", layers=1, hidden=32, heads=4, intermediate=48, kv_heads=2)
    base = pipeline.advance(pipeline.start(model), pipeline.preserving(4, {}))
    (part,) = [part for part in base.program.parts if part.layer is not None]
    readers = NormScales(base.program, [part])
    tensors = checkpoint_tensors(model)
    names = {name.split("/")[0] for name in readers.ones(tensors)}
    assert names == {"layers.0"} and len(readers.ones(tensors)) == 1


def _error(model: PreTrainedModel, tensors: dict[str, Tensor]) -> float:
    compiled = spdcompile.compile(model, tp=2, spd_mask=[True, False], backend="eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = compiled.with_weights(tensors)(TOKENS).logits
    return float((found - expected).square().mean())


def test_distilling_with_norms_of_each_rank_gives_a_checkpoint() -> None:
    model, *_ = _dropped("llama", 2)
    settings = DistillSettings(steps=24, rank_local_norms=True, held_out=0.0)
    distilled = spdcompile.distill(
        model, TOKENS, tp=2, spd_mask=[True, False], settings=settings, progress=False
    )
    own = checkpoint_tensors(model)
    assert all(own[name].shape == tensor.shape for name, tensor in distilled.tensors.items())
    assert _error(model, dict(distilled.tensors)) < 0.9 * _error(model, {})

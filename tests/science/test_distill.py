"""Block-to-block distillation: it lowers the error it trains on, and gives back a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spdcompile
from spdcompile import Plan
from spdcompile.compiled import CompiledModel
from spdcompile.passes import pipeline
from spdcompile.runtime.distill_settings import DistillSettings, StudentInput
from spdcompile.runtime.distilled import Distilled
from spdcompile.runtime.weights import bind, checkpoint_tensors, unbind
from tests.compare import rel_err
from tests.models import FAMILIES, tiny, token_ids

LAYERS, TP = 3, 2
TOKENS = token_ids(batch=8, length=16)
SETTINGS = {"steps": 24, "learning_rate": 3e-3, "batch_size": 4}
MASK = (True, False, True)


@cache
def _model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@cache
def _compiled(tp: int = TP) -> CompiledModel:
    return spdcompile.compile(_model(), tp=tp, executor="local", backend="eager")


@cache
def _distilled(mask: tuple[bool, ...] = MASK, tp: int = TP, mode: str = "PROGRESSIVE") -> Distilled:
    settings = DistillSettings(student_input=StudentInput[mode], **SETTINGS)
    return spdcompile.distill(
        _compiled(tp), TOKENS, tp=tp, spd_mask=list(mask), settings=settings, progress=False
    )


def _logits(model: PreTrainedModel, mask: Iterable[bool], tp: int = TP) -> Tensor:
    compiled = spdcompile.compile(
        model, tp=tp, spd_mask=list(mask), executor="local", backend="eager"
    )
    return compiled(TOKENS).logits


def _applied(distilled: Distilled) -> PreTrainedModel:
    model = deepcopy(_model())
    distilled.apply_to(model)
    return model


@pytest.mark.parametrize("mode", StudentInput.__members__)
@pytest.mark.parametrize("tp", (2, 3))  # 3 pads heads and channels
def test_every_trained_block_comes_nearer_to_the_original(mode: str, tp: int) -> None:
    history = _distilled(tp=tp, mode=mode).history
    assert [entry.layers for entry in history] == [(0,), (2,)]
    assert all(0 < entry.after < 0.9 * entry.before for entry in history)


def test_distilled_model_is_nearer_to_the_original() -> None:
    expected = _logits(_model(), (False,) * LAYERS)
    before = (_logits(_model(), MASK) - expected).square().mean()
    after = (_logits(_applied(_distilled()), MASK) - expected).square().mean()
    assert after < 0.9 * before


def test_only_blocks_that_lose_a_point_change() -> None:
    distilled, own = _distilled(), checkpoint_tensors(_model())
    layers = ("model.layers.0.", "model.layers.2.")
    assert distilled.tensors.keys() == {name for name in own if name.startswith(layers)}
    for name, tensor in distilled.tensors.items():
        assert tensor.shape == own[name].shape and tensor.dtype == own[name].dtype
        assert not torch.equal(tensor, own[name]), name


def test_given_model_stays_as_it_is() -> None:
    before = {name: tensor.clone() for name, tensor in _model().state_dict().items()}
    _distilled.__wrapped__((True, False, False))
    assert all(torch.equal(_model().state_dict()[name], t) for name, t in before.items())
    assert all(parameter.grad is None for parameter in _model().parameters())


def test_history_tells_what_the_new_weights_give() -> None:
    """With one block dropped, the first, its error is that of its outputs on the same inputs."""
    mask = (True, False, False)
    (entry,) = _distilled(mask).history
    for model, error in ((_model(), entry.before), (_applied(_distilled(mask)), entry.after)):
        assert _first_block_error(model) == pytest.approx(error, rel=1e-4)


def _first_block_error(model: PreTrainedModel) -> float:
    outputs = []
    for weights, drop in ((_model(), False), (model, True)):
        compiled = spdcompile.compile(
            weights, tp=TP, spd_mask=[drop, False, False], executor="local", backend="eager"
        )
        executor, parts = compiled.executor, compiled.program.parts
        inputs = {
            "input_ids": TOKENS,
            "attention_mask": torch.ones_like(TOKENS),
            "position_ids": torch.arange(16).expand_as(TOKENS),
        }
        executor.run_parts(inputs, parts[:1])
        with torch.no_grad():
            (output,) = executor.call(parts[1], inputs).values()
        outputs.append(output)
    return (outputs[0] - outputs[1]).square().mean().item()


def test_result_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = _applied(_distilled())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(_logits(loaded, MASK), _logits(model, MASK))
    with torch.no_grad():
        plain = loaded(TOKENS).logits
    assert rel_err(_logits(loaded, (False,) * LAYERS), plain) < 1e-5


def test_student_input_changes_later_blocks_only() -> None:
    teacher, progressive = (_distilled(mode=mode).tensors for mode in ("TEACHER", "PROGRESSIVE"))
    differ = {name for name in teacher if not torch.equal(teacher[name], progressive[name])}
    assert differ and all(name.startswith("model.layers.2.") for name in differ)


def test_distillation_is_reproducible() -> None:
    again = _distilled.__wrapped__()
    assert again.history == _distilled().history
    assert all(torch.equal(again.tensors[n], t) for n, t in _distilled().tensors.items())


def test_nothing_dropped_changes_nothing() -> None:
    assert _distilled((False,) * LAYERS) == Distilled({}, ())


def _segments(*dropped: tuple[int, str]) -> tuple[spdcompile.Distilled, Plan]:
    plan = Plan(TP, LAYERS, dropped=frozenset(dropped))
    settings = DistillSettings(**SETTINGS)
    return spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=plan, settings=settings, progress=False
    ), plan


@pytest.mark.parametrize(
    "dropped, runs",
    (
        (((0, "mlp"),), [(0, 1)]),
        (((1, "mlp"), (0, "attn")), [(0,), (1, 2)]),
        (((0, "mlp"), (1, "mlp"), (2, "attn")), [(0, 1, 2)]),
        (((0, "mlp"), (2, "attn")), [(0, 1), (2,)]),
    ),
)
def test_blocks_between_kept_points_are_distilled_together(
    dropped: tuple[tuple[int, str], ...], runs: list[tuple[int, ...]]
) -> None:
    distilled, plan = _segments(*dropped)
    assert [entry.layers for entry in distilled.history] == runs
    assert all(0 < entry.after < 0.95 * entry.before for entry in distilled.history)
    layers = {name.split(".")[2] for name in distilled.tensors}
    assert layers == {str(layer) for run in runs for layer in run}
    expected = _logits(_model(), (False,) * LAYERS)
    errors = [
        _compiled().with_mask(plan).with_weights(tensors)(TOKENS).logits - expected
        for tensors in ({}, distilled.tensors)
    ]
    assert errors[1].square().mean() < 0.95 * errors[0].square().mean()


def test_matching_logits_brings_them_nearer() -> None:
    settings = DistillSettings(**SETTINGS, logit_steps=24)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=[False, True, False], settings=settings, progress=False
    )
    assert [(entry.layers, entry.loss) for entry in distilled.history] == [
        ((1,), "mse"),
        ((1, 2), "kl"),
    ]
    last = distilled.history[-1]
    assert 0 < last.after < 0.9 * last.before
    assert {name.split(".")[2] for name in distilled.tensors} == {"1", "2"}


def test_kl_of_the_history_is_that_of_the_new_weights() -> None:
    mask = (False, True, False)
    settings = DistillSettings(**{**SETTINGS, "held_out": 0.0}, logit_steps=8)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=list(mask), settings=settings, progress=False
    )
    wanted = _logits(_model(), (False,) * LAYERS).log_softmax(-1)
    found = _logits(_applied(distilled), mask).log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert distilled.history[-1].after == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("family", ("llama", "opt", "gpt2", "bloom"))
def test_biases_and_tied_weights_survive(family: str) -> None:
    """One step with no learning rate to speak of leaves the checkpoint as it was."""
    model = tiny(family, layers=1, hidden=32, heads=4, intermediate=48)
    settings = DistillSettings(steps=1, learning_rate=1e-12, batch_size=8)
    distilled = spdcompile.distill(
        model, TOKENS, tp=TP, spd_mask=[True], settings=settings, progress=False
    )
    own = checkpoint_tensors(model)
    assert len(distilled.tensors) >= 9
    for name, tensor in distilled.tensors.items():
        torch.testing.assert_close(tensor, own[name], atol=1e-9, rtol=0.0)


@cache
def _captured(family: str) -> tuple[PreTrainedModel, pipeline.Lowering]:
    model = tiny(family, layers=1, hidden=32, heads=8, intermediate=50, vocab=97)
    return model, pipeline.start(model)


@pytest.mark.parametrize("tp", (2, 3))
@pytest.mark.parametrize("family", FAMILIES)
def test_unbind_is_the_inverse_of_bind(family: str, tp: int) -> None:
    model, captured = _captured(family)
    program = pipeline.advance(captured, pipeline.preserving(tp, {})).program
    tensors, device = checkpoint_tensors(model), torch.device("cpu")
    returned = {}
    for part in program.parts:
        returned |= dict(unbind(part, bind(program, part, tensors, device)))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in returned.items())
    assert tensors.keys() - returned.keys() <= _tied(tensors)


def _tied(tensors: dict[str, Tensor]) -> set[str]:
    """Names of tensors that have several: a program reads them under one."""
    pointers: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        pointers.setdefault(tensor.data_ptr(), []).append(name)
    return {name for names in pointers.values() if len(names) > 1 for name in names}

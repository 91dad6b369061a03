"""Settings of distillation: resuming, the paper's preset, optimisers, where things are kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.passes.base import Part
from spdcompile.runtime import distill as distillation
from spdcompile.runtime.distill_settings import DistillSettings
from spdcompile.runtime.distilled import Distilled
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.training import Optimizer, Schedule, Trained
from spdcompile.runtime.weights import Weights
from tests.models import tiny, token_ids

LAYERS, TP = 3, 2
TOKENS = token_ids(batch=8, length=16)
SETTINGS = {"steps": 24, "learning_rate": 3e-3, "batch_size": 4}
MASK = (True, False, True)


@cache
def _model() -> PreTrainedModel:
    return tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)


@cache
def _compiled() -> CompiledModel:
    return spdcompile.compile(_model(), tp=TP, executor="local", backend="eager")


@cache
def _distilled() -> Distilled:
    return spdcompile.distill(
        _compiled(),
        TOKENS,
        tp=TP,
        spd_mask=list(MASK),
        settings=DistillSettings(**SETTINGS),
        progress=False,
    )


def test_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DistillSettings(**SETTINGS, logit_steps=4, resume=tmp_path)
    arguments = {"tp": TP, "spd_mask": list(MASK), "settings": settings, "progress": False}
    real, trained = distillation.train, []

    def train(*args: Any, **given: Any) -> Trained:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(real(*args, **given))
        return trained[-1]

    with monkeypatch.context() as patched:
        patched.setattr(distillation, "train", train)
        with pytest.raises(KeyboardInterrupt):
            spdcompile.distill(_compiled(), TOKENS, **arguments)
    assert list(tmp_path.iterdir())
    resumed = spdcompile.distill(_compiled(), TOKENS, **arguments)
    fresh = replace(settings, resume=None)
    whole = spdcompile.distill(_compiled(), TOKENS, **{**arguments, "settings": fresh})
    assert resumed.history == whole.history and len(whole.history) == 3
    assert all(torch.equal(resumed.tensors[name], x) for name, x in whole.tensors.items())
    monkeypatch.setattr(distillation, "train", None)  # nothing is left to train
    again = spdcompile.distill(_compiled(), TOKENS, **arguments)
    assert again.history == whole.history


def test_tensors_of_an_earlier_run_that_are_damaged_are_an_error(tmp_path: Path) -> None:
    settings = DistillSettings(steps=1, batch_size=8, resume=tmp_path)
    arguments = {"tp": TP, "spd_mask": list(MASK), "settings": settings, "progress": False}
    spdcompile.distill(_compiled(), TOKENS, **arguments)
    (file, *_) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=file.name):
        spdcompile.distill(_compiled(), TOKENS, **arguments)


def test_paper_settings_count_epochs() -> None:
    settings = DistillSettings.paper(batch_size=2, epochs=3.0)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=list(MASK), settings=settings, progress=False
    )
    assert [entry.steps for entry in distilled.history] == [12, 12]  # 3 passes over 8 chunks
    assert all(entry.after < entry.before for entry in distilled.history)


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("schedule", Schedule)
def test_every_optimizer_and_schedule_lowers_the_error(
    optimizer: Optimizer, schedule: Schedule
) -> None:
    settings = DistillSettings(**SETTINGS, optimizer=optimizer, schedule=schedule)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=[True, False, False], settings=settings, progress=False
    )
    assert distilled.history[0].after < 0.9 * distilled.history[0].before


def test_hidden_states_in_files_change_nothing(tmp_path: Path) -> None:
    settings = DistillSettings(**SETTINGS, memory_bytes=0, scratch=tmp_path)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=list(MASK), settings=settings, progress=False
    )
    assert distilled.history == _distilled().history
    assert not list(tmp_path.iterdir())


def test_weights_of_a_directory_are_held_a_segment_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model().save_pretrained(tmp_path)
    held: list[int] = []
    real = LocalExecutor._bind

    def bind(executor: LocalExecutor, part: Part, tensors: Weights) -> dict[str, Tensor]:
        held.append(len(executor.params._held))
        return real(executor, part, tensors)

    monkeypatch.setattr(LocalExecutor, "_bind", bind)
    settings = DistillSettings(**SETTINGS)
    distilled = spdcompile.distill(
        tmp_path, TOKENS, tp=TP, spd_mask=list(MASK), settings=settings, progress=False
    )
    assert max(held) == 1 and len(held) == LAYERS + 1  # the prelude beside the first block
    for name, tensor in _distilled().tensors.items():
        torch.testing.assert_close(distilled.tensors[name], tensor)


@pytest.mark.parametrize(
    "setting",
    ({"held_out": 1.0}, {"held_out": -0.1}, {"steps": 0}, {"epochs": 0.0}, {"logit_steps": -1}),
)
def test_settings_that_train_nothing_are_a_message(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        DistillSettings(**setting)


def test_one_batch_at_least_is_trained_on() -> None:
    settings = DistillSettings(steps=2, batch_size=8, held_out=0.9)
    distilled = spdcompile.distill(
        _compiled(), TOKENS, tp=TP, spd_mask=list(MASK), settings=settings, progress=False
    )
    assert [entry.steps for entry in distilled.history] == [2, 2]


def test_batches_in_use_are_as_many_as_the_steps_and_spaced_evenly() -> None:
    few = DistillSettings(steps=4, logit_steps=8, held_out=0.2)
    assert few.batches(40) == ([0, 9, 19, 28], [0, 4, 9, 14, 19, 23, 28, 33], range(38, 40))
    many = DistillSettings(steps=400, held_out=0.25)
    assert many.batches(8) == (list(range(6)), [], range(6, 8))
    epochs = DistillSettings(steps=None, epochs=0.1, held_out=0.0)
    assert epochs.batches(3) == ([0, 1, 2], [], range(3, 3))
    assert len(DistillSettings(steps=10_000).batches(10_000)[2]) == 16


@pytest.mark.parametrize("logit_steps", (0, 2))
def test_chunks_beyond_the_steps_do_not_matter(logit_steps: int) -> None:
    settings = DistillSettings(steps=2, logit_steps=logit_steps, batch_size=1, held_out=0.0)
    all_, those_in_use = (
        spdcompile.distill(
            _compiled(), tokens, tp=TP, spd_mask=list(MASK), settings=settings, progress=False
        ).tensors
        for tokens in (TOKENS, TOKENS[[0, len(TOKENS) // 2]])
    )
    assert all(torch.equal(all_[name], those_in_use[name]) for name in all_)
    assert all_.keys() == those_in_use.keys()

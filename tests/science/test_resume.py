"""Calibration that was killed goes on; hidden states that do not fit in memory are in files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdcompile
from spdcompile import CalibrateSettings, Method, Sensitivity
from spdcompile.compiled import CompiledModel
from spdcompile.errors import SaveError, UsageError
from spdcompile.files import write_whole
from spdcompile.runtime import record
from spdcompile.runtime.hidden import HiddenStates, hidden_states
from tests.models import tiny, token_ids

TP, LAYERS = 2, 3
TOKENS = token_ids(batch=6, length=16)
SETTINGS = CalibrateSettings(methods=tuple(Method), batch_size=2)
FRESH_BLOCKS = 3 + 11 + 10 + 5 * (3 + 2 * 2)  # as test_calibrate and test_first_order count them


@cache
def _compiled() -> CompiledModel:
    model = tiny("llama", layers=LAYERS, hidden=32, heads=4, intermediate=48)
    return spdcompile.compile(model, tp=TP, executor="local", backend="eager")


def _calibrated(settings: CalibrateSettings = SETTINGS, tokens: Tensor = TOKENS) -> Sensitivity:
    return spdcompile.calibrate(_compiled(), tokens, tp=TP, settings=settings, progress=False)


@cache
def _fresh() -> Sensitivity:
    return _calibrated()


def _same_results(one: Sensitivity, other: Sensitivity) -> bool:
    return (one.points, one.undropped, one.found) == (other.points, other.undropped, other.found)


@pytest.mark.parametrize("after", [2, 5, 10])
def test_killed_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    settings, written = replace(SETTINGS, resume=tmp_path / "results"), []

    def killing(path: Path, content: str) -> None:
        write_whole(path, content)
        written.append(path)
        if len(written) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_whole", killing)
        with pytest.raises(KeyboardInterrupt):
            _calibrated(settings)
    resumed = _calibrated(settings)
    assert _same_results(resumed, _fresh())
    assert 0 < resumed.block_evaluations < _fresh().block_evaluations == FRESH_BLOCKS
    again = _calibrated(settings)
    assert _same_results(again, _fresh()) and again.block_evaluations == 0


def test_other_tokens_weights_or_settings_share_no_results(tmp_path: Path) -> None:
    settings = CalibrateSettings(resume=tmp_path, batch_size=2)
    _calibrated(settings)
    _calibrated(settings, TOKENS.flip(0))
    _calibrated(replace(settings, batch_size=3))
    name = "model.layers.0.mlp.up_proj.weight"
    changed = _compiled().with_weights({name: _compiled().model.state_dict()[name] * 1.01})
    other = spdcompile.calibrate(changed, TOKENS, tp=TP, settings=settings, progress=False)
    assert len(list(tmp_path.iterdir())) == 4
    assert other.undropped != _fresh().undropped


def test_damaged_results_are_an_error(tmp_path: Path) -> None:
    settings = CalibrateSettings(resume=tmp_path)
    _calibrated(settings)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(UsageError, match=r"earlier run cannot be read[\s\S]*remove the file"):
        _calibrated(settings)


@pytest.mark.parametrize("budget", [0, 20_000])
def test_hidden_states_in_files_give_the_same_results(tmp_path: Path, budget: int) -> None:
    settings = replace(SETTINGS, memory_bytes=budget, scratch=tmp_path)
    assert _same_results(_calibrated(settings), _fresh())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_beyond_the_budget_are_mapped(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {name: (torch.randn(3, 5) * 9).to(dtype) for name in "ab"}
    values["c"] = values["a"].t()  # not contiguous
    values["none"] = torch.empty(0, 4, dtype=dtype)
    states = HiddenStates(tmp_path, values["a"].nbytes)
    kept = states.keep(values)
    assert list(tmp_path.iterdir()) == [], "a file that has no name goes with the process"
    assert all(torch.equal(kept[name], value) for name, value in values.items())
    assert (states.memory_bytes, states.file_bytes) == (15 * dtype.itemsize, 30 * dtype.itemsize)
    assert _mapped_files(tmp_path) == 2
    del kept
    assert _mapped_files(tmp_path) == 0


def _mapped_files(directory: Path) -> int:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(str(directory) in line for line in maps)


def test_private_directory_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hidden_states(tmp_path, 0) as states:
        states.keep({"a": torch.ones(3)})
        (private,) = tmp_path.iterdir()
        assert private.stat().st_mode & 0o077 == 0
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="scratch directory"):
        _calibrated(replace(SETTINGS, scratch=tmp_path / "nowhere"))
    with pytest.raises(SaveError, match=r"hidden states cannot be written[\s\S]*120 bytes more"):
        HiddenStates(tmp_path / "nowhere", 0).keep({"a": torch.ones(30)})

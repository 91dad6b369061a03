"""Text that the model writes itself: drawn as the model gives it, and reproducible."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdcompile import Budget, sampled_chunks
from spdcompile.errors import UsageError
from tests.models import tiny
from tests.science.tuned_model import SETTINGS, model, tokens, tuned


def _sampled(count: int, **settings: int) -> Tensor:
    return sampled_chunks(model(), tokens(), count=count, progress=False, **settings)


def test_chunks_are_as_long_as_the_texts_and_begin_in_it() -> None:
    found = _sampled(5, batch_size=2)
    assert found.shape == (5, tokens().shape[1]) and found.dtype == torch.int64
    windows = {tuple(window) for window in tokens().flatten().unfold(0, 8, 1).tolist()}
    assert all(tuple(chunk[:8].tolist()) in windows for chunk in found)


def test_seed_decides_and_torchs_own_state_stays() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = _sampled(4), _sampled(4), _sampled(4, seed=1)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_next_tokens_come_with_the_models_probabilities() -> None:
    text = tokens()[:1, :9]  # two beginnings of eight tokens
    drawn = sampled_chunks(model(), text, count=4000, batch_size=4000, progress=False)
    for place in (0, 1):
        start = text[0, place : place + 8]
        after = drawn[(drawn[:, :8] == start).all(1), 8]
        chances = model()(start[None]).logits[0, -1].softmax(-1)
        found = torch.bincount(after, minlength=len(chances)) / len(after)
        # Of n draws from k outcomes the distance is about sqrt(k / n) / 3.
        assert float((found - chances).abs().sum()) / 2 < 1.5 * (len(chances) / len(after)) ** 0.5


def test_models_own_generation_settings_do_not_narrow_it() -> None:
    narrowed = copy.deepcopy(model())
    own = narrowed.generation_config
    own.do_sample, own.top_k, own.temperature, own.repetition_penalty = True, 1, 0.1, 5.0
    own.eos_token_id = list(range(narrowed.config.vocab_size // 2))
    found = sampled_chunks(narrowed, tokens(), count=6, progress=False)
    plain = copy.deepcopy(model())
    plain.generation_config.eos_token_id = own.eos_token_id  # these are not drawn
    assert torch.equal(found, sampled_chunks(plain, tokens(), count=6, progress=False))
    assert len(found[:, 8:].unique()) > 10


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(UsageError, match="No text"):
        _sampled(0)
    with pytest.raises(UsageError, match="more than 8 tokens"):
        sampled_chunks(model(), tokens()[:, :8], count=1)
    with pytest.raises(UsageError, match="vocabulary"):
        sampled_chunks(tiny("llama", layers=1, vocab=4), tokens(), count=1)


def test_directory_is_read_in_float32(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    assert torch.equal(sampled_chunks(tmp_path, tokens(), count=2, progress=False), _sampled(2))


def test_tuning_trains_on_it_and_judges_on_the_text() -> None:
    budget = Budget(min_saved=0.5)
    with_it = replace(SETTINGS, sampled=12)
    plain, found = tuned(budget), tuned(budget, with_it)
    assert found.undropped == plain.undropped and found.zero_shot == plain.zero_shot
    assert found.recovered != plain.recovered

"""Tasks of lm-evaluation-harness on the bundled model, beside the harness' own class for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import spdcompile
from spdcompile.errors import UsageError
from tests.zoo.models import build

pytest.importorskip("lm_eval", reason="lm_eval is not installed here: make test-harness")

from spdcompile.harness import reference_lm
from spdcompile.tasks import Scores, load_tasks, run_tasks

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "models" / "tiny-llama"
TASKS = EXAMPLES / "tasks"
SHORT = 48  # tokens: fewer than many of the requests have
BOUND = 1e-4  # of a log-likelihood of about 100, in float32


@cache
def _model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def _compiled() -> spdcompile.CompiledModel:
    return spdcompile.compile(_model(), tp=2, backend="eager", executor="local")


@cache
def _tasks() -> list[Any]:
    return load_tasks([str(TASKS)], progress=False)


def _scores(lm: Any) -> Scores:
    return run_tasks(lm, _tasks(), limit=5, progress=False)


@cache
def _expected() -> Scores:
    return _scores(reference_lm(_model(), _tokenizer(), progress=False))


def _assert_equal(found: Scores, expected: Scores) -> None:
    """Metrics of choices and texts are equal, log-likelihoods to the bound."""
    for own, other in zip(found.scores, expected.scores, strict=True):
        assert (own.task, own.metric, own.documents) == (other.task, other.metric, other.documents)
        exact = own.metric.startswith(("acc", "exact_match"))
        assert own.value == (other.value if exact else pytest.approx(other.value, rel=1e-6))
    for task, rows in expected.samples.items():
        for own, other in zip(found.samples[task], rows, strict=True):
            assert own["document"] == other["document"]
            _assert_answers_equal(own["answers"], other["answers"])


def _assert_answers_equal(own: list[Any], other: list[Any]) -> None:
    for mine, theirs in zip(own, other, strict=True):
        if isinstance(theirs, tuple):
            assert mine == (pytest.approx(theirs[0], abs=BOUND), theirs[1])
        elif isinstance(theirs, float):
            assert mine == pytest.approx(theirs, rel=1e-6)
        else:
            assert mine == theirs


def test_scores_are_those_of_the_harness_own_class() -> None:
    found = _scores(spdcompile.HarnessLM(_compiled(), _tokenizer(), progress=False))
    _assert_equal(found, _expected())
    assert {score.task for score in found.scores} == {
        "heldout_choice",
        "heldout_completion",
        "heldout_rolling",
    }
    values = {score.metric: score.value for score in found.scores}
    assert 0 < values["acc_norm"] < 1 < values["byte_perplexity"] < 4


def test_dropped_sync_points_change_the_scores() -> None:
    dropped = _compiled().with_mask([True] * 8)
    found = _scores(spdcompile.HarnessLM(dropped, _tokenizer(), progress=False))
    metrics = [score.metric for score in found.scores]
    place = metrics.index("bits_per_byte")
    assert found.scores[place].value > 1.05 * _expected().scores[place].value
    with pytest.raises(AssertionError):
        _assert_equal(found, _expected())


def test_requests_that_are_too_long_are_cut_from_the_left() -> None:
    lm = spdcompile.HarnessLM(_compiled(), _tokenizer(), max_length=SHORT, progress=False)
    other = reference_lm(_model(), _tokenizer(), progress=False)
    other._max_length = SHORT
    found = _scores(lm)
    _assert_equal(found, _scores(other))
    assert lm.num_cut > 0
    with pytest.raises(AssertionError):
        _assert_equal(found, _expected())


def test_model_without_a_cache_generates_the_same() -> None:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefgh"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    model = build("falcon_mamba")
    compiled = spdcompile.compile(model, tp=2, backend="eager", executor="local")
    assert compiled.cache_refusal
    settings = {"until": ["b"], "max_gen_toks": 6}
    requests = [SimpleNamespace(args=(text, settings)) for text in ("a b c d", "h g")]
    lm = spdcompile.HarnessLM(compiled, tokenizer, progress=False)
    found = lm.generate_until(requests, disable_tqdm=True)
    other = reference_lm(model, tokenizer, progress=False)
    assert found == other.generate_until(requests, disable_tqdm=True)
    assert any(found), "no text compares nothing"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "There is no task 'no_such_task'"),
        ("nowhere/task.yaml", "There are no tasks at this path"),
        (str(EXAMPLES / "configs"), "a directory without"),
    ],
)
def test_task_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_tasks([name], progress=False)
    assert message in str(caught.value)


def test_task_whose_data_are_missing_is_refused(tmp_path: Path) -> None:
    text = (TASKS / "rolling.yaml").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="The task cannot be loaded") as caught:
        load_tasks([str(tmp_path / "task.yaml")], progress=False)
    assert "rolling.jsonl" in str(caught.value)


def test_request_without_room_is_refused() -> None:
    lm = spdcompile.HarnessLM(_compiled(), _tokenizer(), max_length=SHORT, progress=False)
    with pytest.raises(UsageError, match="There is no room for a prompt"):
        lm.generate_until([SimpleNamespace(args=("a", {"until": ["."], "max_gen_toks": SHORT}))])
    with pytest.raises(UsageError, match="A continuation cannot be scored"):
        lm.loglikelihood([SimpleNamespace(args=("a", " word" * (SHORT + 1)))], disable_tqdm=True)

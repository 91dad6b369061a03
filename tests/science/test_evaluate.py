"""`evaluate` against figures that are computed here, from the logits of the unsharded model."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spdcompile
from examples.tasks import make_tasks
from spdcompile.errors import UsageError
from tests.models import tiny

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXT = MODEL / "heldout.txt"
MASK = [False, True, True, False, True, False, False, True]
F32_BOUND = 1e-5  # of the loss, which is a mean over positions: far below a float32 logit's own


@cache
def _model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@cache
def _compiled() -> spdcompile.CompiledModel:
    return spdcompile.compile(_model(), tp=4, backend="eager", executor="local")


@cache
def _tokens() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return spdcompile.evaluation_tokens(TEXT, tokenizer, length=48, count=5)


def _probabilities(logits: Tensor) -> Tensor:
    """In float64, of the positions that have a next token."""
    return logits[:, :-1].double().softmax(-1)


def test_program_that_drops_nothing_is_the_unsharded_model() -> None:
    found = spdcompile.evaluate(
        _compiled(), _tokens(), reference=MODEL, batch_size=2, progress=False
    )
    with torch.no_grad():
        likely = _probabilities(_model()(_tokens()).logits)
    targets = _tokens()[:, 1:, None]
    loss = -likely.gather(2, targets).log().mean()
    assert math.log(found.quality.perplexity) == pytest.approx(float(loss), rel=F32_BOUND)
    assert found.reference_perplexity == pytest.approx(found.quality.perplexity, rel=F32_BOUND)
    assert found.quality.kl == pytest.approx(0, abs=1e-8)
    assert found.quality.agreement == 1
    assert (found.chunks, found.length) == (5, 48)
    assert found.reference == f"{MODEL}, unsharded, run by transformers"


def test_kl_and_agreement_are_those_of_the_two_distributions() -> None:
    dropped = _compiled().with_mask(MASK)
    found = spdcompile.evaluate(dropped, _tokens(), reference=_model(), progress=False)
    own = _probabilities(dropped(_tokens()).logits)
    with torch.no_grad():
        likely = _probabilities(_model()(_tokens()).logits)
    kl = (likely * (likely.log() - own.log())).sum(-1).mean()
    equal = (own.argmax(-1) == likely.argmax(-1)).double().mean()
    assert found.quality.kl == pytest.approx(float(kl), rel=1e-4) and float(kl) > 0.01
    assert found.quality.agreement == float(equal) < 1
    assert found.quality.perplexity > found.reference_perplexity


def test_undropped_program_serves_as_reference() -> None:
    dropped = _compiled().with_mask(MASK)
    tokens = _tokens()[:2]
    expected = spdcompile.evaluate(dropped, tokens, reference=_model(), progress=False)
    for reference in ("program", _compiled()):
        found = spdcompile.evaluate(dropped, tokens, reference=reference, progress=False)
        assert found.quality.kl == pytest.approx(expected.quality.kl, rel=1e-4)
        assert found.quality.agreement == expected.quality.agreement
        assert found.reference_perplexity == pytest.approx(expected.reference_perplexity)
        assert found.reference != expected.reference


def test_batches_do_not_change_what_is_found() -> None:
    dropped = _compiled().with_mask(MASK)
    alone, together = (
        spdcompile.evaluate(dropped, _tokens(), batch_size=size, progress=False) for size in (1, 5)
    )
    assert alone.quality.perplexity == pytest.approx(together.quality.perplexity, rel=F32_BOUND)
    assert alone.quality.kl is None and alone.reference is None
    assert alone.to_dict().keys() == together.to_dict().keys()


def test_all_of_a_text_is_cut_into_contiguous_chunks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    found = spdcompile.evaluation_tokens(TEXT, tokenizer, max_length=1024)
    assert found.shape == (len(ids) // 1024, 1024)
    assert found.flatten().tolist() == ids[: found.numel()]
    assert spdcompile.evaluation_tokens(TEXT, tokenizer).shape[1] == 2048  # the protocol's own


def test_reference_with_another_vocabulary_is_refused() -> None:
    other = tiny("llama", layers=1)
    with pytest.raises(UsageError, match="another vocabulary"):
        spdcompile.evaluate(_compiled(), _tokens()[:, :8] % 8, reference=other, progress=False)


def test_data_of_the_example_tasks_are_what_the_script_writes(tmp_path: Path) -> None:
    make_tasks.main(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["choice.jsonl", "completion.jsonl", "rolling.jsonl"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (make_tasks.FOLDER / name).read_bytes()

"""Token embeddings split over the vocabulary: the same logits, and one more sync point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spdcompile
from spdcompile.errors import UsageError
from spdcompile.loading import capture_loaded, load_model
from spdcompile.passes import pipeline, vocabulary
from spdcompile.passes.vocabulary import POINT, SplitVocabulary, Vocabulary
from spdcompile.runtime.weights import bind, read_shared
from tests.compare import rel_err
from tests.models import left_padded, tiny, token_ids
from tests.runtime.checkpoints import counted, saved

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 48, "vocab": 97}
F32_BOUND = 1e-5


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "opt", "bloom"])
def test_split_table_gives_the_models_logits(family: str, tp: int) -> None:
    model = tiny(family, **SIZES)
    compiled = spdcompile.compile(model, tp=tp, vocab="split", backend="eager")
    ids, mask = left_padded(token_ids(batch=2, length=9, vocab=97))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    assert rel_err(compiled(ids, mask).logits, expected, real=mask) < F32_BOUND
    prelude = compiled.program.parts[0]
    assert [point.name for point in compiled.program.graph_of(prelude).sync_points] == [POINT]
    table = next(name for name, ref in prelude.params.items() if ref.shape == (97, 32))
    assert prelude.shards[table].local_size == -(-97 // tp)


def test_split_table_is_reported_and_cannot_be_dropped() -> None:
    model = tiny("llama", **SIZES)
    whole, split = (
        spdcompile.compile(model, tp=2, vocab=vocab, backend="eager")
        for vocab in ("whole", "split")
    )
    text = str(split.report)
    assert "prelude   embed    cannot be dropped  each rank looks up the tokens" in text
    assert "model.embed_tokens.weight" in str(whole.report) and "embed_tokens" not in text
    counts = [
        str(compiled.report).split("all-reduces, after the drop")[1].split()[0]
        for compiled in (whole, split)
    ]
    assert counts == ["4", "5"]


def test_split_table_serves_masks_caches_and_generation() -> None:
    model, ids = tiny("llama", **SIZES), token_ids(vocab=97)
    whole, split = (
        spdcompile.compile(model, tp=2, spd_mask=[True, False], vocab=vocab, backend="eager")
        for vocab in ("whole", "split")
    )
    assert rel_err(split(ids).logits, whole(ids).logits) < F32_BOUND
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(split.generate(ids, **settings), whole.generate(ids, **settings))


def test_inductor_takes_two_lengths_of_a_split_table() -> None:
    model = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48, vocab=97)
    compiled = spdcompile.compile(model, tp=2, vocab="split")
    for length in (9, 5):
        ids = token_ids(length=length, vocab=97)
        with torch.no_grad():
            assert rel_err(compiled(ids).logits, model(ids).logits) < F32_BOUND


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # tied and not
def test_rank_reads_its_rows_alone_and_a_tied_table_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(saved(tiny(family, **SIZES), tmp_path), None)
    loaded, captured = capture_loaded(loaded)
    program = pipeline.advance(captured, pipeline.preserving(2, {}, Vocabulary.SPLIT)).program
    with counted(monkeypatch) as reads:
        here = read_shared(program, loaded.tensors)
        parts = program.parts
        bound = [bind(program, part, here, torch.device("cpu"), 1) for part in parts]
    assert reads.twice == 0
    rows = [t for tensors in bound for t in tensors.values() if t.shape == (49, 32)]
    assert len(rows) == 2 and all(not row[48].any() for row in rows)
    assert (rows[0].data_ptr() == rows[1].data_ptr()) == (family == "gpt2")


def test_size_decides_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", **SIZES)
    base = pipeline.advance(pipeline.start(model), pipeline.preserving(2, {}, Vocabulary.WHOLE))
    by_size, size = SplitVocabulary(Vocabulary.BY_SIZE), 97 * 32 * 4
    for least, splits in ((size, 1), (size + 1, 0)):
        monkeypatch.setattr(vocabulary, "_LARGE", least)
        assert by_size(base.program).rewrites == splits
    assert SplitVocabulary(Vocabulary.SPLIT)(replace(base.program, tp=1)).rewrites == 0


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="There is no vocab 'half'"):
        spdcompile.compile(tiny("llama", **SIZES), tp=2, vocab="half")

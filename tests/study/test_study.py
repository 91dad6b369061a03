"""The study runs in its quick form: what it is made of and that its sums are right, no figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.study.__main__ import ORDER
from examples.study.context import Context
from examples.study.correlation import chance, spearman
from examples.study.document import page, shown
from examples.study.measuring import context_of, measure, measured, saved
from examples.study.naive import naive
from examples.study.plans import beyond, one_sync_per
from examples.study.section import Kind, Panel, Result, Series
from examples.study.sections import SECTIONS
from examples.study.sizes import FULL, QUICK, QUICK_LAYERS
from spdcompile.runtime.data import perplexity

LAST = QUICK_LAYERS - 1


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_of(QUICK, tmp_path_factory.mktemp("study"))


def result_of(name: str, context: Context) -> Result:
    """What a section measures in the quick form, once."""
    if not measured(name, QUICK, context.work):
        measure(name, QUICK, context.work, context)
    return next(
        result for result in saved(context.work, context.work / "none") if result.name == name
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_section_has_question_table_figure_and_findings(name: str, context: Context) -> None:
    result = result_of(name, context)
    section = shown(result)
    assert result.sizes == QUICK
    assert section.question.endswith("?")
    assert section.findings
    assert section.tables
    assert all(len(row) == len(table.headers) for table in section.tables for row in table.rows)
    assert section.panels
    assert all(len(series.x) == len(series.y) for p in section.panels for series in p.series)
    text = page([result], "study")
    assert f"\n## {section.title}\n" in text
    assert f"](study/{name}.png)" in text
    assert all(finding in text for finding in section.findings)


def test_section_is_done_for_its_own_sizes_only(context: Context) -> None:
    """A run that was killed goes on with the sections that are missing."""
    result_of("decode", context)
    assert measured("decode", QUICK, context.work)
    assert not measured("decode", FULL, context.work)
    assert not measured("decode", QUICK, context.work / "none")


def test_order_of_jobs_has_every_section() -> None:
    assert sorted(ORDER) == sorted(SECTIONS)


def test_decode_agrees_with_prefill(context: Context) -> None:
    rows = result_of("decode", context).numbers["rows"]
    nothing = next(row for row in rows if row["dropped"] == "nothing")
    assert (nothing["prefix"], nothing["tokens"]) == (QUICK.new_tokens, 1.0)
    for row in rows:
        assert row["cached"] == pytest.approx(row["prefill"], rel=1e-4)
        assert row["difference"] < 1e-4


def test_scores_agree_with_perplexity(context: Context) -> None:
    (tp,) = QUICK.tps
    dropped = context.dropped(context.compiled(tp), context.all_attention())
    score = context.score(dropped)
    undropped = context.heldout.perplexity
    assert score.perplexity == pytest.approx(
        perplexity(dropped.executor, context.heldout.tokens), rel=1e-4
    )
    assert score.increase == pytest.approx(100 * (score.perplexity / undropped - 1))
    assert score.kl > 0
    kept = context.score(context.compiled(tp))
    assert (kept.increase, kept.kl) == (pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-5))
    assert kept.agreement == 1


def test_naive_run_without_drops_is_the_model(context: Context) -> None:
    tokens = context.heldout.tokens
    with torch.no_grad():
        expected = context.model(tokens).logits
    logits = naive(context.model, 4, ())(tokens)
    torch.testing.assert_close(logits, expected.expand_as(logits), rtol=1e-4, atol=1e-4)
    parted = naive(context.model, 4, [(LAST, "attn")])(tokens)
    assert not torch.allclose(parted[0], parted[1], atol=1e-2)


def test_naive_drop_in_the_last_block_loses_what_spd_carries_on(context: Context) -> None:
    """The ranks' own shares of the attention's output sum to what SPD sums at the MLP's point."""
    (tp,) = QUICK.tps
    points = [(LAST, "attn")]
    spd = context.zero_shot(context.compiled(tp), points)
    assert spd.kl < context.heldout.score(naive(context.model, tp, points)).kl


def test_plans_keep_the_last_point() -> None:
    sizes = {name: len(points) for name, points in beyond(8).items()}
    assert sizes["every MLP but the last"] == 7
    assert sizes["inner attention, every second MLP"] == 9
    assert sizes["one sync per 4 sub-layers"] == 12
    assert sizes["only the last one kept"] == 15
    assert all((7, "mlp") not in points for points in beyond(8).values())
    kept = {(layer, name) for layer in range(8) for name in ("attn", "mlp")} - one_sync_per(4, 8)
    assert kept == {(1, "mlp"), (3, "mlp"), (5, "mlp"), (7, "mlp")}


def test_spearman_ranks_and_shares_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    # Of the 24 orders of 4 values, 2 correlate as strongly as the perfect one.
    assert chance([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24, abs=0.01)
    assert chance([1, 1, 1], [1, 2, 3]) == 1


@pytest.mark.parametrize("kind", Kind)
def test_figure_is_drawn_and_small(kind: Kind, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from examples.study.figures import draw

    names = ["one", "two"] if kind is Kind.BARS else [1, 2]
    series = [Series("first", names, [1.0, 2.0]), Series("second", names, [2.0, -1.0])]
    draw([Panel("title", "x", "y", series, kind, log=True)] * 2, tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 150_000

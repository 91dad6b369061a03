"""The report of a program after the drop still knows what there was before it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest

from spdcompile.passes import pipeline
from spdcompile.passes.base import Refusal
from spdcompile.passes.pipeline import Lowering
from spdcompile.report import PointReport, PointState, Report, build_report, diff_blocks
from spdcompile.report.blocks import within_block
from tests.models import tiny

LAYERS, TP = 3, 4


@cache
def undropped(family: str) -> Lowering:
    heads = 4 if family == "gpt_neox" else 8  # four head groups in each of the families
    lowering = pipeline.start(tiny(family, layers=LAYERS, heads=heads))
    return pipeline.advance(lowering, pipeline.preserving(TP, {0: ((3,), (0,), (2,), (1,))}))


def points_of(report: Report) -> dict[tuple[int, str], PointReport]:
    return {
        (layer, point.name): point
        for block in report.blocks
        for layer in block.layers
        for point in block.sync_points
    }


@pytest.mark.parametrize(
    ("family", "points"),
    [
        ("qwen3", {(0, "attn")}),
        ("qwen3", {(0, "attn"), (0, "mlp"), (1, "attn")}),
        ("phi3", {(1, "mlp")}),
        ("gpt_neox", {(0, "mlp")}),  # with the attention's partial sum merged into it
        ("phi3", set()),
    ],
)
def test_drop_changes_only_states_in_the_report(family: str, points: set[tuple[int, str]]) -> None:
    lowering = undropped(family)
    before = build_report(lowering)
    dropped = pipeline.advance(lowering, pipeline.changing(frozenset(points)))
    after = build_report(dropped)
    expected = points_of(before)
    for point in points:
        expected[point] = replace(expected[point], state=PointState.DROPPED)
    assert points_of(after) == expected
    assert after.parameters == before.parameters
    freed = sum(64 * 4 for _ in points)
    assert after.collectives == replace(
        before.collectives,
        all_reduces=before.collectives.all_reduces - len(points),
        bytes_per_token=before.collectives.bytes_per_token - freed,
    )
    assert bool(diff_blocks(lowering.program, dropped.program)) is bool(points)


def test_head_groups_are_shown_as_given() -> None:
    report = build_report(undropped("qwen3"))
    blocks = [block for block in report.blocks if block.layers]
    assert [block.layers for block in blocks] == [(0,), (1,), (2,)]
    assert blocks[0].regions[0].units == ("3", "0", "2", "1")
    assert "3 | 0 | 2 | 1" in str(report)


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal("head", "no", graph="postlude"), ("head", "postlude", ())),
        (Refusal("mlp", "no", "mul", "block"), ("mlp", "layers 0-2", (0, 1, 2))),
        (
            Refusal("model.layers.0.mlp.up_proj", "no", "x", "block"),
            ("mlp.up_proj", "layers 0-2", (0, 1, 2)),
        ),
        (Refusal("attention as one operator", "no"), ("attention as one operator", "model", ())),
    ],
)
def test_refusals_say_where_they_hold(refusal: Refusal, expected: tuple[object, ...]) -> None:
    lowering = undropped("qwen3")
    record = replace(lowering.records[-1], refusals=(refusal, refusal))
    dropped = pipeline.advance(lowering, pipeline.changing(frozenset({(1, "attn")})))
    (found,) = build_report(replace(dropped, records=(*lowering.records, record))).refusals
    assert (found.subject, found.where, found.layers) == expected


def test_refusals_are_relative_to_the_block() -> None:
    text = "model.layers.0.mlp.gate of model.layers.12, model.layers.1.x; my.model.layers"
    assert within_block(text, "model.layers") == "mlp.gate of the block, x; my.model.layers"


def test_report_survives_json() -> None:
    data = build_report(undropped("qwen3")).to_dict()
    assert json.loads(json.dumps(data)) == data


def test_report_needs_sync_points() -> None:
    lowering = undropped("qwen3")
    with pytest.raises(AssertionError, match="needs a program with sync points"):
        build_report(Lowering(lowering.program, lowering.records[:3]))

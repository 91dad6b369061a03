"""Layers and sync points as the command line names them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdcompile.cli.ranges import parse_layers, parse_points
from spdcompile.errors import UsageError
from spdcompile.report.spans import name_layers, spans

LAYERS = st.sets(st.integers(0, 40))


@given(LAYERS)
def test_parse_layers_reads_what_spans_writes(layers: set[int]) -> None:
    assert parse_layers(spans(layers) or "none", 41) == layers


@given(LAYERS)
def test_spans_is_short_and_ascending(layers: set[int]) -> None:
    items = [tuple(map(int, item.split("-"))) for item in spans(layers).split(",") if item]
    # A gap of at least one number lies between two ranges, or they would be one.
    assert all(before[-1] + 1 < after[0] for before, after in pairwise(items))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_parse_layers_unites_ranges(bounds: list[tuple[int, int]]) -> None:
    ranges = [(min(pair), max(pair)) for pair in bounds]
    text = ", ".join(f"{first}-{last}" for first, last in ranges)
    expected = {layer for first, last in ranges for layer in range(first, last + 1)}
    assert parse_layers(text, 10) == expected


@given(st.text(alphabet="0123456789-,. alnox", max_size=8))
def test_parse_layers_fails_only_with_usage_error(text: str) -> None:
    try:
        layers = parse_layers(text, 5)
    except UsageError as error:
        assert text in str(error)
    else:
        assert layers <= set(range(5))


@given(st.sets(st.tuples(st.integers(0, 9), st.sampled_from(["attn", "mlp", "attn_2"]))))
def test_parse_points_reads_single_points(points: set[tuple[int, str]]) -> None:
    text = ",".join(f"{layer}.{name}" for layer, name in points)
    assert parse_points(text or "none", 10) == points


def test_parse_layers_knows_all_and_none() -> None:
    assert parse_layers("all", 3) == {0, 1, 2}
    assert parse_layers("none", 3) == frozenset()


def test_parse_points_expands_ranges() -> None:
    assert parse_points("3.mlp, 4-5.attn", 8) == {(3, "mlp"), (4, "attn"), (5, "attn")}
    assert parse_points("all.attn", 2) == {(0, "attn"), (1, "attn")}


def test_name_layers_has_a_singular() -> None:
    assert [name_layers([3]), name_layers([0, 1, 5])] == ["layer 3", "layers 0-1,5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2-1", "runs backwards"),
        ("0-4", "no layer 4"),
        ("1,,2", "'' names no layers"),
        ("1.attn", "'1.attn' names no layers"),
        ("-1", "'-1' names no layers"),
        ("٣", "names no layers"),
    ],
)
def test_parse_layers_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_layers(text, 4)
    assert f"--spd-mask {text}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("3", "sync points such as"), ("0-9.mlp", "no layer 9"), ("x.mlp", "'x' names no layers")],
)
def test_parse_points_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_points(text, 4)
    assert f"--drop {text}" in str(caught.value)

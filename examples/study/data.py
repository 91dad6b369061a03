"""Does sensitivity change with the calibration data?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from examples.study.context import ATTENTION, Context
from examples.study.correlation import spearman
from examples.study.section import Kind, Panel, Series, Shown, Table
from examples.study.sizes import Sizes
from examples.study.texts import CALIBRATION, texts_of
from spdcompile import Method

Costs = dict[str, float]
"""Sync point, such as "3.attn" -> what dropping it costs."""

_METHOD = (
    "Scores of all sync points that can be dropped, by themselves (KL divergence to the undropped "
    "model) and cumulatively (the paper's), on {scoring} chunks of {length} tokens of each text: "
    "the calibration text (the Bible and three software manuals, what the model was trained on), "
    "source code of Python's standard library, Python's own manual (pydoc topics), and what the "
    "model itself writes when sampled. Spearman's rank correlation over the points."
)


def measure(context: Context) -> dict[str, Any]:
    """Scores of every sync point on texts of four kinds."""
    texts = texts_of(context)
    scores: dict[str, Any] = {}
    for tp in context.sizes.tps:
        print(f"   tp {tp}", flush=True)
        found = {kind: context.sensitivity_on(text, tp) for kind, text in texts.items()}
        scores[str(tp)] = {kind: sensitivity.to_dict() for kind, sensitivity in found.items()}
    return {"scores": scores}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """How scores on two texts correlate, and the two ways of scoring on one."""
    found = {tp: numbers["scores"][str(tp)] for tp in sizes.tps}
    pairs = [row for tp, by_text in found.items() for row in _pairs(tp, by_text)]
    methods = [row for tp, by_text in found.items() for row in _methods(tp, by_text)]
    main = {kind: _alone(scores) for kind, scores in found[sizes.main_tp].items()}
    tops = {
        max(costs, key=costs.__getitem__)
        for by_text in found.values()
        for costs in map(_alone, by_text.values())
    }
    return Shown(
        title="Sensitivity and the data",
        question="Does it matter on which text the sensitivity of sync points is measured?",
        method=_METHOD.format(scoring=sizes.scoring, length=sizes.length),
        findings=_findings(pairs, methods, sorted(tops)),
        tables=[_pair_table(pairs), _method_table(methods), _top_table(main, sizes.main_tp)],
        panels=[_panel(main, sizes.main_tp)],
    )


def _alone(scores: Mapping[str, Any]) -> Costs:
    """The KL divergence that each point costs by itself."""
    return {row["point"]: row[Method.ALONE.value]["kl"] for row in scores["points"]}


def _cumulative(scores: Mapping[str, Any]) -> Costs:
    """The paper's scores."""
    return {row["point"]: row[Method.CUMULATIVE.value]["score"] for row in scores["points"]}


def _correlate(one: Costs, other: Costs, kind: str | None = None) -> float:
    points = [point for point in one if kind is None or point.endswith(kind)]
    return spearman([one[point] for point in points], [other[point] for point in points])


def _pairs(tp: int, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every two texts: how their scores correlate, and which points they would drop."""
    rows = []
    for one, other in combinations(found, 2):
        alone = _alone(found[one]), _alone(found[other])
        cumulative = _cumulative(found[one]), _cumulative(found[other])
        half = len(alone[0]) // 2
        chosen = [set(sorted(costs, key=costs.__getitem__)[:half]) for costs in alone]
        rows.append(
            {
                "tp": tp,
                "one": one,
                "other": other,
                "alone": _correlate(*alone),
                "alone_attention": _correlate(*alone, ATTENTION),
                "cumulative": _correlate(*cumulative),
                "cumulative_attention": _correlate(*cumulative, ATTENTION),
                "half_shared": len(chosen[0] & chosen[1]) / half,
            }
        )
    return rows


def _methods(tp: int, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """On each text: do the two ways of scoring agree?"""
    rows = []
    for kind, scores in found.items():
        alone, cumulative = _alone(scores), _cumulative(scores)
        rows.append(
            {
                "tp": tp,
                "text": kind,
                "perplexity": scores["undropped"]["perplexity"],
                "all": _correlate(alone, cumulative),
                "attention": _correlate(alone, cumulative, ATTENTION),
            }
        )
    return rows


def _pair_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    headers = ["tp", "texts", "alone: all points", "attention", "cumulative: all points"]
    headers += ["attention", "of the better half, shared"]
    names = ["alone", "alone_attention", "cumulative", "cumulative_attention"]
    cells = [
        [
            str(row["tp"]),
            f"{row['one']}, {row['other']}",
            *(f"{row[name]:+.2f}" for name in names),
            f"{row['half_shared']:.0%}",
        ]
        for row in rows
    ]
    return Table("Spearman correlation of the scores on two texts", headers, cells)


def _method_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    headers = ["tp", "text", "perplexity undropped", "all points", "attention"]
    cells = [
        [
            str(row["tp"]),
            row["text"],
            f"{row['perplexity']:.1f}",
            f"{row['all']:+.2f}",
            f"{row['attention']:+.2f}",
        ]
        for row in rows
    ]
    return Table(
        "Spearman correlation of each point by itself with the cumulative scores", headers, cells
    )


def _top_table(costs: Mapping[str, Costs], tp: int) -> Table:
    headers = ["point", *costs]
    points = sorted(costs[CALIBRATION], key=costs[CALIBRATION].__getitem__, reverse=True)
    cells = [
        [point, *(f"{by_point[point]:.4f}" for by_point in costs.values())] for point in points
    ]
    return Table(f"KL divergence of each point dropped by itself, tp {tp}", headers, cells)


def _panel(costs: Mapping[str, Costs], tp: int) -> Panel:
    series = [
        Series(kind, list(by_point), list(by_point.values())) for kind, by_point in costs.items()
    ]
    return Panel(
        f"each point dropped by itself, tp {tp}",
        "sync point",
        "KL divergence, nats a token (log)",
        series,
        Kind.LINES,
        log=True,
    )


def _findings(
    pairs: Sequence[Mapping[str, Any]],
    methods: Sequence[Mapping[str, Any]],
    tops: Sequence[str],
) -> list[str]:
    agreeing = [row["all"] for row in methods]
    shared = [row["half_shared"] for row in pairs]
    steadier = sum(row["alone_attention"] > row["cumulative_attention"] for row in pairs)
    return [
        f"Scores of points by themselves, on any two texts: Spearman {_spread(pairs, 'alone')} "
        f"over all points, {_spread(pairs, 'alone_attention')} over attention points. The half "
        f"with the lower scores is shared to {median(shared):.0%} in the median, to "
        f"{min(shared):.0%} at least.",
        f"Cumulative scores: {_spread(pairs, 'cumulative')} over all points, "
        f"{_spread(pairs, 'cumulative_attention')} over attention points. Over attention points "
        f"the scores by themselves agree better than these in {steadier} of {len(pairs)} cases.",
        "The most sensitive point by itself, over all texts and tp: " + ", ".join(tops) + ".",
        f"On one and the same text the two ways of scoring correlate at {median(agreeing):+.2f} "
        f"in the median, {min(agreeing):+.2f} to {max(agreeing):+.2f}.",
    ]


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{median(values):+.2f} in the median ({min(values):+.2f} to {max(values):+.2f})"

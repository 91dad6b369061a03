"""Does sensitivity change with the calibration data?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from examples.study.context import ATTENTION, Context
from examples.study.correlation import spearman
from examples.study.section import Findings, Kind, Panel, Series, Table
from examples.study.texts import CALIBRATION, texts_of
from spdcompile import Method, Sensitivity
from spdcompile.plan import Point

Costs = dict[Point, float]


def measure(context: Context) -> Findings:
    """Scores of every sync point on texts of four kinds, and how they correlate."""
    texts = texts_of(context)
    found: dict[int, dict[str, Sensitivity]] = {}
    for tp in context.sizes.tps:
        print(f"   tp {tp}", flush=True)
        found[tp] = {kind: context.sensitivity_on(text, tp) for kind, text in texts.items()}
    pairs = [row for tp, by_text in found.items() for row in _pairs(tp, by_text)]
    methods = [row for tp, by_text in found.items() for row in _methods(tp, by_text)]
    main = found[context.sizes.main_tp]
    return Findings(
        title="Sensitivity and the data",
        question="Does it matter on which text the sensitivity of sync points is measured?",
        method="Scores of all sync points that can be dropped, by themselves (KL divergence to "
        f"the undropped model) and cumulatively (the paper's), on {context.sizes.scoring} chunks "
        f"of {context.sizes.length} tokens of each text: the calibration text (the Bible and three "
        "software manuals, what the model was trained on), source code of Python's standard "
        "library, Python's own manual (pydoc topics), and what the model itself writes when "
        "sampled. Spearman's rank correlation over the points.",
        tables=[
            _pair_table(pairs),
            _method_table(methods),
            _top_table(main, context.sizes.main_tp),
        ],
        panels=[_panel(main, context.sizes.main_tp)],
        findings=_findings(pairs, methods, found),
        numbers={
            "pairs": pairs,
            "methods": methods,
            "scores": {
                str(tp): {kind: sensitivity.to_dict() for kind, sensitivity in by_text.items()}
                for tp, by_text in found.items()
            },
        },
    )


def _alone(sensitivity: Sensitivity) -> Costs:
    """The KL divergence that each point costs by itself."""
    found = zip(sensitivity.points, sensitivity.found[Method.ALONE], strict=True)
    return {point: quality.kl or 0.0 for point, quality in found}


def _correlate(one: Costs, other: Costs, kind: str | None = None) -> float:
    points = [point for point in one if kind is None or point[1] == kind]
    return spearman([one[point] for point in points], [other[point] for point in points])


def _pairs(tp: int, found: Mapping[str, Sensitivity]) -> list[dict[str, Any]]:
    """Every two texts: how their scores correlate, and which points they would drop."""
    rows = []
    for one, other in combinations(found, 2):
        alone = _alone(found[one]), _alone(found[other])
        cumulative = tuple(found[kind].scores_by(Method.CUMULATIVE) for kind in (one, other))
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


def _methods(tp: int, found: Mapping[str, Sensitivity]) -> list[dict[str, Any]]:
    """On each text: do the two ways of scoring agree?"""
    rows = []
    for kind, sensitivity in found.items():
        alone = _alone(sensitivity)
        cumulative = sensitivity.scores_by(Method.CUMULATIVE)
        rows.append(
            {
                "tp": tp,
                "text": kind,
                "perplexity": sensitivity.undropped.perplexity,
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


def _top_table(found: Mapping[str, Sensitivity], tp: int) -> Table:
    headers = ["point", *found]
    costs = {kind: _alone(sensitivity) for kind, sensitivity in found.items()}
    points = sorted(costs[CALIBRATION], key=costs[CALIBRATION].__getitem__, reverse=True)
    cells = [
        [f"{layer}.{name}", *(f"{by_point[layer, name]:.4f}" for by_point in costs.values())]
        for layer, name in points
    ]
    return Table(f"KL divergence of each point dropped by itself, tp {tp}", headers, cells)


def _panel(found: Mapping[str, Sensitivity], tp: int) -> Panel:
    series = [
        Series(kind, [f"{layer}.{name}" for layer, name in costs], list(costs.values()))
        for kind, costs in ((kind, _alone(sensitivity)) for kind, sensitivity in found.items())
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
    found: Mapping[int, Mapping[str, Sensitivity]],
) -> list[str]:
    alone = [row["alone"] for row in pairs]
    cumulative = [row["cumulative"] for row in pairs]
    agreeing = [row["all"] for row in methods]
    shared = [row["half_shared"] for row in pairs]
    tops = {
        max(costs, key=costs.__getitem__)
        for by_text in found.values()
        for costs in (_alone(sensitivity) for sensitivity in by_text.values())
    }
    names = ", ".join(f"{layer}.{name}" for layer, name in sorted(tops))
    return [
        f"Points dropped by themselves are compared on any two texts: Spearman "
        f"{median(alone):+.2f} in the median, {min(alone):+.2f} to {max(alone):+.2f}. The half "
        f"with the lower scores is shared to {median(shared):.0%} in the median, to "
        f"{min(shared):.0%} at least.",
        f"Cumulative scores: {median(cumulative):+.2f} in the median, {min(cumulative):+.2f} to "
        f"{max(cumulative):+.2f}.",
        "The most sensitive point by itself, over all texts and tp: " + names + ".",
        f"On one and the same text the two ways of scoring correlate at {median(agreeing):+.2f} "
        f"in the median, {min(agreeing):+.2f} to {max(agreeing):+.2f}.",
    ]

"""The extremely sensitive block: recover it, or keep its sync point?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from examples.study.context import ATTENTION, MLP, Context
from examples.study.quality import percent
from examples.study.section import Findings, Kind, Panel, Series, Table
from spdcompile.plan import Point

KEPT, LOST = "sync point of the worst block kept", "dropped, another kept"


def measure(context: Context) -> Findings:
    """Plans of as many all-reduces, with and without the worst block's."""
    rows = [row for tp in dict.fromkeys(_tps(context)) for row in _at(context, tp)]
    return Findings(
        title="The worst block",
        question="At equally many all-reduces kept, is it better to distil the most sensitive "
        "block, with head grouping, or to keep its sync point and drop another?",
        method="The worst point is the attention point that costs most by itself on calibration "
        "text. At 7 dropped: all other attention points, against all attention points but the "
        "least sensitive one. At 8 dropped: all other attention points and the least sensitive "
        "MLP point, against all attention points. Distilled as in the first section (progressive); "
        "grouped by the paper's criterion.",
        tables=[_table(rows)],
        panels=[_panel(rows)],
        findings=_findings(rows),
        numbers={"rows": rows},
    )


def _tps(context: Context) -> tuple[int, int]:
    return context.sizes.tps[0], context.sizes.main_tp


def _plans(context: Context, tp: int) -> list[tuple[str, frozenset[Point]]]:
    attention = context.all_attention()
    ordered = context.least_sensitive(tp, len(attention) - 1)
    (worst,) = attention - ordered
    least = context.least_sensitive(tp, 1)
    mlp = context.least_sensitive(tp, 1, MLP)
    return [
        (KEPT, attention - {worst}),
        (LOST, attention - least),
        (KEPT, (attention - {worst}) | mlp),
        (LOST, attention),
    ]


def _at(context: Context, tp: int) -> list[dict[str, Any]]:
    rows = []
    for what, points in _plans(context, tp):
        print(f"   tp {tp}, {len(points)} dropped, {what}", flush=True)
        kept = sorted(context.all_attention() - points)
        mlp = sorted(point for point in points if point[1] != ATTENTION)
        for grouped in (False, True) if what == LOST else (False,):
            compiled = context.compiled(tp, grouped)
            rows.append(
                {
                    "tp": tp,
                    "dropped": len(points),
                    "what": what + (", grouped" if grouped else ""),
                    "attention_kept": [f"{layer}.{name}" for layer, name in kept],
                    "mlp_dropped": [f"{layer}.{name}" for layer, name in mlp],
                    "zero_shot": asdict(context.zero_shot(compiled, points)),
                    "distilled": asdict(context.score(context.distilled(compiled, points))),
                }
            )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    headers = ["tp", "dropped", "way", "attention kept", "MLP dropped", "zero-shot", "after B2B"]
    cells = [
        [
            str(row["tp"]),
            str(row["dropped"]),
            row["what"],
            ", ".join(row["attention_kept"]) or "-",
            ", ".join(row["mlp_dropped"]) or "-",
            percent(row["zero_shot"]["increase"]),
            f"{percent(row['distilled']['increase'])} ± {row['distilled']['error']:.2f} "
            f"(KL {row['distilled']['kl']:.4f})",
        ]
        for row in rows
    ]
    return Table("Perplexity added at equally many all-reduces", headers, cells)


def _panel(rows: Sequence[dict[str, Any]]) -> Panel:
    series = []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        names = [f"tp {row['tp']}, {row['dropped']} dropped" for row in own]
        series.append(Series(what, names, [row["distilled"]["increase"] for row in own]))
    return Panel(
        "after B2B", "ranks and all-reduces dropped", "perplexity added, %", series, Kind.BARS
    )


def _findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for tp, dropped in dict.fromkeys((row["tp"], row["dropped"]) for row in rows):
        at = {row["what"]: row for row in rows if (row["tp"], row["dropped"]) == (tp, dropped)}
        added = {what: row["distilled"]["increase"] for what, row in at.items()}
        best = min(added, key=added.__getitem__)
        texts = [f"{what} {percent(value)}" for what, value in added.items()]
        found.append(f"tp {tp}, {dropped} dropped, after B2B: {'; '.join(texts)}. Best: {best}.")
    return found

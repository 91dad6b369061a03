"""The extremely sensitive block: recover it, or keep its sync point?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from examples.study.context import ATTENTION, MLP, Context
from examples.study.quality import percent
from examples.study.section import Kind, Panel, Series, Shown, Table
from examples.study.sizes import Sizes
from spdcompile.plan import Point

KEPT, LOST = "sync point of the worst block kept", "dropped, another kept"


_METHOD = (
    "The worst point is the attention point that costs most by itself on calibration text. At one "
    "attention point kept: all other attention points dropped, against all but the least sensitive "
    "one. At none more kept: all other attention points and the least sensitive MLP point dropped, "
    "against all attention points. Distilled as in the first section (progressive); grouped by the "
    "paper's criterion."
)


def measure(context: Context) -> dict[str, Any]:
    """Plans of as many all-reduces, with and without the worst block's."""
    ends = dict.fromkeys((context.sizes.tps[0], context.sizes.main_tp))
    return {"rows": [row for tp in ends for row in _at(context, tp)]}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """What keeping the worst block's point is worth."""
    rows = numbers["rows"]
    return Shown(
        title="The worst block",
        question="At equally many all-reduces kept, is it better to distil the most sensitive "
        "block, with head grouping, or to keep its sync point and drop another?",
        method=_METHOD,
        findings=_findings(rows),
        tables=[_table(rows)],
        panels=[_panel(rows)],
    )


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

"""Beyond the paper: MLP sync points too, runs of them, and few that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from examples.study.context import Context
from examples.study.plans import beyond
from examples.study.quality import percent
from examples.study.section import Kind, Panel, Series, Shown, Table
from examples.study.sizes import Sizes

_METHOD = (
    "Sub-layers are counted in program order, attention and MLP in turn, and the last point is "
    "always kept. Distilled as in the first section, progressive, at the largest tp: the unit is "
    "the run of blocks between two kept points, trained to give what the original blocks give at "
    "its end."
)


def measure(context: Context) -> dict[str, Any]:
    """Plans over all sync points, zero-shot and distilled."""
    rows = [row for tp in context.sizes.tps for row in _at(context, tp)]
    return {"rows": rows, "points": 2 * context.num_layers}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """What each plan costs."""
    rows, total = numbers["rows"], numbers["points"]
    return Shown(
        title="Beyond attention",
        question="What does it cost to drop MLP sync points, runs of points, or all but a few?",
        method=_METHOD,
        findings=_findings(rows, sizes.tps, total),
        tables=[_table(rows, sizes.tps, total)],
        panels=[_panel(rows, sizes.main_tp, total)],
    )


def _at(context: Context, tp: int) -> list[dict[str, Any]]:
    rows = []
    compiled = context.compiled(tp)
    for name, points in beyond(context.num_layers).items():
        print(f"   tp {tp}, {name}", flush=True)
        row = {
            "tp": tp,
            "name": name,
            "dropped": len(points),
            "points": [f"{layer}.{kind}" for layer, kind in sorted(points)],
            "zero_shot": asdict(context.zero_shot(compiled, points)),
        }
        if tp == context.sizes.main_tp:
            row["distilled"] = asdict(context.score(context.distilled(compiled, points)))
        rows.append(row)
    return rows


def _table(rows: Sequence[dict[str, Any]], tps: Sequence[int], total: int) -> Table:
    headers = ["dropped", f"points of {total}", *(f"zero-shot, tp {tp}" for tp in tps)]
    headers.append(f"distilled, tp {tps[-1]}")
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        at = {row["tp"]: row for row in rows if row["name"] == name}
        last = at[tps[-1]]
        cells.append(
            [
                name,
                str(last["dropped"]),
                *(percent(at[tp]["zero_shot"]["increase"]) for tp in tps),
                f"{percent(last['distilled']['increase'])} ± {last['distilled']['error']:.2f} "
                f"(KL {last['distilled']['kl']:.4f})",
            ]
        )
    return Table("Perplexity added", headers, cells)


def _panel(rows: Sequence[dict[str, Any]], tp: int, total: int) -> Panel:
    own = sorted((row for row in rows if row["tp"] == tp), key=lambda row: row["dropped"])
    dropped = [row["dropped"] for row in own]
    series = [
        Series(label, dropped, [row[key]["increase"] for row in own])
        for label, key in (("zero-shot", "zero_shot"), ("distilled by segments", "distilled"))
    ]
    return Panel(
        f"plans of the table, tp {tp}",
        f"sync points dropped, of {total}",
        "perplexity added, % (log)",
        series,
        Kind.POINTS,
        log=True,
    )


def _findings(rows: Sequence[dict[str, Any]], tps: Sequence[int], total: int) -> list[str]:
    found = []
    for row in rows:
        if row["tp"] == tps[-1]:
            found.append(
                f"tp {row['tp']}, {row['name']} ({row['dropped']} of {total} dropped): "
                f"{percent(row['zero_shot']['increase'])} zero-shot, "
                f"{percent(row['distilled']['increase'])} distilled."
            )
    return found

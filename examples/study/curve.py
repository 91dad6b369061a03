"""Perplexity against the share of attention sync points dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from examples.study.context import Context
from examples.study.quality import Score, percent
from examples.study.section import Panel, Series, Shown, Table
from examples.study.sizes import Sizes
from spdcompile import StudentInput

ZERO, GROUPED = "zero-shot", "zero-shot, grouped"
TEACHER, PROGRESSIVE = "B2B, teacher inputs", "B2B, progressive"
GROUPED_B2B = "B2B, progressive, grouped"


_METHOD = (
    "The points that cost least by themselves on calibration text go first. Zero-shot: nothing is "
    "trained. B2B: each block that loses its point learns to give the original block's output, "
    "{steps} steps of {batch} chunks of {length} tokens out of {calibration}, all settings else "
    "the defaults; its input is the original model's (teacher inputs) or that of the blocks "
    "trained so far (progressive). Grouped: the heads of all blocks by the paper's criterion. At "
    "the largest tp all shares are trained, at the others the largest share alone, to keep the "
    "study within an hour."
)


def measure(context: Context) -> dict[str, Any]:
    """Zero-shot and three kinds of distillation, at each share."""
    return {"rows": [row for tp in context.sizes.tps for row in _at(context, tp)]}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """Perplexity added by share and way."""
    rows = numbers["rows"]
    return Shown(
        title="Attention sync points",
        question="What does it cost to drop a share of the attention sync points, and how much "
        "do block-to-block distillation and head grouping win back?",
        method=_METHOD.format(**asdict(sizes)),
        findings=_findings(rows, sizes.tps),
        tables=[_table(rows, tp) for tp in sizes.tps],
        panels=[_panel(rows, sizes.main_tp)],
    )


def _at(context: Context, tp: int) -> list[dict[str, Any]]:
    """Every share at one tp."""
    rows = []
    for share in context.sizes.shares:
        points = context.attention_share(tp, share)
        print(f"   tp {tp}, {share} %", flush=True)
        named = sorted(f"{layer}.{name}" for layer, name in points)
        for way, score in _scores(context, tp, points, share).items():
            rows.append({"tp": tp, "share": share, "way": way, "points": named, **asdict(score)})
    return rows


def _scores(context: Context, tp: int, points: frozenset, share: int) -> dict[str, Score]:
    even, grouped = context.compiled(tp), context.compiled(tp, True)
    found = {ZERO: context.zero_shot(even, points), GROUPED: context.zero_shot(grouped, points)}
    if tp == context.sizes.main_tp or share == context.sizes.shares[-1]:
        progressive, teacher = StudentInput.PROGRESSIVE, StudentInput.TEACHER
        ways = {TEACHER: (even, teacher), PROGRESSIVE: (even, progressive)}
        ways[GROUPED_B2B] = (grouped, progressive)
        for way, (compiled, student_input) in ways.items():
            found[way] = context.score(context.distilled(compiled, points, student_input))
    return found


def _table(rows: Sequence[dict[str, Any]], tp: int) -> Table:
    own = [row for row in rows if row["tp"] == tp]
    ways = list(dict.fromkeys(row["way"] for row in own))
    cells = []
    for share in dict.fromkeys(row["share"] for row in own):
        by_way = {row["way"]: row for row in own if row["share"] == share}
        shown = [_cell(by_way[way]) if way in by_way else "-" for way in ways]
        cells.append([f"{share} %", ", ".join(by_way[ZERO]["points"]), *shown])
    return Table(
        f"Perplexity added (and KL divergence), tp {tp}", ["share", "points", *ways], cells
    )


def _cell(row: dict[str, Any]) -> str:
    return f"{percent(row['increase'])} ± {row['error']:.2f} (KL {row['kl']:.4f})"


def _panel(rows: Sequence[dict[str, Any]], tp: int) -> Panel:
    series = []
    for way in (ZERO, GROUPED, TEACHER, PROGRESSIVE, GROUPED_B2B):
        own = [row for row in rows if (row["tp"], row["way"]) == (tp, way)]
        series.append(Series(way, [row["share"] for row in own], [row["increase"] for row in own]))
    return Panel(
        f"tp {tp}",
        "attention sync points dropped, %",
        "perplexity added, % (log)",
        series,
        log=True,
    )


def _findings(rows: Sequence[dict[str, Any]], tps: Sequence[int]) -> list[str]:
    found = []
    for tp in tps:
        own = [row for row in rows if row["tp"] == tp]
        last = max(row["share"] for row in own)
        at = {row["way"]: row for row in own if row["share"] == last}
        texts = [f"{percent(row['increase'])} {way}" for way, row in at.items()]
        found.append(f"tp {tp}, {last} % dropped: " + ", ".join(texts) + ".")
    found.append(_compared(rows, "Progressive inputs", PROGRESSIVE, "teacher inputs", TEACHER))
    grouped = "The paper's head groups before B2B", GROUPED_B2B, "B2B in order", PROGRESSIVE
    found.append(_compared(rows, *grouped))
    return found


def _compared(
    rows: Sequence[dict[str, Any]], one: str, way: str, other: str, other_way: str
) -> str:
    """How often one way is better than another, and by how much."""
    by_case = {(row["tp"], row["share"], row["way"]): row for row in rows}
    gains = [
        row["increase"] - by_case[tp, share, other_way]["increase"]
        for (tp, share, found), row in by_case.items()
        if found == way
    ]
    better = sum(gain < 0 for gain in gains)
    return (
        f"{one} give less perplexity than {other} in {better} of {len(gains)} cases; the "
        f"difference is {min(gains):+.2f} to {max(gains):+.2f} percentage points."
    )

"""SPD beside other ways to save as many all-reduces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from examples.study.context import Context
from examples.study.naive import naive
from examples.study.quality import Run, Score, percent
from examples.study.section import Panel, Series, Shown, Table
from examples.study.sizes import Sizes

SPD, TRAINED, NAIVE = "SPD", "SPD + B2B", "dropped without deferral"
LAYERS, BLOCKS = "attention layers left out", "blocks left out"


_METHOD = (
    "SPD drops the attention sync points that cost least by themselves. Beside it, at as many "
    "all-reduces saved: the same points dropped without deferral, where each rank keeps its own "
    "share of the attention's output and what the others would have sent is lost (quality is the "
    "mean over the ranks, whose logits then differ); whole attention layers left out, those that "
    "cost least by themselves on calibration text; and whole blocks, each of which saves two "
    "all-reduces. What is left out altogether also saves weights and time, which is not counted "
    "here, and gives the same numbers at every tp. Only SPD is also shown after distillation (B2B, "
    "progressive, at the largest tp): the others were not trained."
)


def measure(context: Context) -> dict[str, Any]:
    """Quality at equal all-reduces saved."""
    rows = []
    for tp in context.sizes.tps:
        print(f"   tp {tp}", flush=True)
        rows += _sync_points(context, tp)
    return {"rows": rows + _skipped(context)}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """SPD beside each other way."""
    rows = numbers["rows"]
    ends = dict.fromkeys((sizes.tps[0], sizes.main_tp))
    return Shown(
        title="Baselines at equal all-reduces saved",
        question="Is SPD better than other ways to save as many all-reduces?",
        method=_METHOD,
        findings=[_finding(rows, tp) for tp in sizes.tps],
        tables=[_table(rows, tp) for tp in sizes.tps],
        panels=[_panel(rows, tp) for tp in ends],
    )


def _row(tp: int, way: str, saved: int, what: Iterable[Any], score: Score) -> dict[str, Any]:
    return {"tp": tp, "way": way, "saved": saved, "what": sorted(what), **asdict(score)}


def _sync_points(context: Context, tp: int) -> list[dict[str, Any]]:
    """The ways that drop sync points, at each share."""
    rows = []
    compiled = context.compiled(tp)
    for share in context.sizes.shares:
        points = context.attention_share(tp, share)
        scores = {
            SPD: context.zero_shot(compiled, points),
            NAIVE: context.heldout.score(naive(context.model, tp, points)),
        }
        if tp == context.sizes.main_tp:
            scores[TRAINED] = context.score(context.distilled(compiled, points))
        named = [f"{layer}.{name}" for layer, name in points]
        rows += [_row(tp, way, len(points), named, score) for way, score in scores.items()]
    return rows


def _skipped(context: Context) -> list[dict[str, Any]]:
    """Attention layers and blocks left out, at each share; the same at every tp."""
    rows = []
    for way, saves in ((LAYERS, 1), (BLOCKS, 2)):
        whole = way == BLOCKS
        costs = {
            layer: context.choosing.score(_without(context, [layer], whole)).kl
            for layer in range(context.num_layers)
        }
        order = sorted(costs, key=costs.__getitem__)
        for share in context.sizes.shares:
            saved = round(context.num_layers * share / 100)
            left_out = order[: saved // saves]
            score = context.heldout.score(_without(context, left_out, whole))
            # Nothing of it depends on tp, which 0 stands for.
            rows.append(_row(0, way, len(left_out) * saves, left_out, score))
    return rows


def _without(context: Context, layers: Sequence[int], whole: bool) -> Run:
    """A run in which some attention layers, or whole blocks, add nothing."""
    compiled = context.compiled(context.sizes.tps[0])
    names = ["self_attn.o_proj", *(["mlp.down_proj"] if whole else [])]
    own = context.model.state_dict()
    keys = [f"model.layers.{layer}.{name}.weight" for layer in layers for name in names]
    silent = compiled.with_weights({key: torch.zeros_like(own[key]) for key in keys})

    def run(tokens: Tensor) -> Tensor:
        return silent(tokens).logits

    return run


def _ways(rows: Sequence[dict[str, Any]], tp: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Way -> all-reduces saved -> row."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for way in (SPD, TRAINED, NAIVE, LAYERS, BLOCKS):
        of_way = {row["saved"]: row for row in rows if row["tp"] in (0, tp) and row["way"] == way}
        if of_way:
            found[way] = of_way
    return found


def _table(rows: Sequence[dict[str, Any]], tp: int) -> Table:
    ways = _ways(rows, tp)
    cells = [
        [
            str(saved),
            *(
                f"{percent(by_saved[saved]['increase'])} (KL {by_saved[saved]['kl']:.3f})"
                if saved in by_saved
                else "-"
                for by_saved in ways.values()
            ),
        ]
        for saved in sorted(ways[SPD])
    ]
    return Table(f"Perplexity added, tp {tp}", ["all-reduces saved", *ways], cells)


def _panel(rows: Sequence[dict[str, Any]], tp: int) -> Panel:
    series = [
        Series(way, sorted(by_saved), [by_saved[n]["increase"] for n in sorted(by_saved)])
        for way, by_saved in _ways(rows, tp).items()
    ]
    return Panel(
        f"tp {tp}", "all-reduces saved, of 16", "perplexity added, % (log)", series, log=True
    )


def _finding(rows: Sequence[dict[str, Any]], tp: int) -> str:
    """SPD zero-shot beside each other way, by KL divergence, and after B2B."""
    ways = _ways(rows, tp)
    spd, trained = ways.pop(SPD), ways.pop(TRAINED, {})
    parts = []
    for way, by_saved in ways.items():
        both = [saved for saved in by_saved if saved in spd]
        better = sum(spd[saved]["kl"] < by_saved[saved]["kl"] for saved in both)
        most = max(both)
        parts.append(
            f"{way} in {better} of {len(both)} cases (at {most} saved: "
            f"{percent(spd[most]['increase'])} against {percent(by_saved[most]['increase'])})"
        )
    after = f" After B2B it adds {percent(trained[max(trained)]['increase'])}." if trained else ""
    return f"tp {tp}: SPD zero-shot is closer to the model than {', than '.join(parts)}.{after}"

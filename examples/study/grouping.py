"""Does it matter which heads share a rank, and do the paper's criteria know?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from examples.study.context import ATTENTION, Context
from examples.study.correlation import chance, spearman
from examples.study.quality import percent
from examples.study.section import Kind, Panel, Series, Shown, Table
from examples.study.sizes import Sizes
from spdcompile import CompiledModel
from spdcompile.plan import HeadGroups
from spdcompile.runtime.grouping import within
from spdcompile.runtime.heads import head_distances, shard_norms

AS_IS, PAPER = "in order", "the paper's"
WORST, OTHERS = "block 0", "the others"

_METHOD = (
    "The heads of every block are dealt to the ranks in order, at random ({draws} draws), and by "
    "the paper's criterion (largest distances between attention scores within a rank, then matched "
    "to the MLP shards by the norms of their outputs). Nothing is trained. Dropped is the "
    "attention sync point of block 0 alone, or those of all other blocks together. The best draw "
    "is chosen by the KL divergence on calibration text; the figures are those of held-out text. A "
    "criterion that knows what helps would correlate with the KL divergence at -1: it calls large "
    "distances and norms good. p says how often a random order correlates as strongly. With one "
    "head a rank nothing but the matching to the MLP shards is left, and all distances are zero."
)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One grouping of the heads of all layers, and what it is worth.

    Args:
        chosen_by: KL divergence on the calibration text, by which the best draw is chosen.
        distance, norm: the two criteria of the paper, summed over the layers of the scope.
    """

    tp: int
    scope: str
    name: str
    increase: float
    error: float
    kl: float
    chosen_by: float
    distance: float
    norm: float


def measure(context: Context) -> dict[str, Any]:
    """Groupings in order, at random and by the paper's criterion, zero-shot."""
    found = [row for tp in context.sizes.tps for row in _at(context, tp)]
    return {"assignments": [asdict(row) for row in found]}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """The draws beside the others, and how the criteria rank them."""
    found = [Assignment(**row) for row in numbers["assignments"]]
    cases = [(tp, scope) for tp in sizes.tps for scope in (WORST, OTHERS)]
    by_case = {case: [row for row in found if (row.tp, row.scope) == case] for case in cases}
    ablation = {case: _ablation(rows) for case, rows in by_case.items()}
    correlations = {case: _correlations(rows) for case, rows in by_case.items()}
    return Shown(
        title="Head grouping",
        question="Does it matter which heads share a rank, and do the paper's criteria rank "
        "groupings as the loss does?",
        method=_METHOD.format(draws=sizes.draws),
        findings=[
            _summary(list(ablation.values()), sizes.draws),
            *(_ablation_text(*case, row, sizes.draws) for case, row in ablation.items()),
            *_verdicts(correlations),
        ],
        tables=[_ablation_table(ablation), _correlation_table(correlations)],
        panels=[_panel(scope, found) for scope in (WORST, OTHERS)],
    )


def _at(context: Context, tp: int) -> list[Assignment]:
    """Every assignment at one tp."""
    tokens = context.chunks(context.calibration_text, context.sizes.grouping)
    layers = frozenset(range(context.num_layers))
    even = context.compiled(tp).executor
    distances = head_distances(even, tokens, layers, progress=False)
    rows = []
    for name, groups in _assignments(context, tp).items():
        print(f"   tp {tp}, {name}", flush=True)
        compiled = _compiled(context, tp, name, groups)
        norms = shard_norms(compiled.executor, tokens, layers, ATTENTION, progress=False)
        for scope, scoped in ((WORST, [0]), (OTHERS, [*range(1, context.num_layers)])):
            dropped = context.dropped(compiled, [(layer, ATTENTION) for layer in scoped])
            held = context.score(dropped)
            chosen_by = context.choosing.score(lambda ids, run=dropped: run(ids).logits).kl
            apart = sum(within(distances[layer], groups[layer]) for layer in scoped)
            norm = sum(float(np.trace(norms[layer])) for layer in scoped)
            measured = (held.increase, held.error, held.kl, chosen_by, apart, norm)
            rows.append(Assignment(tp, scope, name, *measured))
    return rows


def _compiled(context: Context, tp: int, name: str, groups: HeadGroups) -> CompiledModel:
    """The model with these groups; compiled anew for random ones alone."""
    if name in (AS_IS, PAPER):
        return context.compiled(tp, name == PAPER)
    return context.compile(tp, groups)


def _assignments(context: Context, tp: int) -> dict[str, HeadGroups]:
    """Name -> the head groups of all layers."""
    heads, layers = context.model.config.num_attention_heads, range(context.num_layers)
    generator = np.random.default_rng(tp)
    in_order = {layer: _dealt(np.arange(heads), tp) for layer in layers}
    draws = {
        f"draw {number}": {layer: _dealt(generator.permutation(heads), tp) for layer in layers}
        for number in range(context.sizes.draws)
    }
    return {AS_IS: in_order, PAPER: context.head_groups(tp), **draws}


def _dealt(order: np.ndarray, tp: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(part.tolist())) for part in np.split(order, tp))


def _ablation(rows: Sequence[Assignment]) -> dict[str, Any]:
    """The random draws beside the others, in percent of perplexity added."""
    named = {row.name: row for row in rows}
    draws = [row for row in rows if row.name not in (AS_IS, PAPER)]
    random = sorted(row.increase for row in draws)
    return {
        "in_order": named[AS_IS].increase,
        "random_least": random[0],
        "random_median": median(random),
        "random_most": random[-1],
        "paper": named[PAPER].increase,
        "paper_error": named[PAPER].error,
        "paper_rank": 1 + sum(value < named[PAPER].increase for value in random),
        "best_draw": min(draws, key=lambda row: row.chosen_by).increase,
    }


def _correlations(rows: Sequence[Assignment]) -> dict[str, float]:
    """Spearman between each criterion and the KL divergence on held-out text."""
    loss = [row.kl for row in rows]
    found = {}
    for name in ("distance", "norm", "chosen_by"):
        values = [getattr(row, name) for row in rows]
        found[name] = spearman(values, loss)
        found[f"{name}_chance"] = chance(values, loss)
    return found


def _ablation_table(ablation: Mapping[tuple[int, str], Mapping[str, Any]]) -> Table:
    headers = ["tp", "dropped in", "in order", "random: least", "median", "most"]
    headers += ["the paper's", "best draw by calibration"]
    shown = ["in_order", "random_least", "random_median", "random_most", "paper", "best_draw"]
    rows = [
        [str(tp), scope, *(percent(row[name]) for name in shown)]
        for (tp, scope), row in ablation.items()
    ]
    return Table("Perplexity added by the drop", headers, rows)


def _correlation_table(correlations: Mapping[tuple[int, str], Mapping[str, float]]) -> Table:
    headers = ["tp", "dropped in", "distance", "p", "norm", "p"]
    rows = [
        [
            str(tp),
            scope,
            *(
                text
                for name in ("distance", "norm")
                for text in _correlated(row[name], row[f"{name}_chance"])
            ),
        ]
        for (tp, scope), row in correlations.items()
    ]
    return Table("Spearman correlation of each criterion with the KL divergence", headers, rows)


def _correlated(value: float, by_chance: float) -> tuple[str, str]:
    """Both as text; a criterion that is the same for all assignments says nothing."""
    return (f"{value:+.2f}", f"{by_chance:.2f}") if value or by_chance < 1 else ("-", "-")


def _panel(scope: str, rows: Sequence[Assignment]) -> Panel:
    own = [row for row in rows if row.scope == scope]
    draws = [row for row in own if row.name not in (AS_IS, PAPER)]
    middle = {
        tp: median(row.increase for row in draws if row.tp == tp) for tp in {row.tp for row in own}
    }
    labels = {AS_IS: "in order", PAPER: "the paper's"}
    series = []
    for label in ("random draws", *labels.values()):
        shown = [row for row in own if labels.get(row.name, "random draws") == label]
        names = [f"tp {row.tp}" for row in shown]
        series.append(Series(label, names, [row.increase - middle[row.tp] for row in shown]))
    y_label = "perplexity added, points above the median draw"
    return Panel(f"attention dropped in {scope}", "ranks", y_label, series, Kind.POINTS)


def _summary(rows: Sequence[Mapping[str, Any]], draws: int) -> str:
    """The paper's groups and the best draw beside a random one, over all cases."""
    count = len(rows)
    paper = sum(row["paper"] < row["random_median"] for row in rows)
    best = sum(row["best_draw"] < row["random_median"] for row in rows)
    in_order = sum(row["best_draw"] < row["in_order"] for row in rows)
    middle = sum(row["random_median"] < row["in_order"] for row in rows)
    mean_rank = sum(row["paper_rank"] for row in rows) / count
    verdict = "does not beat" if mean_rank >= (draws + 2) / 2 else "is better than"
    return (
        f"The paper's grouping {verdict} random ones: it adds less than the median draw in "
        f"{paper} of {count} cases, and its mean rank among the draws is {mean_rank:.1f} of "
        f"{draws + 1} (chance: {(draws + 2) / 2:.1f}). The median draw itself adds less than the "
        f"order as it is in {middle} of {count}: to compare with that order alone would flatter "
        f"any grouping. To try {draws} draws and take the one that is best on calibration text "
        f"does better than the median draw in {best} of {count} cases, and than the order as it "
        f"is in {in_order}."
    )


def _ablation_text(tp: int, scope: str, row: Mapping[str, Any], draws: int) -> str:
    return (
        f"tp {tp}, {scope}: random groups add {percent(row['random_median'])} in the median, "
        f"{percent(row['random_least'])} to {percent(row['random_most'])}; in order "
        f"{percent(row['in_order'])}. The paper's grouping adds {percent(row['paper'])} "
        f"(standard error {row['paper_error']:.2f}) and ranks {row['paper_rank']} of {draws + 1} "
        f"when put among the {draws} draws; the draw that is best on calibration text adds "
        f"{percent(row['best_draw'])}."
    )


def _verdicts(correlations: Mapping[tuple[int, str], Mapping[str, float]]) -> list[str]:
    """Whether each criterion says anything."""
    found = []
    for name, label in (("distance", "attention distance"), ("norm", "MLP norm")):
        rows = [row for row in correlations.values() if row[name] != 0.0]
        if not rows:
            continue
        right = sum(row[name] < 0 and row[f"{name}_chance"] < 0.05 for row in rows)
        wrong = sum(row[name] > 0 and row[f"{name}_chance"] < 0.05 for row in rows)
        values = [row[name] for row in rows]
        found.append(
            f"The {label} criterion ranks groupings as the loss does, beyond chance (p < 0.05), "
            f"in {right} of {len(rows)} cases, and the wrong way round in {wrong}; the median "
            f"correlation is {median(values):+.2f}, from {min(values):+.2f} to {max(values):+.2f}."
        )
    values = [row["chosen_by"] for row in correlations.values()]
    found.append(
        "For comparison, the KL divergence on other text (calibration) ranks them with a median "
        f"correlation of {median(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})."
    )
    return found

"""A run as Markdown: a table of the variants, one of each step, and the conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate

from spdcompile.bench.result import Outcome, Result, Row
from spdcompile.bench.settings import Step
from spdcompile.bench.variants import BASELINE

_NONE = "-"
_MIB = 2**20
_FIGURES: Mapping[str, Callable[[Row], str]] = {
    "p10 ms": lambda row: _ms(row.p10),
    "median ms": lambda row: _ms(row.median),
    "p90 ms": lambda row: _ms(row.p90),
    "ratio": lambda row: _NONE if row.ratio is None else f"{row.ratio:.2f}",
    "tokens/s": lambda row: f"{row.tokens_per_second:.4g}",
    "error": lambda row: _NONE if row.error is None else f"{row.error:.1e}",
    "compile s": lambda row: f"{row.compile:.1f}",
}


def markdown(result: Result, *, title: str, chart: str = "") -> str:
    """The whole page.

    Args:
        title: the heading.
        chart: the file name of the chart; "" for none.
    """
    parts = [f"# {title}", _conditions(result.conditions)]
    if chart:
        parts.append(f"![p10 of each variant]({chart})")
    for step in result.steps:
        parts += [f"## {step.title}", _of_step(result, step)]
    parts += ["## Variants", _of_variants(result), _LEGEND.format(baseline=_baseline(result))]
    return "\n\n".join(parts) + "\n"


def _of_step(result: Result, step: Step) -> str:
    rows = []
    for outcome in result.outcomes:
        row = outcome.row(step.name)
        figures = [show(row) for show in _FIGURES.values()] if row else [_NONE] * len(_FIGURES)
        rows.append([outcome.label, *figures])
    return _table(["variant", *_FIGURES], rows)


def _of_variants(result: Result) -> str:
    rows = [
        [outcome.label, f"`{outcome.name}`", *_costs(outcome), outcome.reason or "measured"]
        for outcome in result.outcomes
    ]
    return _table(["variant", "name", "load s", "compile s", "peak MiB", "outcome"], rows)


def _costs(outcome: Outcome) -> list[str]:
    if outcome.reason:
        return [_NONE] * 3
    memory = f"{max(outcome.memory) / _MIB:.0f}" if outcome.memory else _NONE
    return [f"{outcome.load:.1f}", f"{outcome.compile:.1f}", memory]


def _table(headers: list[str], rows: list[list[str]]) -> str:
    align = ["left"] * len(headers)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _baseline(result: Result) -> str:
    found = (outcome.label for outcome in result.outcomes if outcome.name == BASELINE)
    return next(found, "none in this run")


def _conditions(conditions: Mapping[str, Any]) -> str:
    settings, model = conditions["settings"], conditions["model"]
    load = (
        "" if conditions["load"] is None else f", load average at the end {conditions['load']:.1f}"
    )
    return (
        f"{model}; {settings['dtype']}, tp {settings['tp']}, "
        f"{settings['threads']} thread(s) a rank, {settings['backend']}, "
        f"{settings['rounds']} rounds, {settings['new_tokens']} tokens behind each context. "
        f"{conditions['machine']}, {conditions['cores']} cores{load}; torch {conditions['torch']}, "
        f"transformers {conditions['transformers']}, {conditions['date']}."
    )


_LEGEND = (
    "p10, median and p90 are milliseconds of a prompt (TTFT) or a token (TPOT), on rank 0. ratio: "
    "p10 to that of the baseline ({baseline}). error: largest difference of a logit from Hugging "
    "Face eager in float32 on the same weights, relative to the largest logit. compile s: what the "
    "first call took longer than the second. load s: until the first call, by itself. peak MiB: of "
    "the largest process, in a launch of its own (`--memory`)."
)

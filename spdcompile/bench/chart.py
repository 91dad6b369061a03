"""A run as one PNG; the only module of the package that needs matplotlib, once it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spdcompile.bench.result import Result
from spdcompile.bench.settings import Kind, Step
from spdcompile.bench.variants import BASELINE

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
_OWN, _PEER, _LINE = "#0072B2", "#E69F00", "#000000"
_DPI = 110


def draw(result: Result, path: Path) -> None:
    """Writes bars of p10: the last prompt's TTFT beside the first TPOT.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib  # not above: it takes a second, and is an extra

    matplotlib.use("Agg")  # before pyplot: there may be no display
    import matplotlib.pyplot as plt

    first = [step for step in result.steps if step.kind is Kind.TTFT]
    further = [step for step in result.steps if step.kind is Kind.TPOT]
    steps = [*first[-1:], *further[:1]]
    measured = sum(not outcome.reason for outcome in result.outcomes)
    size = (6.0 * len(steps) + 2, 1.5 + 0.3 * measured)
    figure, axes = plt.subplots(
        1, len(steps), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for step, at in zip(steps, axes[0], strict=True):
        _draw(result, step, at)
    # Without the version in it, so that equal numbers give equal files.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)


def _draw(result: Result, step: Step, at: Any) -> None:
    rows = [(each, row) for each in result.outcomes if (row := each.row(step.name))]
    labels = [each.label for each, _ in rows]
    values = [row.p10 for _, row in rows]
    colours = [_OWN if each.name.startswith("spd-") else _PEER for each, _ in rows]
    bars = at.barh(labels, values, color=colours)
    at.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    for each, row in rows:
        if each.name == BASELINE:
            at.axvline(row.p10, color=_LINE, linestyle=":", linewidth=1)
    at.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    at.set_xlim(0, 1.12 * max(values, default=1.0))
    at.set_title(step.title, fontsize=10)
    at.set_xlabel("p10, ms; dotted: Hugging Face TP, eager")
    at.tick_params(axis="y", labelsize=8)

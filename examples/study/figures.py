"""Draws a section's panels as one PNG: the only module of the study that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from examples.study.section import Kind, Panel

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_DPI = 110


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes panels side by side, with one legend each."""
    width = 5.2 if len(panels) > 1 else 7.5
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for panel, at in zip(panels, axes[0], strict=True):
        _draw(panel, at)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version in it, so that equal numbers give equal files.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)


def _draw(panel: Panel, at: Axes) -> None:
    if panel.kind is Kind.BARS:
        _draw_bars(panel, at)
    else:
        for number, series in enumerate(panel.series):
            style = {"marker": MARKERS[number % 7], "color": COLOURS[number % 7]}
            line = "" if panel.kind is Kind.POINTS else "-"
            at.plot(series.x, series.y, linestyle=line, label=series.label, **style)
    if panel.log and min(min(series.y) for series in panel.series) > 0:
        at.set_yscale("log")
    elif panel.log:
        at.set_yscale("symlog", linthresh=0.1)  # distillation may do good
    numbers = {x for series in panel.series for x in series.x if isinstance(x, int)}
    if numbers and panel.kind is not Kind.BARS:
        at.set_xticks(sorted(numbers))
    at.set_title(panel.title, fontsize=10)
    at.set_xlabel(panel.x_label)
    at.set_ylabel(panel.y_label)
    at.grid(axis="y", alpha=0.3)
    at.legend(fontsize=8)


def _draw_bars(panel: Panel, at: Axes) -> None:
    names = list(dict.fromkeys(name for series in panel.series for name in series.x))
    width = 0.8 / len(panel.series)
    for number, series in enumerate(panel.series):
        left = (number - (len(panel.series) - 1) / 2) * width
        places = [names.index(name) + left for name in series.x]
        at.bar(places, series.y, width, label=series.label, color=COLOURS[number % 7])
    at.set_xticks(range(len(names)), [str(name) for name in names])
    longest = max(len(str(name)) for name in names)
    if longest * len(names) > 60:
        plt.setp(at.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")

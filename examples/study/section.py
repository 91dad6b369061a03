"""A section of the study as data: what was asked, measured and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """How a panel is drawn."""

    LINES = "lines"
    BARS = "bars"
    POINTS = "points"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of finished cells."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Series:
    """What a panel shows under one label; x are numbers, or names for bars."""

    label: str
    x: Sequence[float | str]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes of a section's figure."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Kind = Kind.LINES
    log: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One section.

    Args:
        name: names its files.
        question: what it answers, in one sentence.
        method: how it was measured.
        tables, panels: what is shown.
        findings: sentences, computed from the numbers.
        numbers: everything that was measured, as JSON data.
        facts: sizes, machine, versions, date and seconds of the run.
    """

    name: str
    title: str
    question: str
    method: str
    tables: Sequence[Table]
    panels: Sequence[Panel]
    findings: Sequence[str]
    numbers: Mapping[str, Any]
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Section:
        """What `to_dict` gave."""
        tables = [Table(**table) for table in data["tables"]]
        panels = [
            Panel(
                **{
                    **panel,
                    "series": [Series(**series) for series in panel["series"]],
                    "kind": Kind(panel["kind"]),
                }
            )
            for panel in data["panels"]
        ]
        return cls(**{**data, "tables": tables, "panels": panels})


@dataclass(frozen=True, slots=True)
class Findings:
    """What a section's module gives: the section without its name and the facts of the run."""

    title: str
    question: str
    method: str
    tables: Sequence[Table]
    panels: Sequence[Panel]
    findings: Sequence[str]
    numbers: Mapping[str, Any]

"""What a section of the study is: numbers that are measured, and what they are shown as."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from examples.study.context import Context
from examples.study.sizes import Sizes
from spdcompile.files import write_whole


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
class Shown:
    """What a section says and shows; made from its numbers alone.

    Args:
        question: what it answers, in one sentence.
        method: how it was measured.
        findings: sentences, computed from the numbers.
        tables, panels: what is shown.
    """

    title: str
    question: str
    method: str
    findings: Sequence[str]
    tables: Sequence[Table]
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured for a section, as JSON data.

    Args:
        name: names its files.
        numbers: everything that was measured.
        facts: machine, versions, date and seconds of the run, and its sizes.
    """

    name: str
    numbers: Mapping[str, Any]
    facts: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(data["name"], data["numbers"], data["facts"])

    @property
    def sizes(self) -> Sizes:
        """How much was measured."""
        given = self.facts["sizes"]
        return Sizes(**{**given, "tps": tuple(given["tps"]), "shares": tuple(given["shares"])})


@dataclass(frozen=True, slots=True)
class Section:
    """One question of the study.

    Args:
        measure: takes all the time; its numbers are JSON data.
        present: says what the numbers say.
    """

    measure: Callable[[Context], Mapping[str, Any]]
    present: Callable[[Mapping[str, Any], Sizes], Shown]

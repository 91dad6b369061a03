"""What a run found: every number as JSON data, and the figures that tables show."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from spdcompile.bench.settings import BenchSettings, Kind, Step
from spdcompile.bench.variants import BASELINE
from spdcompile.machine import processor, usable_cores

FORMAT = "spdcompile-bench-1"


@dataclass(frozen=True, slots=True)
class Row:
    """A step of a variant.

    Args:
        p10, median, p90: milliseconds, of a prompt (TTFT) or a token (TPOT).
        ratio: of p10 to that of the baseline; None without it.
        tokens_per_second: at the median, of all sequences of the batch.
        error: of the logits, relative; None without a reference.
        compile: seconds that the first call took longer than the second.
        samples: milliseconds, in the order of the rounds.
    """

    step: str
    p10: float
    median: float
    p90: float
    ratio: float | None
    tokens_per_second: float
    error: float | None
    compile: float
    samples: Sequence[float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A variant.

    Args:
        reason: why it was not measured, or "".
        load: seconds until it could be called for the first time, by itself.
        rows: a step each; none where it was not measured.
        memory: the peak bytes of each of its processes, measured by itself; empty if not asked for.
    """

    name: str
    label: str
    reason: str
    load: float
    rows: Sequence[Row]
    memory: Sequence[int] = ()

    @property
    def compile(self) -> float:
        """Seconds of all steps' first calls beyond their second ones."""
        return sum(row.compile for row in self.rows)

    def row(self, step: str) -> Row | None:
        return next((row for row in self.rows if row.step == step), None)


@dataclass(frozen=True, slots=True)
class Result:
    """A run.

    Args:
        conditions: machine, versions, date and settings.
        memory: of each rank the peak bytes before models were made, and of the whole run.
        outcomes: a variant each, in the order of the tables.
    """

    conditions: Mapping[str, Any]
    memory: Sequence[Sequence[int | None]]
    outcomes: Sequence[Outcome] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        settings: BenchSettings,
        collected: Sequence[Mapping[str, Any]],
        memory: Sequence[Sequence[int | None]],
    ) -> Result:
        """Computes the figures of what rank 0 has collected.

        Args:
            collected: of each variant its name, label, reason, load, and by step's name its
                samples, error, first and second, in seconds.
        """
        base = next((each for each in collected if each["name"] == BASELINE), None)
        outcomes = [
            Outcome(
                each["name"],
                each["label"],
                each["reason"],
                each["load"],
                [] if each["reason"] else [_row(step, each, base) for step in settings.steps],
            )
            for each in collected
        ]
        return cls(conditions_of(settings), memory, outcomes)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        data = json.loads(text)
        outcomes = [
            Outcome(
                **each
                | {"rows": [Row(**row) for row in each["rows"]], "memory": tuple(each["memory"])}
            )
            for each in data["outcomes"]
        ]
        return cls(data["conditions"], data["memory"], outcomes)

    @property
    def steps(self) -> list[Step]:
        """What was timed."""
        return BenchSettings.from_dict(self.conditions["settings"]).steps


def conditions_of(settings: BenchSettings) -> dict[str, Any]:
    """Machine, versions, date and settings, as JSON data."""
    return {
        "machine": processor(),
        "cores": usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": json.loads(settings.to_json()),
    }


def _row(step: Step, own: Mapping[str, Any], base: Mapping[str, Any] | None) -> Row:
    timed = own["steps"][step.name]
    samples = [1000 * seconds for seconds in timed["samples"]]
    p10, median, p90 = _tenths(samples)
    ratio = None
    if base is not None and not base["reason"]:
        ratio = (
            p10 / _tenths([1000 * seconds for seconds in base["steps"][step.name]["samples"]])[0]
        )
    tokens = step.batch * (1 if step.kind is Kind.TPOT else step.tokens)
    return Row(
        step.name,
        p10,
        median,
        p90,
        ratio,
        1000 * tokens / median,
        timed["error"],
        max(timed["first"] - timed["second"], 0.0),
        samples,
    )


def _tenths(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th percentiles."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]

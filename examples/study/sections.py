"""The sections of the study, in order."""

from __future__ import annotations

from collections.abc import Callable

from examples.study import baselines, curve, data, decode, grouping, segments, worst
from examples.study.context import Context
from examples.study.section import Findings

SECTIONS: dict[str, Callable[[Context], Findings]] = {
    "curve": curve.measure,
    "segments": segments.measure,
    "grouping": grouping.measure,
    "data": data.measure,
    "worst": worst.measure,
    "baselines": baselines.measure,
    "decode": decode.measure,
}

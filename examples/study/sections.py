"""The sections of the study, in the order of the page."""

from __future__ import annotations

from examples.study import baselines, curve, data, decode, grouping, segments, worst
from examples.study.section import Section

SECTIONS: dict[str, Section] = {
    "curve": Section(curve.measure, curve.present),
    "segments": Section(segments.measure, segments.present),
    "grouping": Section(grouping.measure, grouping.present),
    "data": Section(data.measure, data.present),
    "worst": Section(worst.measure, worst.present),
    "baselines": Section(baselines.measure, baselines.present),
    "decode": Section(decode.measure, decode.present),
}

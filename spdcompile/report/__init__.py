"""What was split, synced, dropped and refused, and what it costs: as data and as text."""

from __future__ import annotations

from spdcompile.report.build import build_report
from spdcompile.report.data import (
    BlockReport,
    Collectives,
    LinearReport,
    ModelReport,
    Parameters,
    PassReport,
    PointReport,
    PointState,
    RefusalReport,
    RegionReport,
    Report,
    Size,
)
from spdcompile.report.difference import diff_blocks
from spdcompile.report.model import describe_model
from spdcompile.report.spans import spans

__all__ = [
    "BlockReport",
    "Collectives",
    "LinearReport",
    "ModelReport",
    "Parameters",
    "PassReport",
    "PointReport",
    "PointState",
    "RefusalReport",
    "RegionReport",
    "Report",
    "Size",
    "build_report",
    "describe_model",
    "diff_blocks",
    "spans",
]

"""Tensor-parallel compiler for Hugging Face causal LMs with Sync-Point Drop.

The names below are imported when they are first used, so that `import spdcompile` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "compile": "api",
    "load": "artefact",
    "export_hf": "export",
    "CompiledModel": "compiled",
    "Plan": "plan",
    "Router": "plan",
    "calibrate": "calibration",
    "calibration_tokens": "calibration",
    "distill": "calibration",
    "evaluate": "evaluation",
    "evaluation_tokens": "evaluation",
    "Evaluation": "evaluation",
    "HarnessLM": "harness",
    "group_heads": "grouping",
    "HeadGrouping": "grouping",
    "CalibrateSettings": "calibration",
    "Method": "calibration",
    "Points": "calibration",
    "Quality": "calibration",
    "Sensitivity": "calibration",
    "Distilled": "calibration",
    "DistillSettings": "calibration",
    "StudentInput": "calibration",
    "chunks_of": "calibration",
    "sampled_chunks": "sampled",
    "tune": "tuning.tune",
    "TuneSettings": "tuning.settings",
    "Budget": "tuning.budget",
    "Tuned": "tuning.tuned",
    "PointClass": "tuning.tuned",
    "Latencies": "tuning.latency",
    "estimate_latency": "estimate.estimates",
    "Estimate": "estimate.estimates",
    "SpdCompileError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spdcompile' has no attribute {name!r}")
    return getattr(import_module(f"spdcompile.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])

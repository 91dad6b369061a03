"""Where and with what a section was measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


def facts_of_run(sizes: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Machine, versions, date, sizes and seconds, as JSON data."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "sizes": dict(sizes),
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""Where and with what a section was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from spdcompile.machine import processor


def facts_of_run(sizes: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Machine, versions, date, sizes and seconds, as JSON data."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "sizes": dict(sizes),
    }

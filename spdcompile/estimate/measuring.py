"""This machine's constants, measured by processes of which each is a rank."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.machines import FORMAT
from spdcompile.measuring import check_cores, run_ranks

_RANK = "spdcompile.estimate.measuring_rank"


def measure_machine(
    *, ranks: int, dtypes: Sequence[str] = ("float32",), name: str = "cpu", timeout: float = 600
) -> dict[str, Any]:
    """Measures this machine's CPU, all ranks at once, and what they exchange through.

    Takes about four minutes on an idle machine. Anything else that runs shows in the result.

    Args:
        ranks: processes that run together, one thread each.
        dtypes: in which products are measured.
        name: of the device in the result.
        timeout: seconds after which the processes are ended.

    Returns: a table of the form of machines.json: the device `name`, and the links shared-memory,
        sockets and gloo, as far as ranks have them.

    Raises:
        UsageError: fewer than 2 ranks, or fewer cores than ranks.
        MeasuringError: the processes failed, or did not end in time.
    """
    if ranks < 2:
        raise UsageError("One rank has no link.", where=f"ranks={ranks}", needed="2 or more")
    check_cores(ranks, fix="measure fewer ranks, or on the machine that is meant")
    with tempfile.TemporaryDirectory(prefix="spdcompile-") as directory:
        result = Path(directory) / "machine.json"
        arguments = [str(result), ",".join(dtypes)]
        run_ranks(_RANK, arguments, ranks=ranks, timeout=timeout)
        found = json.loads(result.read_text(encoding="utf-8"))
    how = (
        f"measured by measure-machine: {ranks} ranks at once, one thread each, "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    device = {**found["device"], "sources": [how]}
    links = {link: {"ways": [rows], "sources": [how]} for link, rows in found["links"].items()}
    return {"format": FORMAT, "devices": {name: device}, "links": links}

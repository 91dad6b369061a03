"""What test_loading_memory.py runs in a process of its own: one rank's loading, without a group.

Usage: loading_worker.py FOLDER TP RANK. Prints JSON: bytes of the rank's share, bytes read, bytes
read twice, and the resident memory before anything was read and at its peak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import spdcompile.api  # noqa: F401  (what a process that compiles has imported)
from spdcompile.loading import capture_loaded, load_model
from spdcompile.passes import pipeline
from spdcompile.runtime.weights import bind, read_shared
from tests.runtime.checkpoints import counted


def resident(label: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{label}:"))
    return int(kib) * 1024


def main(folder: Path, tp: int, rank: int) -> None:
    """Loads and prints what it took."""
    loaded, captured = capture_loaded(load_model(folder, None))
    program = pipeline.advance(captured, pipeline.preserving(tp, {})).program
    before, share = resident("VmRSS"), 0
    with counted(pytest.MonkeyPatch()) as reads:
        here, kept = read_shared(program, loaded.tensors), []
        for part in program.parts:
            kept.append(bind(program, part, here, torch.device("cpu"), rank))
            share += sum(tensor.nbytes for tensor in kept[-1].values())
    found = {"share": share, "read": reads.total, "twice": reads.twice}
    print(json.dumps({**found, "before": before, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

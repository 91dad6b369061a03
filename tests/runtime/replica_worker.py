"""What each process of test_replicas.py and test_two_nodes.py runs, under torchrun.

Usage: replica_worker.py FOLDER TP. Every process writes FOLDER/rank_<r>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile.errors import UsageError
from tests.models import tiny, token_ids

WRONG_TP = 3


def model() -> PreTrainedModel:
    """The same model in every process."""
    return tiny("llama", layers=1, hidden=32, heads=4, intermediate=48)


def requests() -> list[Tensor]:
    """Prompts of different lengths; their number is no multiple of that of the replicas."""
    return [token_ids(batch=1, length=4 + index, seed=index) for index in range(5)]


def main(folder: Path, tp: int) -> None:
    """Runs the requests over the replicas and writes what came of it."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        spdcompile.compile(model(), tp=WRONG_TP, executor="distributed", backend="eager")
    except UsageError as error:
        results["wrong tp"] = str(error)
    compiled = spdcompile.compile(model(), tp=tp, backend="eager")
    seen: list[int] = []

    def run(ids: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        return compiled(ids).logits

    results["logits"] = compiled.over_replicas(run, requests())
    results["lengths seen"] = seen
    results["transport"] = compiled.executor.collectives.name
    results["replica"] = [compiled.replica, compiled.num_replicas]
    torch.save(results, folder / f"rank_{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

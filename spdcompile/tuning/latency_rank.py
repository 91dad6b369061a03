"""One rank of a latency measurement, started by torchrun; see `latency.step_seconds`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.plan import Plan


def main(argv: Sequence[str]) -> None:
    """Measures one plan.

    Args:
        argv: the model's directory, the plan's file, the file for the result, the number of
            tokens, the number of rounds, and the backend.
    """
    directory, plan_file, result, tokens, rounds, backend = argv
    plan = Plan.load(plan_file)
    undropped = spdcompile.compile(
        directory,
        tp=plan.tp,
        head_groups=plan.head_groups,
        router=plan.router.value,
        executor="distributed",
        backend=backend,
        device="cpu",
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    size = undropped.model.get_input_embeddings().weight.shape[0]
    input_ids = torch.randint(size, (1, int(tokens)), generator=generator)
    seconds = _medians([undropped, undropped.with_mask(plan)], input_ids, int(rounds))
    if dist.get_rank() == 0:
        found = [*seconds, undropped.executor.collectives.name]
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _medians(programs: Sequence[CompiledModel], input_ids: Tensor, rounds: int) -> list[float]:
    """Median seconds of each program, all of them in turn in every round."""
    times: list[list[float]] = [[] for _ in programs]
    for number in range(rounds + 2):
        for own, program in zip(times, programs, strict=True):
            dist.barrier()
            began = time.perf_counter()
            program(input_ids)
            if number >= 2:  # the first calls compile
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main(sys.argv[1:])

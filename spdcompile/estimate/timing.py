"""Times of what all ranks do at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

_SECONDS, _MOST_ROUNDS, _FEWEST_ROUNDS = 0.15, 40, 5


def seconds_together(run: Callable[[], object]) -> float:
    """Seconds of a call that all ranks begin together, up to when the last one has ended.

    The slowest rank counts, since the others wait for it at the next collective.
    """
    run()
    began = time.perf_counter()
    run()
    rounds = torch.tensor(_SECONDS / (time.perf_counter() - began))
    dist.all_reduce(rounds, op=dist.ReduceOp.MIN)
    times = []
    for _ in range(max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(rounds)))):
        dist.barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return typical(slowest.tolist())


def typical(times: Sequence[float]) -> float:
    """Mean of all but the slowest tenth: means of parts add up to that of the whole."""
    kept = sorted(times)[: len(times) - len(times) // 10]
    return sum(kept) / len(kept)

"""The process group that torchrun's environment describes, and what its ranks must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from spdcompile.errors import PlanError, UsageError


def launched_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(environ.get("WORLD_SIZE", "1"))


def check_world_size(tp: int, world_size: int) -> None:
    """Each rank is one process; further processes hold replicas of the model.

    Raises:
        UsageError: WORLD_SIZE is no multiple of tp.
    """
    if world_size % tp:
        raise UsageError(
            f"WORLD_SIZE={world_size} but tp={tp}.",
            where="torchrun",
            found=f"{world_size} processes",
            needed=f"{tp}, one a rank, or a multiple of it, for replicas",
            fix=f"start it with --nproc-per-node {tp}, or pass executor='local'",
        )


def agree(group: dist.ProcessGroup, facts: Mapping[str, str]) -> None:
    """Compares facts (plan hash, dtype, versions) among the ranks before the first step.

    Raises:
        PlanError: names the fact, and each rank's value of it.
    """
    everyone: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, dict(facts), group=group)
    for name in facts:
        values = [other.get(name, "nothing") for other in everyone]
        if len(set(values)) > 1:
            ranks = dist.get_process_group_ranks(group)
            listing = [f"rank {rank}: {value}" for rank, value in zip(ranks, values, strict=True)]
            error = PlanError(
                f"The ranks do not run the same {name}.",
                where=f"rank {dist.get_rank()}",
                found="\n".join(listing),
                needed=f"one {name} on every rank",
                fix="start every rank with the same model, plan and versions",
            )
            error.on_every_rank = True
            raise error


@contextmanager
def same_random_state(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Gives every rank the random state of rank 0; the others get their own back afterwards."""
    devices = [device] if device.type == "cuda" else []
    first = dist.get_rank(group) == 0
    with torch.random.fork_rng(devices, enabled=not first):
        for state, restore in _random_states(device):
            on_device = state.to(device)
            dist.broadcast(on_device, group=group, group_src=0)
            if not first:
                restore(on_device.cpu())
        yield


def _random_states(
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], None]]]:
    """(state, its setter) of each generator that drawing on a device may use."""
    yield torch.get_rng_state(), torch.set_rng_state
    if device.type == "cuda":
        yield (
            torch.cuda.get_rng_state(device),
            lambda state: torch.cuda.set_rng_state(state, device),
        )
